//! `POST /v1/completions`, OpenAI's shapes: plain, streamed, and `echo` with `logprobs` for scoring.

use std::{collections::BTreeMap, sync::Arc};

use axum::{extract::State, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    generation_common::{Asked, Envelope, Shape, Usage, answer, finish_name, generation_request},
    tokenizers::TokenId,
};
use crate::{
    auth::Project,
    generation::{self, Ended, Piece, Prompt, Settings, Step, models::Model, text::Spoken},
    parse::Body,
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(create_completion))
}

generation_request! {
    #[schema(example = json!({"model": "model-…", "prompt": "ROMEO:", "max_tokens": 64, "temperature": 0.8, "seed": 1}))]
    CreateCompletion {
        model: String,
        prompt: PromptField,
        /// Default 16. 0 is allowed with `echo`.
        #[schema(minimum = 0, maximum = 1048576)]
        max_tokens: Option<i64>,
        /// Alternatives to report for each token.
        #[schema(minimum = 0, maximum = 5)]
        logprobs: Option<i64>,
        /// Repeat the prompt before the answer, its tokens among the `logprobs`.
        echo: Option<bool>,
    }
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
pub struct PromptIds(Vec<TokenId>);

impl PromptIds {
    fn plain(self) -> Vec<u32> {
        self.0.into_iter().map(|id| id.0).collect()
    }
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(min_items = 1, max_items = 128)]
pub struct PromptIdLists(Vec<PromptIds>);

#[derive(Serialize, ToSchema)]
#[schema(example = json!({"id": "cmpl-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "text_completion", "created": 1767225600, "model": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N",
    "choices": [{"index": 0, "text": " Good morrow.", "logprobs": null, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}}))]
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

/// Four parallel lists, one entry a token. A token that is no text by itself is named by its bytes, `bytes:\xc3`.
#[derive(Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
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
    let shape = CompletionShape {
        envelope: Envelope::new("cmpl", &model, &prompts, request.stream_options),
        logprobs: request.logprobs.is_some(),
        echoed,
        n: settings.n as usize,
    };
    answer(state, Asked { model, prompts, settings }, request.stream, shape).await
}

fn settings(request: &mut CreateCompletion) -> Result<Settings, ApiError> {
    if request.max_tokens == Some(0) && request.echo != Some(true) {
        return Err(ApiError::unprocessable(
            "contradiction",
            "max_tokens",
            "`max_tokens: 0` needs `echo: true`: nothing would be answered.",
        ));
    }
    request.settings(request.max_tokens.unwrap_or(16), request.logprobs)
}

async fn prompts(model: &Arc<Model>, prompt: PromptField, score: bool) -> Result<Vec<Prompt>, ApiError> {
    let (lists, several) = match prompt {
        PromptField::Ids(ids) => (vec![ids.plain()], false),
        PromptField::IdLists(lists) => (lists.0.into_iter().map(PromptIds::plain).collect(), true),
        PromptField::Text(text) => (encode(model, vec![text]).await?, false),
        PromptField::Texts(texts) => (encode(model, texts.0).await?, true),
    };
    // An empty prompt begins where every document begins: behind an end.
    let end = model.tokenizer.roles().eos;
    let prompt = |(index, ids): (usize, Vec<u32>)| Prompt {
        ids: if ids.is_empty() { vec![end] } else { ids },
        score,
        param: if several { format!("prompt[{index}]") } else { "prompt".to_owned() },
    };
    Ok(lists.into_iter().enumerate().map(prompt).collect())
}

async fn encode(model: &Arc<Model>, texts: Vec<String>) -> Result<Vec<Vec<u32>>, ApiError> {
    let model = model.clone();
    lathe_jobs::waiting::blocking(move || model.tokenizer.encode_batch(&texts)).await.map_err(ApiError::internal)
}

struct CompletionShape {
    envelope: Envelope,
    logprobs: bool,
    /// The prompts' texts where they are to be repeated.
    echoed: Vec<String>,
    /// Choices a prompt.
    n: usize,
}

impl Shape for CompletionShape {
    type Whole = Completion;
    type Chunk = Completion;

    fn whole(self, choices: Vec<Ended>) -> Completion {
        let usage = self.envelope.usage(choices.iter().map(|choice| choice.completion_tokens).sum());
        let shaped = |choice: Ended| {
            let logprobs = self.logprobs.then(|| {
                let mut lists = CompletionLogprobs::default();
                self.list(&mut lists, &choice.prompt, 0);
                self.list(&mut lists, &choice.tokens, self.echo(choice.index).chars().count());
                lists
            });
            let text = self.echo(choice.index).to_owned() + &choice.text;
            CompletionChoice { index: choice.index, text, logprobs, finish_reason: Some(finish_name(choice.reason)) }
        };
        let choices = choices.into_iter().map(shaped).collect();
        self.object(choices, Some(Some(usage)))
    }

    fn chunk(&mut self, step: Step) -> Option<Completion> {
        let (index, text, tokens, base, reason) = match step {
            Step::Ended { completion_tokens } if self.envelope.include_usage => {
                return Some(self.object(Vec::new(), Some(Some(self.envelope.usage(completion_tokens)))));
            }
            Step::Ended { .. } => return None,
            Step::Opened { .. } if self.echoed.is_empty() => return None,
            Step::Opened { index } => (index, self.echo(index).to_owned(), None, 0, None),
            Step::Grew { index, piece: Piece::Scored(tokens) } => (index, String::new(), Some(tokens), 0, None),
            Step::Grew { index, piece: Piece::Text { text, tokens } } => {
                (index, text, Some(tokens), self.echo(index).chars().count(), None)
            }
            Step::Grew { index, piece: Piece::Finished { reason, .. } } => {
                (index, String::new(), None, 0, Some(finish_name(reason)))
            }
        };
        let logprobs = tokens.filter(|_| self.logprobs).map(|tokens| {
            let mut lists = CompletionLogprobs::default();
            self.list(&mut lists, &tokens, base);
            lists
        });
        let choice = CompletionChoice { index, text, logprobs, finish_reason: reason };
        Some(self.object(vec![choice], self.envelope.no_usage()))
    }
}

impl CompletionShape {
    fn object(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> Completion {
        Completion {
            id: self.envelope.id.clone(),
            object: "text_completion",
            created: self.envelope.created,
            model: self.envelope.model.id.clone(),
            choices,
            usage,
        }
    }

    /// The text that is repeated before a choice.
    fn echo(&self, index: usize) -> &str {
        self.echoed.get(index / self.n).map_or("", String::as_str)
    }

    /// Adds tokens whose text begins at `base` of the choice's text.
    fn list(&self, lists: &mut CompletionLogprobs, tokens: &[Spoken], base: usize) {
        let tokenizer = &self.envelope.model.tokenizer;
        let name = |token: u32| match tokenizer.token_bytes(token) {
            [] => tokenizer.token_name(token),
            bytes => name_of_bytes(bytes),
        };
        for Spoken { token, offset } in tokens {
            lists.text_offset.push(base + offset);
            lists.tokens.push(name(token.token));
            lists.token_logprobs.push(token.logprob);
            let top = token.top.iter().map(|(id, logprob)| (name(*id), *logprob)).collect();
            lists.top_logprobs.push(token.logprob.map(|_| top));
        }
    }
}

/// A token as a key of JSON. Bytes that are no text have distinct names too.
fn name_of_bytes(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_within_a_character_keep_distinct_names() {
        assert_eq!(name_of_bytes("é".as_bytes()), "é");
        assert_eq!(name_of_bytes(&[0xC3]), r"bytes:\xc3");
        assert_ne!(name_of_bytes(&[0x9F]), name_of_bytes(&[0xA9]));
    }
}
