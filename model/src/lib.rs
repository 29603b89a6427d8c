//! Tensors: tokenizers, token shards, architectures, training and the engine.
//!
//! Knows no SQL and no HTTP; the only crate that names tch.

#[macro_use]
mod listed;

pub mod arch;
pub mod checkpoint;
pub mod config;
pub mod control;
pub mod data;
pub mod device;
pub mod engine;
pub mod failure;
pub mod nn;
pub mod objective;
pub mod optim;
pub mod parallel;
pub mod protocol;
pub mod pulse;
pub mod random;
mod report_pipe;
pub mod shim;
pub mod template;
pub mod tokenizer;
pub mod train;
pub mod worker;
