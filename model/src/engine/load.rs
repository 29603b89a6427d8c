//! From a model's folder to a model and the ids that it may not say.

use std::path::Path;

use tch::Tensor;

use super::{Dtype, StartError};
use crate::{arch::Gpt, config::ModelConfig, nn::Parameters, tokenizer::Tokenizer};

pub(super) struct Loaded {
    pub(super) model: Gpt,
    pub(super) shape: ModelConfig,
    /// Reserved ids but EOS.
    pub(super) never: Vec<u32>,
}

fn failed(error: impl std::fmt::Display) -> StartError {
    StartError::Model(error.to_string())
}

/// The shape alone, which decides how many threads load the rest.
pub(super) fn shape(folder: &Path) -> Result<ModelConfig, StartError> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?).map_err(failed)?;
    serde_json::from_value(config["model"].clone()).map_err(failed)
}

pub(super) fn load(folder: &Path, shape: ModelConfig, dtype: Dtype, device: tch::Device) -> Result<Loaded, StartError> {
    let tokenizer = Tokenizer::load(folder).map_err(failed)?;
    if tokenizer.vocabulary() != shape.vocabulary {
        let (tokens, rows) = (tokenizer.vocabulary(), shape.vocabulary);
        return Err(StartError::Model(format!("its tokenizer has {tokens} tokens, its embedding {rows}")));
    }
    let mut parameters = Parameters::frozen(device, dtype.kind());
    let model = Gpt::new(&shape, &mut parameters);
    let stored = Tensor::read_safetensors(folder.join("weights.safetensors")).map_err(failed)?;
    let mut logical = parameters.logical();
    if stored.len() != logical.len() {
        return Err(StartError::Model(format!("its file has {} tensors, its shape {}", stored.len(), logical.len())));
    }
    let _no_grad = tch::no_grad_guard();
    for (name, tensor) in stored {
        let target = logical.get_mut(name.as_str()).filter(|target| target.size() == tensor.size());
        target.ok_or_else(|| StartError::Model(format!("{name} is not a parameter of this shape")))?.copy_(&tensor);
    }
    drop(logical);
    let eos = tokenizer.roles().eos;
    Ok(Loaded { model, shape, never: tokenizer.reserved().into_iter().filter(|&id| id != eos).collect() })
}
