//! Stochastic gradient descent with momentum (Sutskever et al., *On the importance of initialization and momentum in deep
//! learning*, ICML 2013), fused over all tensors.
//!
//! The decay is added to the gradient, of matrices only.

use tch::Tensor;

use super::{Slice, Update, numbers};
use crate::shim::{self, SgdStep, SgdTensors, TensorError};

#[derive(Debug)]
pub struct Sgd {
    /// Of each slice; none without momentum.
    momenta: Vec<Tensor>,
    momentum: f64,
    weight_decay: f64,
}

impl Sgd {
    pub fn new(slices: &[Slice], momentum: f64, weight_decay: f64) -> Sgd {
        let zeros = slices.iter().filter(|_| momentum > 0.0).map(|slice| slice.tensor.detach().zeros_like());
        Sgd { momenta: zeros.collect(), momentum, weight_decay }
    }

    pub fn update(&self, slices: &[Slice], update: &Update) -> Result<(), TensorError> {
        for decays in [true, false] {
            let members: Vec<usize> = (0..slices.len()).filter(|&index| slices[index].decays == decays).collect();
            if members.is_empty() {
                continue;
            }
            let momenta: Vec<Tensor> =
                members.iter().filter_map(|&index| self.momenta.get(index)).map(Tensor::shallow_clone).collect();
            let tensors = SgdTensors {
                parameters: &numbers(members.iter().map(|&index| &slices[index])),
                momenta: &momenta,
                grad_scale: update.grad_scale,
                found_inf: update.found_inf,
            };
            let weight_decay = if decays { self.weight_decay } else { 0.0 };
            shim::sgd(&tensors, SgdStep { learning_rate: update.learning_rate, momentum: self.momentum, weight_decay })?;
        }
        Ok(())
    }

    /// See [`super::adamw::Adamw::state`].
    pub fn state(&self, index: usize) -> Vec<(&'static str, &Tensor)> {
        self.momenta.get(index).map(|momentum| ("momentum", momentum)).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{double, model};
    use crate::{
        config,
        optim::{Optimizer, Slice},
    };

    #[test]
    fn equals_the_rule_with_clipping_and_decays_matrices_only() {
        for momentum in [0.0, 0.9] {
            let (parameters, backward) = model();
            let options = config::Optimizer::Sgd { momentum, weight_decay: 0.1 };
            let mut optimizer = Optimizer::new(Slice::of(&parameters), &options);
            let mut values: Vec<Vec<f64>> = parameters.entries().iter().map(|entry| double(&entry.tensor)).collect();
            let mut velocities: Vec<Vec<f64>> = values.iter().map(|value| vec![0.0; value.len()]).collect();
            for scale in [0.01, 1.0, 100.0, -3.0] {
                backward(scale);
                let gradients: Vec<Vec<f64>> = parameters.entries().iter().map(|entry| double(&entry.tensor.grad())).collect();
                let norm = optimizer.gradient_norm().unwrap();
                optimizer.step(0.01, 0.5, &norm).unwrap();
                let factor = (0.5 / norm.double_value(&[])).min(1.0);
                for (index, gradient) in gradients.iter().enumerate() {
                    let decay = if index == 0 { 0.1 } else { 0.0 };
                    for (number, g) in gradient.iter().enumerate() {
                        let slope = g * factor + decay * values[index][number];
                        velocities[index][number] = momentum * velocities[index][number] + slope;
                        values[index][number] -= 0.01 * velocities[index][number];
                    }
                    for (found, wanted) in double(&parameters.entries()[index].tensor).iter().zip(&values[index]) {
                        assert!((found - wanted).abs() < 1e-6, "momentum {momentum}: {found} is not {wanted}");
                    }
                }
            }
            let kept = optimizer.held();
            assert_eq!(kept.len(), if momentum > 0.0 { 2 } else { 0 });
        }
    }

    #[test]
    fn a_step_that_is_not_finite_never_was() {
        let (parameters, backward) = model();
        let mut optimizer = Optimizer::new(Slice::of(&parameters), &config::Optimizer::Sgd { momentum: 0.9, weight_decay: 0.1 });
        let before: Vec<Vec<f64>> = parameters.entries().iter().map(|entry| double(&entry.tensor)).collect();
        backward(f64::NAN);
        let norm = optimizer.gradient_norm().unwrap();
        optimizer.step(0.01, 0.5, &norm).unwrap();
        let after: Vec<Vec<f64>> = parameters.entries().iter().map(|entry| double(&entry.tensor)).collect();
        assert_eq!(before, after);
        assert!(optimizer.held().iter().all(|held| double(&held.tensor).iter().all(|&number| number == 0.0)));
    }
}
