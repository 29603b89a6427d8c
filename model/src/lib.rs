//! Tensors: tokenizers, token shards, architectures, training and the engine.
//!
//! Knows no SQL and no HTTP; the only crate that names tch.

pub mod arch;
pub mod config;
pub mod data;
pub mod engine;
pub mod nn;
pub mod protocol;
pub mod random;
pub mod shim;
pub mod template;
pub mod tokenizer;
pub mod worker;
