//! `POST /v1/completions`, OpenAI's shapes: plain, streamed, and `echo` with `logprobs` for scoring.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::generation_common::{
    SamplingFields, StopStrings, StreamOptions, Usage, check_stream_options, finish_name, stop_strings, stream_when_started,
    unix_now,
};
use crate::{
    auth::Project,
    generation::{self, Choice, Piece, Prompt, Settings, models::Model, wire::TokenLogprob},
    parse::Body,
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(create_completion))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"model": "model-…", "prompt": "ROMEO:", "max_tokens": 64, "temperature": 0.8, "seed": 1}))]
pub struct CreateCompletion {
    pub model: String,
    pub prompt: PromptField,
    /// Default 16. 0 is allowed with `echo`.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1048576)]
    pub max_tokens: Option<i64>,
    #[serde(default)]
    #[schema(minimum = 0.0, maximum = 2.0)]
    pub temperature: Option<f64>,
    #[serde(default)]
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub top_p: Option<f64>,
    /// Only the k most probable tokens are drawn from; 0: all.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1048576)]
    pub top_k: Option<i64>,
    #[serde(default)]
    pub seed: Option<i64>,
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16)]
    pub n: Option<u32>,
    #[serde(default)]
    pub stop: Option<StopStrings>,
    #[serde(default)]
    pub stream: Option<bool>,
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Alternatives to report for each token.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 5)]
    pub logprobs: Option<i64>,
    /// Repeat the prompt before the answer, its tokens among the `logprobs`.
    #[serde(default)]
    pub echo: Option<bool>,
}

/// A text, texts, token ids, or lists of token ids.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum PromptField {
    Text(String),
    Texts(PromptTexts),
    Ids(PromptIds),
    IdLists(PromptIdLists),
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(min_items = 1, max_items = 128)]
pub struct PromptTexts(Vec<String>);

#[derive(Debug, Deserialize, ToSchema)]
#[schema(min_items = 1)]
pub struct PromptIds(Vec<u32>);

#[derive(Debug, Deserialize, ToSchema)]
#[schema(min_items = 1, max_items = 128)]
pub struct PromptIdLists(Vec<PromptIds>);

#[derive(Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    #[schema(example = "text_completion")]
    pub object: &'static str,
    pub created: i64,
    pub model: String,
    pub choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<&'static str>,
}

/// Four parallel lists, one entry a token.
#[derive(Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<serde_json::Map<String, serde_json::Value>>>,
    /// Characters before the token, from the start of the choice's text.
    pub text_offset: Vec<usize>,
}

/// Continue a text
///
/// With `stream: true` the answer is a stream of events in the same shape that ends with `[DONE]`.
#[utoipa::path(
    post, path = "/v1/completions", operation_id = "create_completion", tag = "generation",
    request_body = CreateCompletion,
    responses(
        (status = 200, description = "The continuation", content((Completion = "application/json"), (Completion = "text/event-stream"))),
        (status = 400, description = "Malformed, out of bounds, or longer than the context"),
        (status = 404, description = "No such model"),
        (status = 409, description = "The model is not ready"),
        (status = 429, description = "The model's queue is full"),
        (status = 503, description = "The model is loading"),
    )
)]
async fn create_completion(
    State(state): State<AppState>,
    project: Project,
    Body(mut request): Body<CreateCompletion>,
) -> Result<Response, ApiError> {
    let settings = settings(&mut request)?;
    let model = generation::models::ready_model(&state, &project.project_id, &request.model).await?;
    let echo = request.echo.unwrap_or(false);
    let prompts = prompts(&model, request.prompt, echo && request.logprobs.is_some()).await?;
    let echoed = if echo { prompts.iter().map(|prompt| model.tokenizer.decode(&prompt.ids)).collect() } else { Vec::new() };
    let answer = Answer {
        id: lathe_jobs::ids::new_dashed("cmpl"),
        created: unix_now(),
        model: model.clone(),
        logprobs: request.logprobs.is_some(),
        echoed,
        n: settings.n as usize,
        prompt_tokens: prompts.iter().map(|prompt| prompt.ids.len()).sum(),
    };
    let started = async move { generation::start(&state, &model, &prompts, &settings).await };
    if request.stream.unwrap_or(false) {
        let usage = request.stream_options.is_some_and(|options| options.include_usage);
        stream_when_started(started, move |choices| answer.chunks(choices, usage)).await
    } else {
        Ok(Json(answer.whole(started.await?).await?).into_response())
    }
}

fn settings(request: &mut CreateCompletion) -> Result<Settings, ApiError> {
    check_stream_options(request.stream, request.stream_options)?;
    if request.max_tokens == Some(0) && request.echo != Some(true) {
        return Err(ApiError::unprocessable(
            "contradiction",
            "max_tokens",
            "`max_tokens: 0` needs `echo: true`: nothing would be answered.",
        ));
    }
    let fields = SamplingFields {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        seed: request.seed,
        max_tokens: request.max_tokens.unwrap_or(16),
        logprobs: request.logprobs,
    };
    Ok(Settings { sampling: fields.into(), stop: stop_strings(request.stop.take()), n: request.n.unwrap_or(1) })
}

async fn prompts(model: &Arc<Model>, prompt: PromptField, score: bool) -> Result<Vec<Prompt>, ApiError> {
    let lists = match prompt {
        PromptField::Ids(ids) => vec![ids.0],
        PromptField::IdLists(lists) => lists.0.into_iter().map(|ids| ids.0).collect(),
        PromptField::Text(text) => encode(model, vec![text]).await?,
        PromptField::Texts(texts) => encode(model, texts.0).await?,
    };
    // An empty prompt begins where every document begins: behind an end.
    let end = model.tokenizer.roles().eos;
    Ok(lists.into_iter().map(|ids| Prompt { ids: if ids.is_empty() { vec![end] } else { ids }, score }).collect())
}

async fn encode(model: &Arc<Model>, texts: Vec<String>) -> Result<Vec<Vec<u32>>, ApiError> {
    let model = model.clone();
    tokio::task::spawn_blocking(move || model.tokenizer.encode_batch(&texts)).await.map_err(ApiError::internal)
}

/// What every chunk of one answer repeats.
struct Answer {
    id: String,
    created: i64,
    model: Arc<Model>,
    logprobs: bool,
    /// The prompts' texts where they are to be repeated.
    echoed: Vec<String>,
    n: usize,
    prompt_tokens: usize,
}

impl Answer {
    async fn whole(self, choices: Vec<Choice>) -> Result<Completion, ApiError> {
        let mut completion = 0;
        let mut answers = Vec::with_capacity(choices.len());
        for mut choice in choices {
            let mut text = self.echoed.get(choice.index / self.n).cloned().unwrap_or_default();
            let (mut tokens, mut finish_reason) = (Vec::new(), None);
            while let Some(piece) = choice.pieces.next().await {
                match piece {
                    Piece::Scored(prompt) => tokens = prompt,
                    Piece::Text { text: more, tokens: made } => {
                        text.push_str(&more);
                        tokens.extend(made);
                    }
                    Piece::Finished { reason, completion_tokens } => {
                        completion += completion_tokens;
                        finish_reason = Some(finish_name(reason));
                    }
                    Piece::Failed { message } => {
                        return Err(ApiError::unavailable(
                            "engine_error",
                            2,
                            format!("The answer could not be finished: {message}"),
                        ));
                    }
                }
            }
            answers.push(CompletionChoice { index: choice.index, text, logprobs: self.logprobs(&tokens, &mut 0), finish_reason });
        }
        let usage = self.usage(completion);
        Ok(Completion {
            id: self.id,
            object: "text_completion",
            created: self.created,
            model: self.model.id.clone(),
            choices: answers,
            usage: Some(Some(usage)),
        })
    }

    fn chunks(
        self,
        choices: Vec<Choice>,
        include_usage: bool,
    ) -> impl Stream<Item = Result<serde_json::Value, ApiError>> + Send + 'static {
        let count = choices.len();
        let openings: Vec<_> = (0..count).map(|index| Some((index, None))).collect();
        let growth = futures_util::stream::select_all(
            choices.into_iter().map(|choice| choice.pieces.map(move |piece| Some((choice.index, Some(piece)))).boxed()),
        );
        let end = futures_util::stream::once(async { None });
        let mut completion = 0;
        let mut offsets = vec![0usize; count];
        let usage_slot = include_usage.then_some(None);
        futures_util::stream::iter(openings).chain(growth).chain(end).filter_map(move |step| {
            let choice = |index, text, logprobs, finish_reason| vec![CompletionChoice { index, text, logprobs, finish_reason }];
            let chunk = match step {
                None => include_usage.then(|| self.chunk(Vec::new(), Some(Some(self.usage(completion))))),
                Some((index, None)) => {
                    self.echoed.get(index / self.n).map(|text| self.chunk(choice(index, text.clone(), None, None), usage_slot))
                }
                Some((index, Some(piece))) => match piece {
                    Piece::Scored(tokens) => {
                        let logprobs = self.logprobs(&tokens, &mut offsets[index]);
                        Some(self.chunk(choice(index, String::new(), logprobs, None), usage_slot))
                    }
                    Piece::Text { text, tokens } => {
                        let logprobs = self.logprobs(&tokens, &mut offsets[index]);
                        Some(self.chunk(choice(index, text, logprobs, None), usage_slot))
                    }
                    Piece::Finished { reason, completion_tokens } => {
                        completion += completion_tokens;
                        Some(self.chunk(choice(index, String::new(), None, Some(finish_name(reason))), usage_slot))
                    }
                    Piece::Failed { message } => Some(Err(ApiError::unavailable("engine_error", 2, message))),
                },
            };
            std::future::ready(chunk)
        })
    }

    fn usage(&self, completion_tokens: usize) -> Usage {
        Usage { prompt_tokens: self.prompt_tokens, completion_tokens, total_tokens: self.prompt_tokens + completion_tokens }
    }

    fn chunk(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> Result<serde_json::Value, ApiError> {
        let chunk = Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.id.clone(),
            choices,
            usage,
        };
        serde_json::to_value(chunk).map_err(ApiError::internal)
    }

    /// `offset` is where the first of the tokens stands in the choice's text, and moves behind the last.
    fn logprobs(&self, tokens: &[TokenLogprob], offset: &mut usize) -> Option<CompletionLogprobs> {
        if !self.logprobs {
            return None;
        }
        let text = |token: u32| String::from_utf8_lossy(self.model.tokenizer.token_bytes(token)).into_owned();
        let mut lists = CompletionLogprobs::default();
        for token in tokens {
            let piece = text(token.token);
            lists.text_offset.push(*offset);
            *offset += piece.chars().count();
            lists.tokens.push(piece);
            lists.token_logprobs.push(token.logprob);
            let top = token.top.iter().map(|(id, logprob)| (text(*id), (*logprob).into())).collect();
            lists.top_logprobs.push(token.logprob.map(|_| top));
        }
        Some(lists)
    }
}
