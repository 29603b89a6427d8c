//! Optimisers and the schedule of the learning rate.
//!
//! An optimiser changes [`Slice`]s and knows no parameter: what is sharded over ranks is so many numbers of several of them.
//! Clipping and skipping a non-finite step are factors on the device: nothing here waits for it.

mod adamw;
pub mod schedule;
mod sgd;

use adamw::Adamw;
use sgd::Sgd;
use tch::{Kind, Tensor};

use crate::{
    checkpoint::Held,
    config,
    nn::{Parameters, Piece, Twin},
    shim::{self, TensorError},
};

/// Numbers that change together: a parameter, or this rank's share of some.
#[derive(Debug)]
pub struct Slice {
    /// Its gradient is that of the numbers.
    pub tensor: Tensor,
    /// What of which logical tensor it holds.
    pub pieces: Vec<Piece>,
    /// Whether it belongs to matrices.
    pub decays: bool,
    /// Whether other ranks of the tensor axis have other numbers.
    pub cut: bool,
    /// Where another stage has the same.
    pub twin: Option<Twin>,
}

impl Slice {
    /// One for each parameter.
    pub fn of(parameters: &Parameters) -> Vec<Slice> {
        let slices = parameters.entries().iter().map(|entry| Slice {
            tensor: entry.tensor.shallow_clone(),
            pieces: entry.pieces.clone(),
            decays: entry.is_matrix(),
            cut: entry.is_cut(),
            twin: entry.twin,
        });
        slices.collect()
    }
}

fn numbers<'a>(slices: impl Iterator<Item = &'a Slice>) -> Vec<Tensor> {
    slices.map(|slice| slice.tensor.shallow_clone()).collect()
}

/// What every rule is told of a step.
struct Update<'a> {
    learning_rate: f64,
    /// fp32 scalar by which gradients are divided.
    grad_scale: &'a Tensor,
    /// fp32 scalar: 1 changes nothing.
    found_inf: &'a Tensor,
}

/// The rules, one file each.
#[derive(Debug)]
enum Rule {
    Adamw(Adamw),
    Sgd(Sgd),
}

#[derive(Debug)]
pub struct Optimizer {
    slices: Vec<Slice>,
    rule: Rule,
}

impl Optimizer {
    pub fn new(slices: Vec<Slice>, options: &config::Optimizer) -> Optimizer {
        let rule = match *options {
            config::Optimizer::Adamw { betas, eps, weight_decay } => Rule::Adamw(Adamw::new(&slices, betas, eps, weight_decay)),
            config::Optimizer::Sgd { momentum, weight_decay } => Rule::Sgd(Sgd::new(&slices, momentum, weight_decay)),
        };
        Optimizer { slices, rule }
    }

    /// What it updates.
    pub fn slices(&self) -> &[Slice] {
        &self.slices
    }

    /// The numbers of some of its slices.
    pub fn tensors_of(&self, of: impl Fn(&Slice) -> bool) -> Vec<Tensor> {
        numbers(self.slices.iter().filter(|slice| of(slice)))
    }

    /// The norm over all gradients, on the device.
    pub fn gradient_norm(&self) -> Result<Tensor, TensorError> {
        shim::gradient_norm(&numbers(self.slices.iter()))
    }

    /// The same over parameters that are cut, or that are not; of twins the original counts.
    pub fn gradient_norm_of(&self, cut: bool) -> Result<Tensor, TensorError> {
        let tensors = self.tensors_of(|slice| slice.cut == cut && slice.twin != Some(Twin::Copy));
        match tensors.is_empty() {
            true => Ok(Tensor::zeros([], (Kind::Float, self.slices[0].tensor.device()))),
            false => shim::gradient_norm(&tensors),
        }
    }

    /// One step with gradients, whose global norm is `norm`, clipped to one of `clip`, then frees the gradients. If the norm is
    /// not finite, nothing changes.
    pub fn step(&mut self, learning_rate: f64, clip: f64, norm: &Tensor) -> Result<(), TensorError> {
        let found_inf = norm.isfinite().logical_not().to_kind(Kind::Float);
        let grad_scale = (norm / clip).clamp_min(1.0);
        let update = Update { learning_rate, grad_scale: &grad_scale, found_inf: &found_inf };
        match &self.rule {
            Rule::Adamw(adamw) => adamw.update(&self.slices, &update)?,
            Rule::Sgd(sgd) => sgd.update(&self.slices, &update)?,
        }
        self.zero_gradients()
    }

    pub fn zero_gradients(&self) -> Result<(), TensorError> {
        shim::zero_gradients(&numbers(self.slices.iter()))
    }

    /// The state by logical tensors, such as `average.{name}`.
    pub fn held(&self) -> Vec<Held> {
        let mut held = Vec::new();
        for (index, slice) in self.slices.iter().enumerate() {
            let state = match &self.rule {
                Rule::Adamw(adamw) => adamw.state(index),
                Rule::Sgd(sgd) => sgd.state(index),
            };
            for (piece, (name, tensor)) in slice.pieces.iter().flat_map(|piece| state.iter().map(move |one| (piece, one))) {
                let named = Piece { name: format!("{name}.{}", piece.name), ..piece.clone() };
                let scalar = || Piece { whole: vec![], offset: vec![], shape: vec![], start: 0, ..named.clone() };
                let piece = if tensor.dim() == 0 { scalar() } else { named.clone() };
                held.push(Held::new(piece, tensor, slice.cut, slice.twin));
            }
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::nn::Init;

    /// A matrix and a vector whose gradients are `scale` times fixed numbers.
    pub fn model() -> (Parameters, impl Fn(f64)) {
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

    pub fn double(tensor: &Tensor) -> Vec<f64> {
        Vec::<f64>::try_from(tensor.detach().to_kind(Kind::Double).view([-1])).unwrap()
    }
}
