//! From a prompt's token ids to text pieces: what completions and chat share.
//!
//! A request becomes [`Prompt`]s and [`Settings`] once, at the route. [`start`] finds the model's
//! replica and begins one sequence a choice; each [`Choice`] turns token ids into text, cuts at
//! stop strings (across token borders) and counts usage. [`collect`] waits for the whole of it,
//! [`steps`] tells it as it comes. Nothing here knows OpenAI's shapes.

pub mod client;
pub mod models;
pub mod replicas;
pub mod text;
pub mod wire;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, TryStreamExt};
use lathe_jobs::waiting::patient;
use lathe_model::{config::Sampling, tokenizer::Tokenizer};
use tokio::time::Instant;

use self::{
    client::NotStarted,
    models::Model,
    replicas::Endpoint,
    text::{Spoken, Text},
    wire::{EngineEvent, FinishReason, GenerateRequest},
};
use crate::{problem::ApiError, state::AppState};

/// Sequences of one request that are begun at a time.
const BEGUN_TOGETHER: usize = 16;

/// Between two attempts to reach an engine that is gone.
const NEXT_ATTEMPT: Duration = Duration::from_millis(100);

/// One prompt, ready for the engine.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// Report the prompt's own log probabilities (`echo` with `logprobs`).
    pub score: bool,
    /// The field that it comes from, for refusals.
    pub param: String,
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub sampling: Sampling,
    pub stop: Vec<String>,
    /// Choices a prompt; choice i draws from seed + i.
    pub n: u32,
}

/// A piece of a choice as it grows.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// The prompt's tokens with their log probabilities, first.
    Scored(Vec<Spoken>),
    /// Text that no stop string can take back, with the tokens that end in it.
    Text {
        text: String,
        tokens: Vec<Spoken>,
    },
    Finished {
        reason: FinishReason,
        completion_tokens: usize,
    },
}

/// One sequence under way.
pub struct Choice {
    pub index: usize,
    /// Ends after the first [`Piece::Finished`] or error.
    pub pieces: Pin<Box<dyn Stream<Item = Result<Piece, ApiError>> + Send>>,
}

/// Begins `n` sequences for every prompt, in order: the choices of the first prompt come first.
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
    let patience = Instant::now() + state.config.loading_patience;
    loop {
        let endpoint = replicas::endpoint(&state.db, model, patience).await?;
        replicas::touch(&state.db, &endpoint.replica_id).await?;
        match begin(state, &endpoint, model, prompts, settings).await {
            Ok(choices) => return Ok(choices),
            Err(NotStarted::Refused(error)) => return Err(error),
            // Nothing was said yet, so the next engine may say it all.
            Err(NotStarted::Gone(reason)) => {
                tracing::warn!(replica = endpoint.replica_id, reason, "engine.unreachable");
                if Instant::now() >= patience {
                    let message = "The model's engine is restarting; try again in a few seconds.";
                    return Err(ApiError::unavailable("model_loading", 2, message));
                }
                tokio::time::sleep(NEXT_ATTEMPT).await;
            }
        }
    }
}

async fn begin(
    state: &AppState,
    endpoint: &Endpoint,
    model: &Arc<Model>,
    prompts: &[Prompt],
    settings: &Settings,
) -> Result<Vec<Choice>, NotStarted> {
    let end = Deadline { at: Instant::now() + state.config.generation_deadline, after: state.config.generation_deadline };
    let mut sequences = Vec::new();
    for prompt in prompts {
        for choice in 0..settings.n {
            let (index, request) = (sequences.len(), request(model, prompt, settings, choice));
            sequences.push(async move {
                let events = client::generate(&state.http, endpoint, &request).await?;
                let text = Text::new(model.tokenizer.clone(), settings.stop.clone());
                Ok(Choice { index, pieces: Box::pin(pieces(model.tokenizer.clone(), text, events, end)) })
            });
        }
    }
    patient(futures_util::stream::iter(sequences).buffered(BEGUN_TOGETHER).try_collect()).await
}

fn request(model: &Model, prompt: &Prompt, settings: &Settings, choice: u32) -> GenerateRequest {
    let mut sampling = settings.sampling.clone();
    sampling.seed = sampling.seed.wrapping_add(u64::from(choice));
    let room = model.config.context - prompt.ids.len() as i64;
    sampling.max_tokens = sampling.max_tokens.min(room.max(0));
    GenerateRequest {
        prompt: prompt.ids.clone(),
        sampling,
        stop_tokens: vec![model.tokenizer.roles().eos],
        prompt_logprobs: prompt.score,
    }
}

fn fits(model: &Model, prompt: &Prompt, settings: &Settings) -> Result<(), ApiError> {
    let (length, context) = (prompt.ids.len() as i64, model.config.context);
    let wanted = i64::from(settings.sampling.max_tokens > 0);
    if length + wanted > context {
        let room = if wanted > 0 { ", which has to hold at least one token of an answer too" } else { "" };
        let message =
            format!("The prompt has {length} tokens, and this model's context is {context} tokens{room}: shorten the prompt.");
        return Err(ApiError::bad_request(&prompt.param, message).with_code("context_length_exceeded"));
    }
    if let Some(index) = prompt.ids.iter().position(|&id| i64::from(id) >= model.config.vocabulary) {
        let (id, vocabulary) = (prompt.ids[index], model.config.vocabulary);
        let message = format!("Token id {id} is outside this model's vocabulary of {vocabulary}.");
        return Err(ApiError::unprocessable("unknown_token", format!("{}[{index}]", prompt.param), message));
    }
    Ok(())
}

/// When an answer must have ended.
#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    after: Duration,
}

impl Deadline {
    fn missed(self) -> ApiError {
        ApiError::generation_deadline(self.after)
    }
}

/// Engine events → text pieces. Ends after the first `Finished` or error, which also cancels a
/// sequence that met a stop string.
fn pieces(
    tokenizer: Arc<Tokenizer>,
    text: Text,
    events: impl Stream<Item = EngineEvent> + Send,
    deadline: Deadline,
) -> impl Stream<Item = Result<Piece, ApiError>> + Send {
    struct Growth<S> {
        events: Pin<Box<S>>,
        text: Text,
        pending: std::collections::VecDeque<Piece>,
        ended: bool,
    }
    let growth = Growth { events: Box::pin(events), text, pending: Default::default(), ended: false };
    futures_util::stream::unfold((growth, tokenizer), move |(mut growth, tokenizer)| async move {
        loop {
            if let Some(piece) = growth.pending.pop_front() {
                return Some((Ok(piece), (growth, tokenizer)));
            }
            if growth.ended {
                return None;
            }
            let failure = match tokio::time::timeout_at(deadline.at, growth.events.next()).await {
                Ok(Some(EngineEvent::Prompt(tokens))) => {
                    growth.pending.push_back(Piece::Scored(text::placed(&tokenizer, tokens)));
                    continue;
                }
                Ok(Some(EngineEvent::Token(token))) => {
                    let (pieces, stopped) = growth.text.push(token);
                    growth.pending.extend(pieces);
                    growth.ended = stopped;
                    continue;
                }
                Ok(Some(EngineEvent::Finished { reason })) => {
                    growth.pending.extend(growth.text.finish(reason));
                    growth.ended = true;
                    continue;
                }
                Ok(Some(EngineEvent::Unloaded)) => {
                    let message = "The model was unloaded while it answered: it was deleted, or its server is being stopped.";
                    ApiError::unavailable("model_unloaded", 2, message)
                }
                Ok(Some(EngineEvent::Failed { message })) => broken(&message),
                Ok(None) => broken("it ended before the answer did"),
                Err(_) => deadline.missed(),
            };
            growth.ended = true;
            return Some((Err(failure), (growth, tokenizer)));
        }
    })
}

fn broken(reason: &str) -> ApiError {
    tracing::warn!(reason, "engine.broke");
    ApiError::unavailable("engine_error", 2, "The model's engine failed before the answer was finished; try again.")
}

/// A choice from its beginning to its end.
pub struct Ended {
    pub index: usize,
    /// The prompt's tokens, where it was to be scored.
    pub prompt: Vec<Spoken>,
    pub text: String,
    pub tokens: Vec<Spoken>,
    pub reason: FinishReason,
    pub completion_tokens: usize,
}

/// Waits for every choice.
///
/// # Errors
/// That of the first choice that fails; the others are cancelled.
pub async fn collect(choices: Vec<Choice>) -> Result<Vec<Ended>, ApiError> {
    let ended = futures_util::future::try_join_all(choices.into_iter().map(|mut choice| async move {
        let mut ended = Ended {
            index: choice.index,
            prompt: Vec::new(),
            text: String::new(),
            tokens: Vec::new(),
            reason: FinishReason::Stop,
            completion_tokens: 0,
        };
        while let Some(piece) = choice.pieces.next().await {
            match piece? {
                Piece::Scored(tokens) => ended.prompt = tokens,
                Piece::Text { text, tokens } => {
                    ended.text.push_str(&text);
                    ended.tokens.extend(tokens);
                }
                Piece::Finished { reason, completion_tokens } => {
                    (ended.reason, ended.completion_tokens) = (reason, completion_tokens)
                }
            }
        }
        Ok(ended)
    }));
    patient(ended).await
}

/// What happens next in an answer of several choices.
#[derive(Debug)]
pub enum Step {
    /// Every choice opens before any grows.
    Opened {
        index: usize,
    },
    Grew {
        index: usize,
        piece: Piece,
    },
    /// Every choice has finished.
    Ended {
        completion_tokens: usize,
    },
}

/// The choices' growth, interleaved as it comes. Ends after the first error, which cancels the rest.
pub fn steps(choices: Vec<Choice>) -> impl Stream<Item = Result<Step, ApiError>> + Send + 'static {
    let opened: Vec<_> = choices.iter().map(|choice| Ok(Step::Opened { index: choice.index })).collect();
    let growth = futures_util::stream::select_all(
        choices.into_iter().map(|choice| choice.pieces.map_ok(move |piece| (choice.index, piece)).boxed()),
    );
    let growth = futures_util::stream::unfold((Some(growth), 0), |(growth, mut total)| async move {
        let mut growth = growth?;
        Some(match growth.next().await {
            Some(Ok((index, piece))) => {
                if let Piece::Finished { completion_tokens, .. } = &piece {
                    total += completion_tokens;
                }
                (Ok(Step::Grew { index, piece }), (Some(growth), total))
            }
            Some(Err(error)) => (Err(error), (None, total)),
            None => (Ok(Step::Ended { completion_tokens: total }), (None, total)),
        })
    });
    futures_util::stream::iter(opened).chain(growth)
}
