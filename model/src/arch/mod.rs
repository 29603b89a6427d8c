//! Architectures: one file each, reading like the paper's figure.

pub mod gpt;

pub use gpt::Gpt;
