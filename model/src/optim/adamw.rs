//! AdamW (Loshchilov & Hutter, arXiv 1711.05101), fused over all tensors.
//!
//! Decay acts on matrices only. Clipping and skipping a non-finite step are factors on the device:
//! nothing here waits for it.

use tch::{Kind, Tensor};

use super::{Slice, Update, numbers};
use crate::shim::{self, AdamwStep, AdamwTensors, TensorError};

/// Entry i of each list belongs to slice i.
#[derive(Debug)]
pub struct Adamw {
    averages: Vec<Tensor>,
    squares: Vec<Tensor>,
    steps: Vec<Tensor>,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

impl Adamw {
    pub fn new(slices: &[Slice], betas: [f64; 2], eps: f64, weight_decay: f64) -> Adamw {
        let zeros = || slices.iter().map(|slice| slice.tensor.detach().zeros_like()).collect();
        let steps = slices.iter().map(|slice| Tensor::zeros([], (Kind::Float, slice.tensor.device()))).collect();
        Adamw { averages: zeros(), squares: zeros(), steps, betas, eps, weight_decay }
    }

    pub fn update(&self, slices: &[Slice], update: &Update) -> Result<(), TensorError> {
        for decays in [true, false] {
            let members: Vec<usize> = (0..slices.len()).filter(|&index| slices[index].decays == decays).collect();
            if members.is_empty() {
                continue;
            }
            let of = |list: &[Tensor]| members.iter().map(|&index| list[index].shallow_clone()).collect::<Vec<_>>();
            let tensors = AdamwTensors {
                parameters: &numbers(members.iter().map(|&index| &slices[index])),
                averages: &of(&self.averages),
                squares: &of(&self.squares),
                steps: &of(&self.steps),
                grad_scale: update.grad_scale,
                found_inf: update.found_inf,
            };
            let (betas, eps, learning_rate) = (self.betas, self.eps, update.learning_rate);
            let weight_decay = if decays { self.weight_decay } else { 0.0 };
            shim::adamw(&tensors, AdamwStep { learning_rate, betas, eps, weight_decay })?;
        }
        Ok(())
    }

    /// What it keeps for slice `index`: a name and a tensor shaped like the slice, or a scalar.
    pub fn state(&self, index: usize) -> Vec<(&'static str, &Tensor)> {
        vec![("average", &self.averages[index]), ("square", &self.squares[index]), ("step", &self.steps[index])]
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{double, model};
    use crate::{
        config,
        optim::{Optimizer, Slice},
    };

    const OPTIONS: config::Optimizer = config::Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 };

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
        let mut optimizer = Optimizer::new(Slice::of(&parameters), &OPTIONS);
        let plain = |tensor: &tch::Tensor, decay| {
            let value = double(tensor);
            Plain { average: vec![0.0; value.len()], square: vec![0.0; value.len()], value, decay }
        };
        let mut expected = [plain(&parameters.entries()[0].tensor, 0.1), plain(&parameters.entries()[1].tensor, 0.0)];
        // Below, at and far above the clip.
        for (t, scale) in (1..).zip([0.01, 0.1, 1.0, 100.0, -3.0]) {
            backward(scale);
            let gradients: Vec<Vec<f64>> = parameters.entries().iter().map(|entry| double(&entry.tensor.grad())).collect();
            let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
            let total = optimizer.gradient_norm().unwrap();
            optimizer.step(0.01, 0.5, &total).unwrap();
            let reported = total.double_value(&[]);
            assert!((reported / norm - 1.0).abs() < 1e-6, "the norm is {norm}, not {reported}");
            for ((plain, gradient), entry) in expected.iter_mut().zip(&gradients).zip(parameters.entries()) {
                let clipped: Vec<f64> = gradient.iter().map(|g| g * (0.5 / norm).min(1.0)).collect();
                plain.step(&clipped, t, 0.01);
                for (a, b) in double(&entry.tensor).iter().zip(&plain.value) {
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
            let mut optimizer = Optimizer::new(Slice::of(&parameters), &OPTIONS);
            for &scale in scales {
                backward(scale);
                let norm = optimizer.gradient_norm().unwrap();
                optimizer.step(0.01, 1.0, &norm).unwrap();
            }
            let state = optimizer.held().into_iter().map(|held| (held.piece.name, double(&held.tensor)));
            (state.collect::<Vec<_>>(), double(&parameters.entries()[0].tensor), double(&parameters.entries()[1].tensor))
        };
        let clean = run(&[1.0, 0.5]);
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(run(&[1.0, bad, bad, 0.5]), clean);
        }
    }
}
