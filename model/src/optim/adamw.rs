//! AdamW (Loshchilov & Hutter, arXiv 1711.05101), fused over all tensors.
//!
//! Decay acts on matrices only. Clipping and skipping a non-finite step are factors on the device:
//! nothing here waits for it.

use tch::{Kind, Tensor};

use super::Slice;
use crate::{
    checkpoint::Held,
    config::Optimizer,
    nn::{Piece, Twin},
    shim::{self, AdamwStep, AdamwTensors, TensorError},
};

/// Slices that decay alike; entry i of each list belongs to slice i.
#[derive(Debug)]
struct Group {
    slices: Vec<Slice>,
    numbers: Vec<Tensor>,
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
    pub fn new(slices: Vec<Slice>, options: &Optimizer) -> Adamw {
        let Optimizer::Adamw { betas, eps, weight_decay } = *options;
        let all = slices.iter().map(|slice| slice.tensor.shallow_clone()).collect();
        let (decaying, others) = slices.into_iter().partition(|slice| slice.decays);
        let group = |slices: Vec<Slice>, weight_decay: f64| {
            let zeros = || slices.iter().map(|slice| slice.tensor.detach().zeros_like()).collect::<Vec<_>>();
            Group {
                numbers: slices.iter().map(|slice| slice.tensor.shallow_clone()).collect(),
                averages: zeros(),
                squares: zeros(),
                steps: slices.iter().map(|slice| Tensor::zeros([], (Kind::Float, slice.tensor.device()))).collect(),
                weight_decay,
                slices,
            }
        };
        Adamw { groups: [group(decaying, weight_decay), group(others, 0.0)], all, betas, eps }
    }

    /// The norm over all gradients, on the device.
    pub fn gradient_norm(&self) -> Result<Tensor, TensorError> {
        shim::gradient_norm(&self.all)
    }

    /// The same over parameters that are cut, or that are not; of twins the original counts.
    pub fn gradient_norm_of(&self, cut: bool) -> Result<Tensor, TensorError> {
        let tensors = self.tensors_of(|slice| slice.cut == cut && slice.twin != Some(Twin::Copy));
        match tensors.is_empty() {
            true => Ok(Tensor::zeros([], (Kind::Float, self.all[0].device()))),
            false => shim::gradient_norm(&tensors),
        }
    }

    /// What it updates.
    pub fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.groups.iter().flat_map(|group| &group.slices)
    }

    /// The numbers of some of its slices.
    pub fn tensors_of(&self, of: impl Fn(&Slice) -> bool) -> Vec<Tensor> {
        self.slices().filter(|slice| of(slice)).map(|slice| slice.tensor.shallow_clone()).collect()
    }

    /// One step with gradients, whose global norm is `norm`, clipped to one of `clip`, then frees the gradients. If the norm is
    /// not finite, nothing changes.
    pub fn step(&mut self, learning_rate: f64, clip: f64, norm: &Tensor) -> Result<(), TensorError> {
        let found_inf = norm.isfinite().logical_not().to_kind(Kind::Float);
        let grad_scale = (norm / clip).clamp_min(1.0);
        for group in &self.groups {
            let tensors = AdamwTensors {
                parameters: &group.numbers,
                averages: &group.averages,
                squares: &group.squares,
                steps: &group.steps,
                grad_scale: &grad_scale,
                found_inf: &found_inf,
            };
            let (betas, eps, weight_decay) = (self.betas, self.eps, group.weight_decay);
            if !group.numbers.is_empty() {
                shim::adamw(&tensors, AdamwStep { learning_rate, betas, eps, weight_decay })?;
            }
        }
        self.zero_gradients()
    }

    pub fn zero_gradients(&self) -> Result<(), TensorError> {
        shim::zero_gradients(&self.all)
    }

    /// The state by logical tensors: `average.{name}`, `square.{name}` and `step.{name}`.
    pub fn held(&self) -> Vec<Held> {
        let mut held = Vec::new();
        for group in &self.groups {
            for (index, slice) in group.slices.iter().enumerate() {
                for piece in &slice.pieces {
                    let named = |state: &str| format!("{state}.{}", piece.name);
                    for (state, of) in [("average", &group.averages), ("square", &group.squares)] {
                        let piece = Piece { name: named(state), ..piece.clone() };
                        held.push(Held::new(piece, &of[index], slice.cut, slice.twin));
                    }
                    let scalar = Piece { name: named("step"), whole: vec![], offset: vec![], shape: vec![], start: 0 };
                    held.push(Held::new(scalar, &group.steps[index], slice.cut, slice.twin));
                }
            }
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::{Init, Parameters};

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
        let mut optimizer = Adamw::new(Slice::of(&parameters), &OPTIONS);
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
            let total = optimizer.gradient_norm().unwrap();
            optimizer.step(0.01, 0.5, &total).unwrap();
            let reported = total.double_value(&[]);
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
            let mut optimizer = Adamw::new(Slice::of(&parameters), &OPTIONS);
            for &scale in scales {
                backward(scale);
                let norm = optimizer.gradient_norm().unwrap();
                optimizer.step(0.01, 1.0, &norm).unwrap();
            }
            let state = optimizer.held().into_iter().map(|held| (held.piece.name, values(&held.tensor)));
            (state.collect::<Vec<_>>(), values(&parameters.entries()[0].tensor), values(&parameters.entries()[1].tensor))
        };
        let clean = run(&[1.0, 0.5]);
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(run(&[1.0, bad, bad, 0.5]), clean);
        }
    }
}
