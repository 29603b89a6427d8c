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
