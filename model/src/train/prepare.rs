//! From a task to a run that can take its first step.

use std::path::Path;

use super::{
    gang::Gang,
    halt::Halt,
    resolve,
    run::{Data, Folders, Ledger, Run},
    state::TrainState,
};
use crate::{
    arch::Model,
    checkpoint::{self, Held},
    config::{Method, Precision, Validation},
    control::Reporter,
    data::{
        packing::{self, Packing, Split},
        shards::{Shard, Source},
    },
    device, failure,
    nn::Parameters,
    optim::Optimizer,
    protocol::{Failure, FailureCode, Level, Numerics, Report, TrainTask},
    shim,
    tokenizer::Tokenizer,
};

/// Builds the data, resolves the spec, builds the model and reads what it starts from.
pub fn prepare(task: &TrainTask, threads: usize, report: &mut Reporter) -> Result<Run, Halt> {
    let device = device::open(task.device).map_err(|message| failure::new(FailureCode::DeviceUnavailable, message))?;
    let tokenizer = Tokenizer::load(&task.tokenizer).map_err(|error| Halt::Failed(error.into()))?;
    // What an earlier attempt decided holds, even if the row never heard of it.
    let resumed = task.resume.as_deref().map(checkpoint::verify).transpose()?;
    let mut spec = resumed.as_ref().map_or(&task.spec, |manifest| &manifest.spec).clone();
    fit_vocabulary(&mut spec.model.vocabulary, tokenizer.vocabulary())?;
    let data = prepare_data(task, &tokenizer, threads)?;
    // The layout is the attempt's own.
    spec.layout = task.spec.layout;
    let ranks = u64::from(spec.layout.data.max(1));
    resolve::resolve(&mut spec.train, &spec.model, data.train.len(), !data.validation.is_empty(), device, ranks);
    let numerics = numerics(device, threads, spec.train.precision);
    let join = |membership| Gang::join(membership, spec.layout, device);
    let mut gang = task.gang.as_ref().map_or(Ok(Gang::alone()), join)?;
    let mut parameters = Parameters::trainable(device, spec.train.seed).over(gang.axis());
    let mut model = Model::of(&spec.model, &mut parameters, gang.stages(&spec.model));
    let optimizer = Optimizer::new(gang.share(&parameters)?, &spec.train.optimizer);
    model.reside(gang.residence());
    let weights = gang.weights(&parameters, &optimizer);
    let mut state = TrainState::default();
    let mut numerics_changed = false;
    if let (Some(folder), Some(manifest)) = (&task.resume, resumed) {
        checkpoint::load(folder, &weights, &optimizer.held())?;
        numerics_changed = manifest.numerics != numerics;
        state = manifest.state;
    } else if let Some(folder) = &task.base_model {
        begin_from(folder, &weights, &tokenizer, report)?;
    }
    report.send(Report::Started { numerics: numerics.clone(), numerics_changed });
    report.send(Report::Resolved { spec: Box::new(spec.clone()), trained_tokens_per_epoch: data.train.total_supervised() });
    tracing::info!(parameters = Model::parameter_count(&spec.model), sequences = data.train.len(), "prepared");
    let folders =
        Folders { tokenizer: task.tokenizer.clone(), staging: task.staging.clone(), disk_low_bytes: task.disk_low_bytes };
    let ledger = Ledger::begin(state.step);
    Ok(Run { spec, device, numerics, tokenizer, data, model, parameters, optimizer, state, folders, ledger, gang })
}

/// Takes over a base model's weights. The tokenizer is the base's own, or one that adds tokens to it.
fn begin_from(base: &Path, weights: &[Held], tokenizer: &Tokenizer, report: &mut Reporter) -> Result<(), Halt> {
    let of_base = Tokenizer::load(base).map_err(|error| Halt::Failed(error.into()))?;
    if let Err(reason) = tokenizer.extends(&of_base) {
        let message = format!(
            "the tokenizer does not go with the base model: {reason}; use the base's own, or one that only adds tokens to it"
        );
        return Err(Failure { param: Some("tokenizer".into()), ..failure::new(FailureCode::InvalidTokenizer, message) }.into());
    }
    checkpoint::load_base(base, weights)?;
    let (before, after) = (of_base.vocabulary(), tokenizer.vocabulary());
    if after > before {
        let message = format!(
            "the base's vocabulary of {before} grew to {after}; the new rows of the embedding start at the mean of the others"
        );
        report.event(Level::Info, "embedding.grown", &message, serde_json::json!({ "from": before, "to": after }));
    }
    Ok(())
}

/// A new model takes the tokenizer's vocabulary; a base model must have it.
fn fit_vocabulary(vocabulary: &mut i64, tokenizer: i64) -> Result<(), Halt> {
    if *vocabulary == 0 {
        *vocabulary = tokenizer;
    }
    if *vocabulary != tokenizer {
        let message = format!(
            "the model has {vocabulary} tokens and the tokenizer {tokenizer}: use the tokenizer that the model was trained with"
        );
        return Err(failure::new(FailureCode::InvalidTokenizer, message).into());
    }
    Ok(())
}

fn prepare_data(task: &TrainTask, tokenizer: &Tokenizer, threads: usize) -> Result<Data, Halt> {
    let spec = &task.spec;
    let context = spec.model.context as u64;
    let shard_of = |dataset: &Path, dataset_sha256: &str| {
        let tokenizer_sha256 = task.tokenizer_sha256.as_str();
        let method = &spec.method;
        Shard::prepare(
            &task.shard_cache,
            Source { dataset, dataset_sha256, tokenizer, tokenizer_sha256, method, context, threads },
        )
    };
    let shard = shard_of(&task.dataset, &task.dataset_sha256)?;
    let whole = matches!(spec.method, Method::Instruction { .. });
    let split = match spec.validation {
        Some(Validation::Fraction { fraction }) => packing::split(&shard, fraction, spec.train.seed, whole),
        _ => Split { train: packing::all(&shard).collect(), validation: Vec::new() },
    };
    let train = Packing::of(&shard, split.train, context);
    if train.is_empty() {
        let message = "no token of the training data is supervised: for tuning the dataset needs rows with an instruction and an output, for pretraining some text";
        return Err(failure::new(FailureCode::NoSupervisedTokens, message).into());
    }
    let mut validation = Packing::of(&shard, split.validation, context);
    let mut validation_shard = None;
    if let Some(folder) = &task.validation_dataset {
        let manifest = crate::data::rows::Dataset::open(folder).map_err(failure::io)?.manifest;
        let other = shard_of(folder, &manifest.sha256)?;
        validation = Packing::of(&other, packing::all(&other), context);
        validation_shard = Some(other);
    }
    if spec.validation.is_some() && validation.is_empty() {
        let message = "nothing is left to validate on: raise the validation's fraction, or add rows";
        return Err(failure::new(FailureCode::DatasetTooSmall, message).into());
    }
    Ok(Data { shard, train, validation_shard, validation })
}

fn numerics(device: tch::Device, threads: usize, precision: Option<Precision>) -> Numerics {
    Numerics {
        device: match device {
            tch::Device::Cuda(_) => "cuda".into(),
            _ => "cpu".into(),
        },
        threads,
        instruction_set: shim::instruction_set(),
        precision,
        libtorch: shim::libtorch_version(),
    }
}
