//! Fields and shapes that completions and chat share, and how an answer becomes a response.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{Stream, StreamExt, TryFutureExt};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    generation::{self, Ended, Prompt, Settings, Step, models::Model, wire::FinishReason},
    problem::ApiError,
    state::AppState,
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

impl StopStrings {
    pub fn into_strings(self) -> Vec<String> {
        let strings = match self {
            StopStrings::One(one) => vec![one],
            StopStrings::Several(several) => several.0,
        };
        strings.into_iter().map(|stop| stop.0).collect()
    }
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

/// A request: the fields of its route, then those that every generation has, with their bounds and their meaning.
macro_rules! generation_request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)+ }) => {
        #[derive(Debug, serde::Deserialize, utoipa::ToSchema)]
        #[serde(deny_unknown_fields)]
        $(#[$meta])*
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)+
            #[schema(minimum = 0.0, maximum = 2.0)]
            pub temperature: Option<f64>,
            #[schema(minimum = 0.0, maximum = 1.0)]
            pub top_p: Option<f64>,
            /// Only the k most probable tokens are drawn from; 0: all.
            #[schema(minimum = 0, maximum = 1048576)]
            pub top_k: Option<i64>,
            /// Same seed, same prompt, same answer.
            #[schema(minimum = -9223372036854775808i64, maximum = 9223372036854775807i64)]
            pub seed: Option<i64>,
            #[schema(minimum = 1, maximum = 16)]
            pub n: Option<u32>,
            pub stop: Option<crate::routes::generation_common::StopStrings>,
            pub stream: Option<bool>,
            pub stream_options: Option<crate::routes::generation_common::StreamOptions>,
        }

        impl $name {
            /// With what the route has its own words for: at most so many tokens, so many alternatives of
            /// each. 422 where `stream_options` stands without `stream`.
            fn settings(
                &mut self,
                max_tokens: i64,
                logprobs: Option<i64>,
            ) -> Result<crate::generation::Settings, crate::problem::ApiError> {
                if self.stream_options.is_some() && self.stream != Some(true) {
                    let message = "`stream_options` needs `stream: true`.";
                    return Err(crate::problem::ApiError::unprocessable("contradiction", "stream_options", message));
                }
                Ok(crate::generation::Settings {
                    sampling: lathe_model::config::Sampling {
                        temperature: self.temperature.unwrap_or(1.0),
                        top_p: self.top_p.unwrap_or(1.0),
                        top_k: self.top_k.unwrap_or(0),
                        // Any 64 bits will do for a seed, so a negative one keeps its bits.
                        seed: self.seed.map_or_else(rand::random, |seed| seed.cast_unsigned()),
                        max_tokens,
                        logprobs,
                    },
                    stop: self.stop.take().map(|stop| stop.into_strings()).unwrap_or_default(),
                    n: self.n.unwrap_or(1),
                })
            }
        }
    };
}
pub(super) use generation_request;

pub fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// What every object of one answer repeats.
#[derive(Clone)]
pub struct Envelope {
    pub id: String,
    /// Unix seconds.
    pub created: i64,
    pub model: Arc<Model>,
    pub prompt_tokens: usize,
    /// A stream's last chunk carries the usage.
    pub include_usage: bool,
}

impl Envelope {
    pub fn new(prefix: &str, model: &Arc<Model>, prompts: &[Prompt], options: Option<StreamOptions>) -> Envelope {
        Envelope {
            id: lathe_jobs::ids::new_dashed(prefix),
            created: time::OffsetDateTime::now_utc().unix_timestamp(),
            model: model.clone(),
            prompt_tokens: prompts.iter().map(|prompt| prompt.ids.len()).sum(),
            include_usage: options.is_some_and(|options| options.include_usage),
        }
    }

    pub fn usage(&self, completion_tokens: usize) -> Usage {
        let prompt_tokens = self.prompt_tokens;
        Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }

    /// The `usage` of a chunk that is not the last: null where the last has one, else absent.
    pub fn no_usage(&self) -> Option<Option<Usage>> {
        self.include_usage.then_some(None)
    }
}

/// How a route shapes what was generated.
pub trait Shape: Send + 'static {
    type Whole: Serialize;
    type Chunk: Serialize;

    fn whole(self, choices: Vec<Ended>) -> Self::Whole;

    /// `None` where the step shows nothing.
    fn chunk(&mut self, step: Step) -> Option<Self::Chunk>;
}

/// What is asked of a model.
pub struct Asked {
    pub model: Arc<Model>,
    pub prompts: Vec<Prompt>,
    pub settings: Settings,
}

/// Answers whole or as a stream. While the model loads, comments keep a stream's connection alive.
///
/// # Errors
/// Those of [`generation::start`] and of the engine; once a stream is under way they are its last event.
pub async fn answer(state: AppState, asked: Asked, stream: Option<bool>, mut shape: impl Shape) -> Result<Response, ApiError> {
    let comments = state.config.stream_comments;
    let started = async move { generation::start(&state, &asked.model, &asked.prompts, &asked.settings).await };
    if stream != Some(true) {
        return Ok(Json(shape.whole(generation::collect(started.await?).await?)).into_response());
    }
    let mut started = Box::pin(started);
    let steps = match tokio::time::timeout(PLAIN_REFUSAL, &mut started).await {
        Ok(choices) => generation::steps(choices?).left_stream(),
        Err(_) => started.map_ok(generation::steps).try_flatten_stream().right_stream(),
    };
    let chunks = steps.filter_map(move |step| {
        let chunk = match step {
            Ok(step) => shape.chunk(step).map(|chunk| Event::default().json_data(chunk).map_err(ApiError::internal)),
            Err(error) => Some(Err(error)),
        };
        std::future::ready(chunk)
    });
    Ok(Sse::new(ended(chunks)).keep_alive(KeepAlive::new().interval(comments)).into_response())
}

/// How long a stream's refusal may still be a plain HTTP status; later it is an event.
const PLAIN_REFUSAL: Duration = Duration::from_secs(1);

/// `[DONE]` after the last chunk, or an `error` object in its place.
fn ended(chunks: impl Stream<Item = Result<Event, ApiError>> + Send) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    futures_util::stream::unfold(Some(Box::pin(chunks)), |chunks| async move {
        let mut chunks = chunks?;
        Some(match chunks.next().await {
            Some(Ok(chunk)) => (Ok(chunk), Some(chunks)),
            Some(Err(error)) => (Ok(Event::default().data(serde_json::json!({"error": error.body.error}).to_string())), None),
            None => (Ok(Event::default().data("[DONE]")), None),
        })
    })
}
