//! AdamW (Loshchilov & Hutter, arXiv 1711.05101), fused over all tensors.
//!
//! Decay acts on matrices only. Clipping and skipping a non-finite step are factors on the device:
//! nothing here waits for it.

use tch::{Kind, Tensor};

use crate::{
    config::Optimizer,
    nn::{Parameter, Parameters},
    shim::{self, AdamwStep, AdamwTensors, TensorError},
};

/// Tensors that decay alike; entry i of each list belongs to parameter i.
#[derive(Debug)]
struct Group {
    parameters: Vec<Tensor>,
    averages: Vec<Tensor>,
    squares: Vec<Tensor>,
    steps: Vec<Tensor>,
    weight_decay: f64,
}

#[derive(Debug)]
pub struct Adamw {
    /// Matrices, then vectors.
    groups: [Group; 2],
    all: Vec<Tensor>,
    betas: [f64; 2],
    eps: f64,
}

impl Adamw {
    pub fn new(parameters: &Parameters, options: &Optimizer) -> Adamw {
        let Optimizer::Adamw { betas, eps, weight_decay } = *options;
        let group = |matrices: bool, weight_decay: f64| {
            let members: Vec<&Parameter> = parameters.entries().iter().filter(|entry| entry.is_matrix() == matrices).collect();
            let zeros = || members.iter().map(|entry| entry.tensor.detach().zeros_like()).collect::<Vec<_>>();
            Group {
                parameters: members.iter().map(|entry| entry.tensor.shallow_clone()).collect(),
                averages: zeros(),
                squares: zeros(),
                steps: members.iter().map(|entry| Tensor::zeros([], (Kind::Float, entry.tensor.device()))).collect(),
                weight_decay,
            }
        };
        let all = parameters.entries().iter().map(|entry| entry.tensor.shallow_clone()).collect();
        Adamw { groups: [group(true, weight_decay), group(false, 0.0)], all, betas, eps }
    }

    /// One step with gradients clipped to a global norm of `clip`, then frees the gradients. Returns
    /// the norm before clipping, on the device. If it is not finite, nothing changes.
    pub fn step(&mut self, learning_rate: f64, clip: f64) -> Result<Tensor, TensorError> {
        let norm = shim::gradient_norm(&self.all)?;
        let found_inf = norm.isfinite().logical_not().to_kind(Kind::Float);
        let grad_scale = (&norm / clip).clamp_min(1.0);
        for group in &self.groups {
            let tensors = AdamwTensors {
                parameters: &group.parameters,
                averages: &group.averages,
                squares: &group.squares,
                steps: &group.steps,
                grad_scale: &grad_scale,
                found_inf: &found_inf,
            };
            let (betas, eps, weight_decay) = (self.betas, self.eps, group.weight_decay);
            if !group.parameters.is_empty() {
                shim::adamw(&tensors, AdamwStep { learning_rate, betas, eps, weight_decay })?;
            }
        }
        self.zero_gradients()?;
        Ok(norm)
    }

    pub fn zero_gradients(&self) -> Result<(), TensorError> {
        shim::zero_gradients(&self.all)
    }

    /// The state as logical tensors: `average.{name}`, `square.{name}` and `step.{name}`.
    pub fn logical(&self, parameters: &Parameters) -> Vec<(String, Tensor)> {
        let mut state = Vec::new();
        for (group, matrices) in self.groups.iter().zip([true, false]) {
            let members = parameters.entries().iter().filter(|entry| entry.is_matrix() == matrices);
            for (index, entry) in members.enumerate() {
                for part in &entry.parts {
                    state.push((format!("average.{}", part.name), Parameter::view(&group.averages[index], part)));
                    state.push((format!("square.{}", part.name), Parameter::view(&group.squares[index], part)));
                    state.push((format!("step.{}", part.name), group.steps[index].shallow_clone()));
                }
            }
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::Init;

    const OPTIONS: Optimizer = Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 };

    /// A matrix and a vector whose gradients are `scale` times fixed numbers.
    fn model() -> (Parameters, impl Fn(f64)) {
        let mut parameters = Parameters::trainable(Device::Cpu, 5);
        let matrix = parameters.add("matrix".into(), &[2, 3], Init::Normal(1.0));
        let vector = parameters.add("vector".into(), &[3], Init::Ones);
        let slopes =
            [Tensor::from_slice(&[1f32, -2.0, 0.5, 3.0, -0.1, 0.7]).view([2, 3]), Tensor::from_slice(&[0.2f32, -1.0, 4.0])];
        let backward = move |scale: f64| {
            let loss = (&matrix * &slopes[0]).sum(Kind::Float) + (&vector * &slopes[1]).sum(Kind::Float);
            (loss * scale).backward();
        };
        (parameters, backward)
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::<f64>::try_from(tensor.detach().to_kind(Kind::Double).view([-1])).unwrap()
    }

    /// Algorithm 2 of the paper on one tensor, in double precision.
    struct Plain {
        value: Vec<f64>,
        average: Vec<f64>,
        square: Vec<f64>,
        decay: f64,
    }

    impl Plain {
        fn step(&mut self, gradient: &[f64], t: i32, rate: f64) {
            for (i, &g) in gradient.iter().enumerate() {
                self.average[i] = 0.9 * self.average[i] + 0.1 * g;
                self.square[i] = 0.95 * self.square[i] + 0.05 * g * g;
                let (average, square) = (self.average[i] / (1.0 - 0.9f64.powi(t)), self.square[i] / (1.0 - 0.95f64.powi(t)));
                self.value[i] -= rate * (average / (square.sqrt() + 1e-8) + self.decay * self.value[i]);
            }
        }
    }

    #[test]
    fn equals_the_paper_with_clipping_and_decays_matrices_only() {
        let (parameters, backward) = model();
        let mut optimizer = Adamw::new(&parameters, &OPTIONS);
        let plain = |tensor: &Tensor, decay| {
            let value = values(tensor);
            Plain { average: vec![0.0; value.len()], square: vec![0.0; value.len()], value, decay }
        };
        let mut expected = [plain(&parameters.entries()[0].tensor, 0.1), plain(&parameters.entries()[1].tensor, 0.0)];
        // Below, at and far above the clip.
        for (t, scale) in (1..).zip([0.01, 0.1, 1.0, 100.0, -3.0]) {
            backward(scale);
            let gradients: Vec<Vec<f64>> = parameters.entries().iter().map(|entry| values(&entry.tensor.grad())).collect();
            let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
            let reported = optimizer.step(0.01, 0.5).unwrap().double_value(&[]);
            assert!((reported / norm - 1.0).abs() < 1e-6, "the norm is {norm}, not {reported}");
            for ((plain, gradient), entry) in expected.iter_mut().zip(&gradients).zip(parameters.entries()) {
                let clipped: Vec<f64> = gradient.iter().map(|g| g * (0.5 / norm).min(1.0)).collect();
                plain.step(&clipped, t, 0.01);
                for (a, b) in values(&entry.tensor).iter().zip(&plain.value) {
                    assert!((a - b).abs() < 2e-6, "step {t}: {a} is not {b}");
                }
                assert!(!entry.tensor.grad().defined(), "gradients are freed");
            }
        }
    }

    #[test]
    fn a_step_that_is_not_finite_never_was() {
        let run = |scales: &[f64]| {
            let (parameters, backward) = model();
            let mut optimizer = Adamw::new(&parameters, &OPTIONS);
            for &scale in scales {
                backward(scale);
                _ = optimizer.step(0.01, 1.0).unwrap();
            }
            let state = optimizer.logical(&parameters).into_iter().map(|(name, tensor)| (name, values(&tensor)));
            (state.collect::<Vec<_>>(), values(&parameters.entries()[0].tensor), values(&parameters.entries()[1].tensor))
        };
        let clean = run(&[1.0, 0.5]);
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(run(&[1.0, bad, bad, 0.5]), clean);
        }
    }
}
