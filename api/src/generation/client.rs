//! Talks to one engine: sends a request, reads its events.

use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use lathe_jobs::trace;
use tokio::{io::AsyncBufReadExt, time::timeout};
use tokio_util::io::StreamReader;

use super::{
    replicas::Endpoint,
    wire::{EngineEvent, GenerateRequest, KEEP_ALIVE},
};
use crate::problem::ApiError;

/// A living engine begins its answer at once, however busy it is.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// A stream that is silent for so long comes from no living engine.
const SILENCE: Duration = KEEP_ALIVE.saturating_mul(4);

/// Why no sequence was started.
#[derive(Debug)]
pub enum NotStarted {
    /// The engine is dead or hangs: another may be there soon.
    Gone(String),
    Refused(ApiError),
}

/// Starts one sequence. Dropping the stream cancels it.
pub async fn generate(
    http: &reqwest::Client,
    endpoint: &Endpoint,
    request: &GenerateRequest,
) -> Result<impl Stream<Item = EngineEvent> + Send + 'static, NotStarted> {
    let mut asked = http.post(format!("http://{}/generate", endpoint.address)).bearer_auth(&endpoint.secret).json(request);
    for (name, value) in trace::carried(&trace::Context::current()) {
        asked = asked.header(name, value);
    }
    let response = match timeout(FIRST_WORD, asked.send()).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => return Err(NotStarted::Gone(error.to_string())),
        Err(_) => return Err(NotStarted::Gone("it does not answer".into())),
    };
    match response.status().as_u16() {
        200 => {}
        429 => {
            let message = "Too many requests wait for this model; try again in a few seconds.";
            return Err(NotStarted::Refused(ApiError::rate_limited(1, message)));
        }
        // Another process listens there by now, or it has just failed.
        401 | 503 => return Err(NotStarted::Gone(format!("it answered {}", response.status()))),
        status => {
            let body = response.text().await.unwrap_or_default();
            tracing::error!(replica = endpoint.replica_id, status, body, "engine.refused");
            let error = ApiError::unavailable("engine_error", 2, "The model's engine refused the request; try again.");
            return Err(NotStarted::Refused(error));
        }
    }
    let bytes = response.bytes_stream().map_err(std::io::Error::other);
    let lines = tokio_stream::wrappers::LinesStream::new(StreamReader::new(bytes).lines());
    Ok(events(lines))
}

/// Lines as events. Ends after the first failure.
fn events(
    lines: impl Stream<Item = std::io::Result<String>> + Send + Unpin + 'static,
) -> impl Stream<Item = EngineEvent> + Send + 'static {
    futures_util::stream::unfold(Some(lines), |lines| async move {
        let mut lines = lines?;
        let failure = loop {
            match timeout(SILENCE, lines.next()).await {
                Ok(Some(Ok(line))) if line.is_empty() => {}
                Ok(Some(Ok(line))) => match serde_json::from_str(&line) {
                    Ok(event) => return Some((event, Some(lines))),
                    Err(error) => break format!("its answer could not be read: {error}"),
                },
                Ok(Some(Err(error))) => break format!("its connection broke: {error}"),
                Ok(None) => return None,
                Err(_) => break "it has fallen silent".to_owned(),
            }
        };
        Some((EngineEvent::Failed { message: failure }, None))
    })
}
