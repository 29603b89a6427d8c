//! Generation: many sequences on one model, decoded together.
//!
//! [`Engine::start`] gives the model to a thread of its own and returns a handle; tensors never leave
//! that thread. Requests and answers are token ids: templates, stop strings and text are the caller's
//! (see [`crate::template`], [`stop`]). Promises: sequences join and leave at step borders; the queue
//! is bounded; a sequence whose client is gone leaves before the next step; a seeded answer's random
//! numbers never depend on its neighbours, its logits only by rounding, and with
//! [`EngineConfig::deterministic_decode`] not at all.
//!
//! | file | what |
//! |---|---|
//! | [`scheduler`] | which sequences take part in which step; no tensors |
//! | [`sampler`] | the next token from a row of logits |
//! | `forward` | the model with its cache: chunks of prompts and a batch of decodes, in one pass |
//! | `load` | a model's folder |
//! | `worker` | the loop that puts the three together |
//! | [`stop`] | stop strings, for callers |

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
};

use serde::{Deserialize, Serialize};

use crate::{
    arch::Model,
    config::{ModelConfig, Sampling},
    device,
    nn::Packed,
    protocol::DeviceChoice,
    shim,
};

mod forward;
mod load;
pub mod sampler;
pub mod scheduler;
pub mod stop;
mod worker;

pub use sampler::Sampled;
pub use scheduler::{Finish, Refusal};

use forward::Forward;
use sampler::Sampler;
use scheduler::{Limits, Request, Scheduler, SequenceId};
use worker::Worker;

/// The type of weights, activations and cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    Fp32,
    Bf16,
}

impl Dtype {
    fn kind(self) -> tch::Kind {
        match self {
            Dtype::Fp32 => tch::Kind::Float,
            Dtype::Bf16 => tch::Kind::BFloat16,
        }
    }
}

#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Sequences decoded together.
    pub max_sequences: usize,
    /// Requests that wait beyond those.
    pub max_waiting: usize,
    /// Every step has the same shape, whoever else is there: logits do not depend on neighbours by
    /// a single bit. Slower, and the cache is allocated whole.
    pub deterministic_decode: bool,
    /// Threads of tensor work; `None`: by the model's size, at most one a core.
    pub threads: Option<usize>,
    pub device: DeviceChoice,
    pub dtype: Dtype,
    /// Bytes that keys and values may take.
    pub cache_bytes: u64,
    /// Tokens of a prompt that are computed between two steps of the others.
    pub prefill_chunk: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            max_sequences: 32,
            max_waiting: 256,
            deterministic_decode: false,
            threads: None,
            device: DeviceChoice::Cpu,
            dtype: Dtype::Fp32,
            cache_bytes: 2 << 30,
            prefill_chunk: 128,
        }
    }
}

impl EngineConfig {
    /// Bytes that an engine with a model of this shape may ever take for weights, keys and values:
    /// what its runner has to keep free for it.
    pub fn reserved_bytes(&self, model: &ModelConfig) -> u64 {
        let whole = (self.max_sequences.max(1) as u64).saturating_mul(model.context as u64);
        let cache = whole.saturating_mul(position_bytes(model, self.dtype)).min(self.cache_bytes);
        // A table that is the output projection too is there in the layout of both.
        let table = if model.tie_embeddings { (model.vocabulary * model.width) as u64 } else { 0 };
        let weights = (Model::parameter_count(model) + table) * self.dtype.kind().elt_size_in_bytes() as u64;
        weights.saturating_add(Packed::small_bytes(Model::parameter_count(model))).saturating_add(cache)
    }
}

/// One sequence to continue.
#[derive(Clone, Debug)]
pub struct Generation {
    /// At least one id, each within the vocabulary.
    pub prompt: Vec<u32>,
    /// `max_tokens` of 0 computes the prompt only, which with `prompt_logprobs` scores it.
    pub sampling: Sampling,
    /// Tokens that end the answer; they are neither reported nor counted.
    pub stop_tokens: Vec<u32>,
    /// Score the prompt, with this many alternatives a position.
    pub prompt_logprobs: Option<usize>,
}

/// What a client hears, in order: the prompt's scores if asked for, tokens, the end.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// One entry a prompt token from the second on; the first has no predecessor to be scored by.
    Prompt(Vec<Sampled>),
    Token(Sampled),
    /// The last event.
    Finished {
        reason: Finish,
        prompt_tokens: usize,
        completion_tokens: usize,
    },
}

/// Takes a client's events on the engine's thread, so it must not block. False: the client is gone.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the model cannot be loaded: {0}")]
    Model(String),
    #[error(
        "deterministic decoding keeps {needed} bytes for keys and values ({sequences} sequences of {context} tokens), but the engine may use {allowed}: allow more, or fewer sequences"
    )]
    CacheTooSmall { needed: u64, allowed: u64, sequences: usize, context: usize },
    #[error("the model's folder cannot be read, or a thread cannot be started: {0}")]
    Io(#[from] std::io::Error),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("token {id} at {index} is not in the vocabulary of {vocabulary}")]
    UnknownToken { index: usize, id: u32, vocabulary: usize },
    #[error("the engine has stopped")]
    Stopped,
}

/// How busy an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Accepted and not finished, running or waiting.
    pub open: usize,
    /// Tokens generated since the start.
    pub generated_tokens: u64,
    /// Prompt tokens computed since the start.
    pub prompt_tokens: u64,
    /// Steps ended since the start. While sequences are open and it stands still, the engine hangs.
    pub steps: u64,
}

enum Command {
    Submit { id: SequenceId, generation: Generation, sink: Sink, place: Place },
    Cancel(SequenceId),
    Stop,
}

/// What handles and the thread share.
struct Shared {
    model: ModelConfig,
    limits: Limits,
    next_id: AtomicU64,
    open: AtomicUsize,
    generated_tokens: AtomicU64,
    prompt_tokens: AtomicU64,
    steps: AtomicU64,
    alive: AtomicBool,
}

/// A place among the open sequences, given back when it is dropped.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Dropping it cancels the sequence, if it has not finished.
#[derive(Debug)]
pub struct Ticket {
    id: SequenceId,
    commands: mpsc::Sender<Command>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // A stopped engine has nothing to cancel.
        let _ = self.commands.send(Command::Cancel(self.id));
    }
}

/// The way to an engine; cheap to clone. The engine stops when the last handle is gone.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Queues a sequence. Its events go to `sink`; dropping the ticket cancels it.
    pub fn submit(&self, generation: Generation, sink: Sink) -> Result<Ticket, SubmitError> {
        let shared = &self.shared;
        let vocabulary = shared.model.vocabulary as usize;
        if let Some(index) = generation.prompt.iter().position(|&id| id as usize >= vocabulary) {
            return Err(SubmitError::UnknownToken { index, id: generation.prompt[index], vocabulary });
        }
        Scheduler::admissible(&shared.limits, request(&generation))?;
        let most = shared.limits.max_sequences + shared.limits.max_waiting;
        let taken = shared.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| (open < most).then_some(open + 1));
        if taken.is_err() {
            return Err(Refusal::QueueFull { waiting: shared.limits.max_waiting }.into());
        }
        let place = Place(shared.clone());
        let id = SequenceId(shared.next_id.fetch_add(1, Ordering::Relaxed));
        let submit = Command::Submit { id, generation, sink, place };
        self.commands.send(submit).map_err(|_| SubmitError::Stopped)?;
        Ok(Ticket { id, commands: self.commands.clone() })
    }

    /// False once the engine has failed or stopped: its process should end.
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    /// Ends the engine; open sequences finish as cancelled.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }

    pub fn model(&self) -> &ModelConfig {
        &self.shared.model
    }

    pub fn load(&self) -> Load {
        Load {
            open: self.shared.open.load(Ordering::Acquire),
            generated_tokens: self.shared.generated_tokens.load(Ordering::Relaxed),
            prompt_tokens: self.shared.prompt_tokens.load(Ordering::Relaxed),
            steps: self.shared.steps.load(Ordering::Relaxed),
        }
    }
}

fn request(generation: &Generation) -> Request {
    Request { prompt_tokens: generation.prompt.len(), max_tokens: usize::try_from(generation.sampling.max_tokens).unwrap_or(0) }
}

/// Bytes of keys and values for one position of one sequence.
fn position_bytes(model: &ModelConfig, dtype: Dtype) -> u64 {
    2 * (model.layers * model.kv_heads * model.head_dim) as u64 * dtype.kind().elt_size_in_bytes() as u64
}

fn limits(model: &ModelConfig, config: &EngineConfig) -> Result<Limits, StartError> {
    let context = model.context as usize;
    let limits = Limits {
        max_sequences: config.max_sequences.max(1),
        max_waiting: config.max_waiting,
        context,
        prefill_chunk: config.prefill_chunk.max(1),
        prefill_budget: config.prefill_chunk.max(1) * 2,
        cache_positions: usize::try_from(config.cache_bytes / position_bytes(model, config.dtype).max(1)).unwrap_or(usize::MAX),
        fixed_shape: config.deterministic_decode,
    };
    let whole = limits.max_sequences * context;
    if config.deterministic_decode && whole > limits.cache_positions {
        return Err(StartError::CacheTooSmall {
            needed: whole as u64 * position_bytes(model, config.dtype),
            allowed: config.cache_bytes,
            sequences: limits.max_sequences,
            context,
        });
    }
    Ok(limits)
}

/// A running engine is known by its handles alone.
pub struct Engine;

impl Engine {
    /// Loads the model of a folder and starts its thread. Sets the process's tensor threads.
    pub fn start(folder: &Path, config: EngineConfig) -> Result<EngineHandle, StartError> {
        let loading = || {
            let shape = load::shape(folder)?;
            let threads = config.threads.unwrap_or_else(|| threads(&shape));
            shim::initialize(threads).map_err(|error| StartError::Model(error.to_string()))?;
            load::load(folder, shape, config.dtype, device::open(config.device).map_err(StartError::Model)?)
        };
        // tch reports lack of memory by panicking.
        let loaded = std::panic::catch_unwind(std::panic::AssertUnwindSafe(loading));
        let loaded = loaded.unwrap_or_else(|panic| Err(StartError::Model(worker::message(&*panic))))?;
        Engine::spawn(loaded.model, loaded.shape, loaded.never, &config)
    }

    /// Starts a thread for a model in memory, whose weights have the config's type and device.
    /// `never`: ids that are never chosen.
    pub fn spawn(model: Model, shape: ModelConfig, never: Vec<u32>, config: &EngineConfig) -> Result<EngineHandle, StartError> {
        let limits = limits(&shape, config)?;
        let device = device::open(config.device).map_err(StartError::Model)?;
        let forward = Forward::new(model, &shape, config.dtype.kind(), device);
        let sampler = Sampler::new(shape.vocabulary as usize, never);
        let shared = Arc::new(Shared {
            model: shape,
            limits,
            next_id: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            generated_tokens: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            alive: AtomicBool::new(true),
        });
        let (commands, receiver) = mpsc::channel();
        let worker = Worker::new(forward, sampler, receiver, shared.clone());
        std::thread::Builder::new().name("engine".to_owned()).spawn(move || worker.run())?;
        Ok(EngineHandle { commands, shared })
    }
}

/// Below this many parameters a step is too short to share: waking threads costs more than it saves.
const SHARED_FROM_PARAMETERS: u64 = 16_000_000;

fn threads(shape: &ModelConfig) -> usize {
    match Model::parameter_count(shape) < SHARED_FROM_PARAMETERS {
        true => 1,
        false => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
    }
}

#[cfg(test)]
mod tests;
