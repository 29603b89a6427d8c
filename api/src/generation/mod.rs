//! From a prompt's token ids to text pieces: what completions and chat share.
//!
//! A request becomes a [`Prompt`] and [`Settings`] once, at the route. [`start`] finds the model's
//! replica and begins one sequence a choice; each [`Choice`] turns token ids into text, cuts at
//! stop strings (across token borders) and counts usage. Nothing here knows OpenAI's shapes.

pub mod client;
pub mod models;
pub mod replicas;
pub mod wire;

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt};
use lathe_model::{
    config::Sampling,
    engine::stop::StopStrings,
    tokenizer::{Detokenizer, Tokenizer},
};

use self::{
    models::Model,
    wire::{EngineEvent, FinishReason, GenerateRequest, TokenLogprob},
};
use crate::{problem::ApiError, state::AppState};

/// One prompt, ready for the engine.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// Report the prompt's own log probabilities (`echo` with `logprobs`).
    pub score: bool,
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub sampling: Sampling,
    pub stop: Vec<String>,
    /// Choices a prompt; choice i draws from seed + i.
    pub n: u32,
}

/// A piece of a choice as it grows.
#[derive(Clone, Debug)]
pub enum Piece {
    /// The prompt's tokens with their log probabilities, first.
    Scored(Vec<TokenLogprob>),
    /// Text that no stop string can take back, with the tokens that made it since the last piece.
    Text {
        text: String,
        tokens: Vec<TokenLogprob>,
    },
    Finished {
        reason: FinishReason,
        completion_tokens: usize,
    },
    Failed {
        message: String,
    },
}

/// One sequence under way.
pub struct Choice {
    pub index: usize,
    pub prompt_tokens: usize,
    pub pieces: Pin<Box<dyn Stream<Item = Piece> + Send>>,
}

/// Begins `n` sequences for every prompt.
///
/// # Errors
/// 400 for a prompt that does not fit the context, 429 and 503 as the engine and the runners stand.
pub async fn start(
    state: &AppState,
    model: &Arc<Model>,
    prompts: &[Prompt],
    settings: &Settings,
) -> Result<Vec<Choice>, ApiError> {
    for prompt in prompts {
        fits(model, prompt, settings)?;
    }
    let endpoint = replicas::endpoint(&state.db, model).await?;
    replicas::touch(&state.db, &endpoint.replica_id).await?;
    let mut choices = Vec::new();
    for prompt in prompts {
        for choice in 0..settings.n {
            let mut sampling = settings.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(u64::from(choice));
            let room = model.config.context - prompt.ids.len() as i64;
            sampling.max_tokens = sampling.max_tokens.min(room.max(0));
            let request = GenerateRequest {
                prompt: prompt.ids.clone(),
                sampling,
                stop_tokens: vec![model.tokenizer.roles().eos],
                prompt_logprobs: prompt.score,
            };
            let events = client::generate(&state.http, &endpoint, &request).await?;
            choices.push(Choice {
                index: choices.len(),
                prompt_tokens: prompt.ids.len(),
                pieces: Box::pin(pieces(model.tokenizer.clone(), settings.stop.clone(), events)),
            });
        }
    }
    Ok(choices)
}

fn fits(model: &Model, prompt: &Prompt, settings: &Settings) -> Result<(), ApiError> {
    let (length, context) = (prompt.ids.len() as i64, model.config.context);
    let wanted = i64::from(settings.sampling.max_tokens > 0);
    if length + wanted > context {
        return Err(ApiError::unprocessable(
            "context_length_exceeded",
            "",
            format!("The prompt has {length} tokens, and this model's context is {context}: shorten the prompt."),
        ));
    }
    if let Some(id) = prompt.ids.iter().find(|id| i64::from(**id) >= model.config.vocabulary) {
        let message = format!("Token id {id} is outside this model's vocabulary of {}.", model.config.vocabulary);
        return Err(ApiError::unprocessable("unknown_token", "prompt", message));
    }
    Ok(())
}

/// Engine events → text pieces. Ends after the first `Finished` or `Failed`, which also cancels a
/// sequence that met a stop string.
fn pieces(
    tokenizer: Arc<Tokenizer>,
    stop: Vec<String>,
    events: impl Stream<Item = EngineEvent> + Send,
) -> impl Stream<Item = Piece> + Send {
    struct Growth<S> {
        events: Pin<Box<S>>,
        text: Text,
        pending: Vec<Piece>,
        ended: bool,
    }
    let growth = Growth { events: Box::pin(events), text: Text::new(tokenizer, stop), pending: Vec::new(), ended: false };
    futures_util::stream::unfold(growth, |mut growth| async move {
        loop {
            if !growth.pending.is_empty() {
                let piece = growth.pending.remove(0);
                return Some((piece, growth));
            }
            if growth.ended {
                return None;
            }
            let event = growth.events.next().await;
            growth.ended = !matches!(event, Some(EngineEvent::Prompt(_) | EngineEvent::Token(_)));
            growth.pending = match event {
                Some(EngineEvent::Prompt(tokens)) => vec![Piece::Scored(tokens)],
                Some(EngineEvent::Token(token)) => {
                    let (pieces, stopped) = growth.text.push(token);
                    growth.ended = stopped;
                    pieces
                }
                Some(EngineEvent::Finished { reason }) => growth.text.finish(reason),
                Some(EngineEvent::Failed { message }) => vec![Piece::Failed { message }],
                None => vec![Piece::Failed { message: "the engine ended before the answer did".into() }],
            };
        }
    })
}

/// Bytes to characters, and stop strings held back until it is certain.
struct Text {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stop: StopStrings,
    held: Vec<TokenLogprob>,
    completion_tokens: usize,
}

impl Text {
    fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>) -> Text {
        Text {
            tokenizer,
            detokenizer: Detokenizer::default(),
            stop: StopStrings::new(stop),
            held: Vec::new(),
            completion_tokens: 0,
        }
    }

    /// The pieces that the token releases, and whether a stop string ended the choice.
    fn push(&mut self, token: TokenLogprob) -> (Vec<Piece>, bool) {
        self.completion_tokens += 1;
        let characters = self.detokenizer.push(&self.tokenizer, token.token);
        self.held.push(token);
        let text = self.stop.push(&characters);
        let mut pieces = self.release(text);
        let stopped = self.stop.stopped();
        if stopped {
            pieces.push(Piece::Finished { reason: FinishReason::Stop, completion_tokens: self.completion_tokens });
        }
        (pieces, stopped)
    }

    fn finish(&mut self, mut reason: FinishReason) -> Vec<Piece> {
        let rest = self.detokenizer.finish();
        let mut text = self.stop.push(&rest);
        if self.stop.stopped() {
            reason = FinishReason::Stop;
        } else {
            text.push_str(&self.stop.finish());
        }
        let mut pieces = if text.is_empty() && self.held.is_empty() { Vec::new() } else { self.release_all(text) };
        pieces.push(Piece::Finished { reason, completion_tokens: self.completion_tokens });
        pieces
    }

    fn release(&mut self, text: String) -> Vec<Piece> {
        if text.is_empty() { Vec::new() } else { self.release_all(text) }
    }

    fn release_all(&mut self, text: String) -> Vec<Piece> {
        vec![Piece::Text { text, tokens: std::mem::take(&mut self.held) }]
    }
}
