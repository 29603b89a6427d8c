//! `lathe engine`: one replica of a model behind `POST /generate`.
//!
//! Speaks token ids only (see [`crate::generation::wire`]). One thread owns the model; handlers hold
//! a channel. Every request needs the engine's own bearer secret, which the runner passes in the
//! environment. When its client goes, a sequence stops within one step. `GET /load` says how busy
//! the engine is. On file descriptor 3, as a worker does, it reports that it is ready and then, once
//! a second, that it is alive; an engine that hangs reports no more, and its runner kills it.

use std::{
    convert::Infallible,
    fs::File,
    io::Write,
    os::fd::FromRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use lathe_jobs::trace::{KeyValue, Span, SpanKind};
use lathe_model::{
    engine::{
        Engine, EngineConfig, EngineHandle, Event, Finish, Generation, Load, Refusal, Sampled, StartError, SubmitError, Ticket,
    },
    protocol::REPORT_FD,
};
use subtle::ConstantTimeEq;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    config::EngineArgs,
    generation::wire::{EngineEvent, FinishReason, GenerateRequest, KEEP_ALIVE},
    request_trace,
};

/// Environment variable with the bearer secret.
pub const SECRET_VARIABLE: &str = "LATHE_ENGINE_SECRET";

/// How often a living engine says so.
const BEAT: Duration = Duration::from_secs(1);

/// A step that takes longer than this will not end.
const LONGEST_STEP: Duration = Duration::from_secs(120);

/// How long answers that were cut off may take to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(2);

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
    let budget = config.clone();
    let handle =
        tokio::task::spawn_blocking(move || Engine::start(&args.model, config)).await.map_err(std::io::Error::other)??;
    let listener = tokio::net::TcpListener::bind(args.listen).await?;
    let address = listener.local_addr()?.to_string();
    let memory_bytes = budget.reserved_bytes(handle.model());
    report(&serde_json::json!({"ready": {"address": address, "memory_bytes": memory_bytes}}))?;
    let stop = CancellationToken::new();
    let serving = axum::serve(listener, router(handle.clone(), secret)).with_graceful_shutdown(stop.clone().cancelled_owned());
    let mut serving = std::pin::pin!(serving.into_future());
    tokio::select! {
        () = shutdown => {}
        served = &mut serving => return Ok(served?),
        () = watch(&handle) => return Err(EngineServerError::Failed),
    }
    // Every open sequence ends as cancelled, which its stream says before it closes.
    handle.stop();
    stop.cancel();
    if tokio::time::timeout(LAST_WORDS, serving).await.is_err() {
        tracing::warn!("answers that were still open were dropped");
    }
    Ok(())
}

fn router(handle: EngineHandle, secret: Arc<str>) -> Router {
    let state = EngineState { handle, secret };
    Router::new()
        .route("/generate", post(generate))
        .route("/load", get(load))
        .route_layer(middleware::from_fn_with_state(state.clone(), authorised))
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(state)
}

/// Reports every second that the engine lives. Resolves once its thread has ended or hangs, whereupon
/// its runner starts another process.
async fn watch(handle: &EngineHandle) {
    let mut beat = tokio::time::interval(BEAT);
    let (mut steps, mut since) = (0, Instant::now());
    while handle.is_alive() {
        beat.tick().await;
        let load = handle.load();
        if load.open == 0 || load.steps != steps {
            (steps, since) = (load.steps, Instant::now());
        }
        if since.elapsed() > LONGEST_STEP {
            tracing::error!(load.open, "a step does not end");
            return;
        }
        // A runner that no longer reads is gone, and takes its engines along.
        let _ = report(&serde_json::json!({"alive": {"open": load.open}}));
    }
}

fn report(value: &serde_json::Value) -> std::io::Result<()> {
    // SAFETY: the runner opened this descriptor for the engine's report, and nothing else here uses
    // it. ManuallyDrop keeps it open: its end tells the runner that this process is gone.
    let mut channel = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(REPORT_FD) });
    channel.write_all(format!("{value}\n").as_bytes())
}

async fn authorised(State(state): State<EngineState>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    match given.as_bytes().ct_eq(state.secret.as_bytes()).into() {
        true => next.run(request).await,
        false => StatusCode::UNAUTHORIZED.into_response(),
    }
}

async fn load(State(state): State<EngineState>) -> Json<Load> {
    Json(state.handle.load())
}

async fn generate(State(state): State<EngineState>, headers: HeaderMap, body: Bytes) -> Response {
    let traced = Traced::begin(&headers);
    let refused = |status: StatusCode, why: String| {
        request_trace::answered(&traced.span, status);
        (status, why).into_response()
    };
    let request: GenerateRequest = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(error) => return refused(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let first = request.prompt.first().copied();
    traced.span.set("gen_ai.usage.input_tokens", i64::try_from(request.prompt.len()).unwrap_or(i64::MAX));
    let (sender, receiver) = mpsc::unbounded_channel::<Event>();
    let generation = Generation {
        prompt_logprobs: request.prompt_logprobs.then(|| usize::try_from(request.sampling.logprobs.unwrap_or(0)).unwrap_or(0)),
        prompt: request.prompt,
        sampling: request.sampling,
        stop_tokens: request.stop_tokens,
    };
    match state.handle.submit(generation, Box::new(move |event| sender.send(event).is_ok())) {
        Ok(ticket) => {
            request_trace::answered(&traced.span, StatusCode::OK);
            stream(Sequence { receiver, first, traced, _ticket: ticket })
        }
        Err(SubmitError::Refused(Refusal::QueueFull { .. })) => refused(StatusCode::TOO_MANY_REQUESTS, String::new()),
        Err(SubmitError::Stopped) => refused(StatusCode::SERVICE_UNAVAILABLE, String::new()),
        Err(error) => refused(StatusCode::BAD_REQUEST, error.to_string()),
    }
}

/// A sequence's span, until its answer is dropped.
struct Traced {
    span: Span,
    /// That were generated.
    tokens: i64,
}

impl Traced {
    fn begin(headers: &HeaderMap) -> Traced {
        let span = Span::begin(SpanKind::Server, "POST /generate", &request_trace::parent(headers), || {
            vec![
                KeyValue::new("http.request.method", "POST"),
                KeyValue::new("http.route", "/generate"),
                KeyValue::new("gen_ai.operation.name", "text_completion"),
            ]
        });
        Traced { span, tokens: 0 }
    }

    fn hear(&mut self, events: &[Event]) {
        for event in events {
            match event {
                Event::Token(_) => {
                    if self.tokens == 0 {
                        self.span.mark("first token");
                    }
                    self.tokens += 1;
                }
                Event::Finished { reason: Finish::Error, .. } => self.span.fail("engine_failed"),
                Event::Prompt(_) | Event::Finished { .. } => {}
            }
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.span.set("gen_ai.usage.output_tokens", self.tokens);
    }
}

/// A sequence as its answer's body holds it: dropped with the connection, which cancels it.
struct Sequence {
    /// Holds at most as many events as the model's context has tokens.
    receiver: mpsc::UnboundedReceiver<Event>,
    /// The prompt's first token, which no score stands for.
    first: Option<u32>,
    traced: Traced,
    _ticket: Ticket,
}

fn stream(sequence: Sequence) -> Response {
    let lines = futures_util::stream::unfold(sequence, |mut sequence| async move {
        let mut events = Vec::new();
        // Whatever has gathered since the last write goes out in one.
        let lines = match tokio::time::timeout(KEEP_ALIVE, sequence.receiver.recv_many(&mut events, 64)).await {
            Ok(0) => return None,
            Ok(_) => {
                sequence.traced.hear(&events);
                lines(events, sequence.first)
            }
            // Waiting for its turn: an empty line says that the engine lives.
            Err(_) => "\n".to_owned(),
        };
        Some((Ok::<_, Infallible>(lines), sequence))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn lines(events: Vec<Event>, first: Option<u32>) -> String {
    let mut lines = String::new();
    for event in events {
        // Numbers and lists of them always have a JSON form.
        if let Ok(line) = serde_json::to_string(&on_wire(event, first)) {
            lines.push_str(&line);
            lines.push('\n');
        }
    }
    lines
}

fn on_wire(event: Event, first: Option<u32>) -> EngineEvent {
    match event {
        Event::Prompt(scores) => {
            let first = first.map(|token| Sampled { token, logprob: None, top: Vec::new() });
            EngineEvent::Prompt(first.into_iter().chain(scores).collect())
        }
        Event::Token(sampled) => EngineEvent::Token(sampled),
        Event::Finished { reason: Finish::Error, .. } => EngineEvent::Failed { message: "the engine failed".into() },
        Event::Finished { reason: Finish::Stop, .. } => EngineEvent::Finished { reason: FinishReason::Stop },
        Event::Finished { reason: Finish::Length, .. } => EngineEvent::Finished { reason: FinishReason::Length },
        Event::Finished { reason: Finish::Cancelled, .. } => EngineEvent::Unloaded,
    }
}
