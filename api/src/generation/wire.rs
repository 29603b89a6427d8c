//! What passes between the API and an engine: token ids over HTTP, one JSON value a line.
//!
//! `POST /generate` takes a [`GenerateRequest`] and answers a stream of [`EngineEvent`] lines, the
//! last of which is [`EngineEvent::Finished`] or [`EngineEvent::Failed`]. Text never crosses here:
//! tokenizers, templates and stop strings live on the API's side. Closing the connection cancels
//! the sequence within one step.

use lathe_model::config::Sampling;
use serde::{Deserialize, Serialize};

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

/// A token with its log probability and the alternatives that were asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    pub token: u32,
    /// Natural logarithm. `None` for a prompt's first token, which nothing predicts, and where no
    /// log probabilities were asked for.
    pub logprob: Option<f32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<(u32, f32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The end token or a stop token.
    Stop,
    /// `max_tokens`, or the model's context.
    Length,
    Cancelled,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineEvent {
    Prompt(Vec<TokenLogprob>),
    Token(TokenLogprob),
    Finished { reason: FinishReason },
    Failed { message: String },
}
