//! Fields and shapes that completions and chat share.

use std::{convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::{Stream, StreamExt, TryFutureExt};
use lathe_model::config::Sampling;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    generation::{Choice, wire::FinishReason},
    problem::ApiError,
};

/// A string or up to four; the answer ends before the first that appears.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum StopStrings {
    One(StopString),
    Several(StopList),
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(min_length = 1, max_length = 1024)]
pub struct StopString(String);

#[derive(Debug, Deserialize, ToSchema)]
#[schema(max_items = 4)]
pub struct StopList(Vec<StopString>);

pub fn stop_strings(stop: Option<StopStrings>) -> Vec<String> {
    let strings = match stop {
        None => Vec::new(),
        Some(StopStrings::One(one)) => vec![one],
        Some(StopStrings::Several(several)) => several.0,
    };
    strings.into_iter().map(|stop| stop.0).collect()
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// A last chunk carries the usage of the whole answer.
    #[serde(default)]
    pub include_usage: bool,
}

#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

/// Sampling as a request gives it, its bounds already held against the schema.
pub struct SamplingFields {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub seed: Option<i64>,
    pub max_tokens: i64,
    pub logprobs: Option<i64>,
}

impl From<SamplingFields> for Sampling {
    fn from(fields: SamplingFields) -> Sampling {
        Sampling {
            temperature: fields.temperature.unwrap_or(1.0),
            top_p: fields.top_p.unwrap_or(1.0),
            top_k: fields.top_k.unwrap_or(0),
            // Any 64 bits will do for a seed, so a negative one keeps its bits.
            seed: fields.seed.map_or_else(rand::random, |seed| seed.cast_unsigned()),
            max_tokens: fields.max_tokens,
            logprobs: fields.logprobs,
        }
    }
}

/// 422 where `stream_options` stands without `stream`.
pub fn check_stream_options(stream: Option<bool>, options: Option<StreamOptions>) -> Result<(), ApiError> {
    if options.is_some() && stream != Some(true) {
        return Err(ApiError::unprocessable("contradiction", "stream_options", "`stream_options` needs `stream: true`."));
    }
    Ok(())
}

pub fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length | FinishReason::Cancelled => "length",
    }
}

pub fn unix_now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

/// Chunks as server-sent events, `[DONE]` last; a failure in mid-stream is an `error` object in
/// its place.
fn sse(chunks: impl Stream<Item = Result<serde_json::Value, ApiError>> + Send + 'static) -> Response {
    let events = chunks.map(|chunk| match chunk {
        Ok(chunk) => Event::default().data(chunk.to_string()),
        Err(error) => Event::default().data(serde_json::json!({"error": error.body.error}).to_string()),
    });
    let done = futures_util::stream::once(async { Event::default().data("[DONE]") });
    Sse::new(events.chain(done).map(Ok::<_, Infallible>)).keep_alive(KeepAlive::default()).into_response()
}

/// How long a stream's refusal may still be a plain HTTP status; later it is an event.
const PLAIN_REFUSAL: Duration = Duration::from_secs(1);

/// Streams what `chunks` makes of the choices once `started` has them. While the model loads,
/// comments keep the connection alive.
///
/// # Errors
/// Those of `started`, where they come at once.
pub async fn stream_when_started<S>(
    started: impl Future<Output = Result<Vec<Choice>, ApiError>> + Send + 'static,
    chunks: impl FnOnce(Vec<Choice>) -> S + Send + 'static,
) -> Result<Response, ApiError>
where
    S: Stream<Item = Result<serde_json::Value, ApiError>> + Send + 'static,
{
    let mut started = Box::pin(started);
    match tokio::time::timeout(PLAIN_REFUSAL, &mut started).await {
        Ok(choices) => Ok(sse(chunks(choices?))),
        Err(_) => Ok(sse(futures_util::stream::once(started.map_ok(chunks))
            .map(|started| match started {
                Ok(chunks) => chunks.left_stream(),
                Err(error) => futures_util::stream::iter([Err(error)]).right_stream(),
            })
            .flatten())),
    }
}
