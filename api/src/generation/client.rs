//! Talks to one engine: sends a request, reads its events.

use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::io::AsyncBufReadExt;
use tokio_util::io::StreamReader;

use super::{
    replicas::Endpoint,
    wire::{EngineEvent, GenerateRequest},
};
use crate::problem::ApiError;

/// Starts one sequence. Dropping the stream cancels it.
///
/// # Errors
/// 429 when the engine's queue is full, 503 when the engine is gone.
pub async fn generate(
    http: &reqwest::Client,
    endpoint: &Endpoint,
    request: &GenerateRequest,
) -> Result<impl Stream<Item = EngineEvent> + Send + 'static, ApiError> {
    let response = http
        .post(format!("http://{}/generate", endpoint.address))
        .bearer_auth(&endpoint.secret)
        .json(request)
        .send()
        .await
        .map_err(|error| {
            tracing::warn!(replica = endpoint.replica_id, %error, "engine.unreachable");
            ApiError::unavailable("model_loading", 2, "The model's engine is restarting; try again in a few seconds.")
        })?;
    match response.status().as_u16() {
        200 => {}
        429 => return Err(ApiError::rate_limited("Too many requests wait for this model; try again in a few seconds.")),
        status => {
            let body = response.text().await.unwrap_or_default();
            tracing::error!(replica = endpoint.replica_id, status, body, "engine.refused");
            return Err(ApiError::unavailable("engine_error", 2, "The model's engine refused the request; try again."));
        }
    }
    let bytes = response.bytes_stream().map_err(std::io::Error::other);
    let lines = tokio_stream::wrappers::LinesStream::new(StreamReader::new(bytes).lines());
    Ok(lines.map(|line| match line {
        Ok(line) => serde_json::from_str(&line)
            .unwrap_or_else(|error| EngineEvent::Failed { message: format!("the engine's answer could not be read: {error}") }),
        Err(error) => EngineEvent::Failed { message: format!("the engine's connection broke: {error}") },
    }))
}
