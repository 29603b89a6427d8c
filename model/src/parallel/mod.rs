//! One model over many ranks.
//!
//! A [`Layout`] says how many ranks there are and how they stand: along the axes of data, tensor and pipeline. Ranks are
//! processes; those of one axis are a [`Group`], whose collectives are PyTorch's own (c10d: Gloo on the CPU). Nothing here
//! computes a collective by hand, and no architecture, objective or training loop names one: the layers of [`crate::nn`] know
//! the [`TensorAxis`], and the run its gang.

pub mod gradients;
pub mod group;
pub mod layout;
pub mod mesh;
pub mod record;
pub mod residence;
pub mod schedule;
pub mod stages;
pub mod tensor;
pub mod wire;

pub use gradients::Gradients;
pub use group::{Group, Interrupted, Pending};
pub use layout::{Layout, Misfit};
pub use mesh::{Axis, Coordinates, Mesh};
pub use record::{Collective, Operation, Record};
pub use residence::{Residence, Unit};
pub use stages::Stage;
pub use tensor::TensorAxis;
pub use wire::Wire;

#[cfg(test)]
pub(crate) mod tests;
