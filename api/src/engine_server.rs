//! `lathe engine`: one replica of a model behind `POST /generate`.
//!
//! Speaks token ids only (see [`crate::generation::wire`]). One thread owns the model; handlers hold
//! a channel. Every request needs the engine's own bearer secret, which the runner passes in the
//! environment. When its client goes, a sequence stops within one step. Readiness is reported on
//! file descriptor 3, as a worker does.

use std::{convert::Infallible, fs::File, io::Write, os::fd::FromRawFd, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use lathe_model::engine::{
    Engine, EngineConfig, EngineHandle, Event, Finish, Generation, Refusal, Sampled, StartError, SubmitError, Ticket,
};
use subtle::ConstantTimeEq;
use tokio::sync::mpsc;

use crate::{
    config::EngineArgs,
    generation::wire::{EngineEvent, FinishReason, GenerateRequest, TokenLogprob},
};

/// Environment variable with the bearer secret.
pub const SECRET_VARIABLE: &str = "LATHE_ENGINE_SECRET";

#[derive(Debug, thiserror::Error)]
pub enum EngineServerError {
    #[error("{SECRET_VARIABLE} is not set: a runner starts engines, not a person")]
    NoSecret,
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the engine cannot serve: {0}")]
    Io(#[from] std::io::Error),
    #[error("the engine failed; its log says why")]
    Failed,
}

#[derive(Clone)]
struct EngineState {
    handle: EngineHandle,
    secret: Arc<str>,
}

/// Loads the model, reports readiness, serves until `shutdown` or until the engine fails.
pub async fn run(args: EngineArgs, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), EngineServerError> {
    let secret: Arc<str> = std::env::var(SECRET_VARIABLE).map_err(|_| EngineServerError::NoSecret)?.into();
    let config = EngineConfig { deterministic_decode: args.deterministic_decode, ..EngineConfig::default() };
    let memory_bytes = config.cache_bytes;
    let handle =
        tokio::task::spawn_blocking(move || Engine::start(&args.model, config)).await.map_err(std::io::Error::other)??;
    let listener = tokio::net::TcpListener::bind(args.listen).await?;
    let address = listener.local_addr()?;
    let router = Router::new()
        .route("/generate", post(generate))
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(EngineState { handle: handle.clone(), secret });
    report(&serde_json::json!({"ready": {"address": address.to_string(), "memory_bytes": memory_bytes}}))?;
    tokio::select! {
        () = shutdown => Ok(()),
        served = axum::serve(listener, router).into_future() => Ok(served?),
        () = failed(handle) => Err(EngineServerError::Failed),
    }
}

/// Resolves once the engine's thread has ended, whereupon its runner starts another process.
async fn failed(handle: EngineHandle) {
    while handle.is_alive() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn report(value: &serde_json::Value) -> std::io::Result<()> {
    // SAFETY: the runner opened this descriptor for the engine's report, and nothing else here uses
    // it. ManuallyDrop keeps it open: its end tells the runner that this process is gone.
    let mut channel = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(lathe_model::protocol::REPORT_FD) });
    writeln!(channel, "{value}")
}

fn authorised(headers: &HeaderMap, secret: &str) -> bool {
    let given =
        headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("Bearer "));
    given.is_some_and(|given| given.as_bytes().ct_eq(secret.as_bytes()).into())
}

async fn generate(State(state): State<EngineState>, headers: HeaderMap, body: Bytes) -> Response {
    if !authorised(&headers, &state.secret) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let request: GenerateRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    let first = request.prompt.first().copied();
    let (sender, receiver) = mpsc::unbounded_channel::<Event>();
    let generation = Generation {
        prompt_logprobs: request.prompt_logprobs.then(|| usize::try_from(request.sampling.logprobs.unwrap_or(0)).unwrap_or(0)),
        prompt: request.prompt,
        sampling: request.sampling,
        stop_tokens: request.stop_tokens,
    };
    match state.handle.submit(generation, Box::new(move |event| sender.send(event).is_ok())) {
        Ok(ticket) => stream(Sequence { receiver, first, _ticket: ticket }),
        Err(SubmitError::Refused(Refusal::QueueFull { .. })) => StatusCode::TOO_MANY_REQUESTS.into_response(),
        Err(SubmitError::Stopped) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

/// A sequence as its answer's body holds it: dropped with the connection, which cancels it.
struct Sequence {
    receiver: mpsc::UnboundedReceiver<Event>,
    /// The prompt's first token, which no score stands for.
    first: Option<u32>,
    _ticket: Ticket,
}

fn stream(sequence: Sequence) -> Response {
    let lines = futures_util::stream::unfold(sequence, |mut sequence| async move {
        let mut events = Vec::new();
        // Whatever has gathered since the last write goes out in one.
        if sequence.receiver.recv_many(&mut events, 64).await == 0 {
            return None;
        }
        let lines: String = events
            .into_iter()
            .filter_map(|event| serde_json::to_string(&on_wire(event, sequence.first)).ok())
            .flat_map(|line| [line, "\n".into()])
            .collect();
        Some((Ok::<_, Infallible>(lines), sequence))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn on_wire(event: Event, first: Option<u32>) -> EngineEvent {
    match event {
        Event::Prompt(scores) => {
            let first = first.map(|token| TokenLogprob { token, logprob: None, top: Vec::new() });
            EngineEvent::Prompt(first.into_iter().chain(scores.into_iter().map(scored)).collect())
        }
        Event::Token(sampled) => EngineEvent::Token(scored(sampled)),
        Event::Finished { reason: Finish::Error, .. } => EngineEvent::Failed { message: "the engine failed".into() },
        Event::Finished { reason: Finish::Stop, .. } => EngineEvent::Finished { reason: FinishReason::Stop },
        Event::Finished { reason: Finish::Length, .. } => EngineEvent::Finished { reason: FinishReason::Length },
        Event::Finished { reason: Finish::Cancelled, .. } => EngineEvent::Finished { reason: FinishReason::Cancelled },
    }
}

fn scored(sampled: Sampled) -> TokenLogprob {
    TokenLogprob { token: sampled.token, logprob: sampled.logprob, top: sampled.top }
}
