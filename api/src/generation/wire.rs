//! What passes between the API and an engine: token ids over HTTP, one JSON value a line.
//!
//! `POST /generate` takes a [`GenerateRequest`] and answers a stream of [`EngineEvent`] lines, the
//! last of which is [`EngineEvent::Finished`], [`EngineEvent::Unloaded`] or [`EngineEvent::Failed`].
//! An empty line every [`KEEP_ALIVE`] says that the engine lives while a sequence waits. Text never
//! crosses here: tokenizers, templates and stop strings live on the API's side. Closing the
//! connection cancels the sequence within one step.

use std::time::Duration;

use lathe_model::{config::Sampling, engine::Sampled};
use serde::{Deserialize, Serialize};

/// A stream is never silent for longer than this while its engine lives.
pub const KEEP_ALIVE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateRequest {
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    /// A token of these ends the sequence and is not reported.
    pub stop_tokens: Vec<u32>,
    /// Also report the log probability of every prompt token (evaluation harnesses score with it).
    pub prompt_logprobs: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The end token, a stop token or a stop string.
    Stop,
    /// `max_tokens`, or the model's context.
    Length,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineEvent {
    Prompt(Vec<Sampled>),
    Token(Sampled),
    Finished {
        reason: FinishReason,
    },
    /// The engine was told to stop.
    Unloaded,
    Failed {
        message: String,
    },
}
