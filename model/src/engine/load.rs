//! From a model's folder to a model and the ids that it may not say.

use std::path::Path;

use super::{Dtype, StartError};
use crate::{arch::Model, checkpoint, config::ModelConfig, nn::Parameters, protocol::Failure, tokenizer::Tokenizer};

pub(super) struct Loaded {
    pub(super) model: Model,
    pub(super) shape: ModelConfig,
    /// Reserved ids but EOS.
    pub(super) never: Vec<u32>,
}

fn failed(error: impl std::fmt::Display) -> StartError {
    StartError::Model(error.to_string())
}

fn unreadable(failure: Failure) -> StartError {
    StartError::Model(failure.message)
}

/// The shape alone, which decides how many threads load the rest.
pub(super) fn shape(folder: &Path) -> Result<ModelConfig, StartError> {
    // A folder that is not there is another error than one that cannot be understood.
    std::fs::metadata(folder)?;
    checkpoint::read_shape(folder).map_err(unreadable)
}

pub(super) fn load(folder: &Path, shape: ModelConfig, dtype: Dtype, device: tch::Device) -> Result<Loaded, StartError> {
    let tokenizer = Tokenizer::load(folder).map_err(failed)?;
    if tokenizer.vocabulary() != shape.vocabulary {
        let (tokens, rows) = (tokenizer.vocabulary(), shape.vocabulary);
        return Err(StartError::Model(format!("its tokenizer has {tokens} tokens, its embedding {rows}")));
    }
    let mut parameters = Parameters::frozen(device, dtype.kind());
    let model = Model::new(&shape, &mut parameters);
    checkpoint::load_weights(folder, &parameters).map_err(unreadable)?;
    let eos = tokenizer.roles().eos;
    Ok(Loaded { model, shape, never: tokenizer.reserved().into_iter().filter(|&id| id != eos).collect() })
}
