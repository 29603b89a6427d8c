//! Optimisers and the schedule of the learning rate.
//!
//! An optimiser changes [`Slice`]s and knows no parameter: what is sharded over ranks is so many numbers of several of them.

mod adamw;
pub mod schedule;

use tch::Tensor;

pub use adamw::Adamw;

use crate::nn::{Parameters, Piece, Twin};

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
