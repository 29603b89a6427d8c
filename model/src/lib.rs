//! Tensors: tokenizers, token shards, architectures, training and the engine.
//!
//! Knows no SQL and no HTTP; the only crate that names tch.

pub mod config;
pub mod data;
pub mod protocol;
pub mod template;
pub mod tokenizer;
pub mod worker;
