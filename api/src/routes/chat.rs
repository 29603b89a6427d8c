//! `POST /v1/chat/completions`, OpenAI's shapes: plain and streamed.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use lathe_model::{data::rows::Turn, template};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{
    ToSchema,
    openapi::{
        RefOr,
        schema::{ObjectBuilder, Schema, SchemaType},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::generation_common::{Asked, Envelope, Shape, Usage, answer, finish_name, generation_request};
use crate::{
    auth::Project,
    generation::{self, Ended, Piece, Prompt, Settings, Step, models::Model, text::Spoken},
    parse::Body,
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(create_chat_completion))
}

generation_request! {
    #[schema(example = json!({"model": "model-…", "messages": [{"role": "user", "content": "Count one up from 3761."}], "temperature": 0}))]
    CreateChatCompletion {
        /// Id of a model with a chat template.
        model: String,
        #[schema(min_items = 1, max_items = 1024)]
        messages: Vec<Message>,
        /// Superseded by `max_completion_tokens`.
        #[schema(minimum = 1, maximum = 1048576)]
        max_tokens: Option<i64>,
        /// Default: what the context leaves.
        #[schema(minimum = 1, maximum = 1048576)]
        max_completion_tokens: Option<i64>,
        logprobs: Option<bool>,
        #[schema(minimum = 0, maximum = 20)]
        top_logprobs: Option<i64>,
    }
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub role: MessageRole,
    pub content: MessageContent,
    /// Null, as in an answer's message, which may be sent back as it came.
    #[serde(default)]
    #[schema(schema_with = null)]
    pub refusal: Option<()>,
}

/// As `const`: generators of clients break on a property whose only type is null.
fn null() -> impl Into<RefOr<Schema>> {
    let null = [("const", Value::Null)].into_iter().collect();
    ObjectBuilder::new().schema_type(SchemaType::AnyValue).extensions(Some(null))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MessageRole {
    System,
    Developer,
    User,
    Assistant,
}

/// A string, or text parts that are joined.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum MessageContent {
    Text(String),
    Parts(Vec<TextPart>),
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TextPart {
    #[serde(rename = "type")]
    pub kind: TextPartType,
    pub text: String,
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TextPartType {
    Text,
}

impl MessageContent {
    fn text(&self) -> String {
        match self {
            MessageContent::Text(text) => text.clone(),
            MessageContent::Parts(parts) => parts.iter().map(|part| part.text.as_str()).collect(),
        }
    }
}

#[derive(Serialize, ToSchema)]
#[schema(example = json!({"id": "chatcmpl-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "chat.completion", "created": 1767225600, "model": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "3762", "refusal": null}, "logprobs": null, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17}}))]
pub struct ChatCompletion {
    pub id: String,
    #[schema(example = "chat.completion")]
    pub object: &'static str,
    pub created: i64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
}

#[derive(Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AssistantMessage,
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
}

#[derive(Serialize, ToSchema)]
pub struct AssistantMessage {
    #[schema(example = "assistant")]
    pub role: &'static str,
    pub content: String,
    pub refusal: Option<String>,
}

#[derive(Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatTokenLogprob>,
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<ChatTopLogprob>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatTopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// One `data:` line of a streamed answer. The last chunk but `[DONE]` has no choices and the usage,
/// where `stream_options.include_usage` asked for it.
#[derive(Serialize, ToSchema)]
pub struct ChatCompletionChunk {
    pub id: String,
    #[schema(example = "chat.completion.chunk")]
    pub object: &'static str,
    pub created: i64,
    pub model: String,
    pub choices: Vec<ChatChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

#[derive(Serialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: usize,
    pub delta: ChatDelta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize, ToSchema)]
pub struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Answer a conversation
///
/// The prompt is rendered by the template that the model was trained with. With `stream: true` the
/// answer is a stream of `chat.completion.chunk` events that ends with `[DONE]`.
#[utoipa::path(
    post, path = "/v1/chat/completions", operation_id = "create_chat_completion", tag = "generation",
    request_body = CreateChatCompletion,
    responses(
        (status = 200, description = "The answer", content((ChatCompletion = "application/json"), (ChatCompletionChunk = "text/event-stream"))),
        (status = 400, description = "Malformed, out of bounds, longer than the context, or `no_chat_template`"),
    )
)]
async fn create_chat_completion(
    State(state): State<AppState>,
    project: Project,
    Body(mut request): Body<CreateChatCompletion>,
) -> Result<Response, ApiError> {
    let settings = settings(&mut request)?;
    let turns = conversation(&request.messages)?;
    let model = generation::models::ready_model(&state, &project.project_id, &request.model).await?;
    let prompts = vec![prompt(&model, turns).await?];
    let shape = ChatShape {
        envelope: Envelope::new("chatcmpl", &model, &prompts, request.stream_options),
        logprobs: request.logprobs.unwrap_or(false),
    };
    answer(state, Asked { model, prompts, settings }, request.stream, shape).await
}

fn settings(request: &mut CreateChatCompletion) -> Result<Settings, ApiError> {
    let refuse = |param: &str, message: &str| Err(ApiError::unprocessable("contradiction", param, message));
    if request.top_logprobs.is_some() && request.logprobs != Some(true) {
        return refuse("top_logprobs", "`top_logprobs` needs `logprobs: true`.");
    }
    if request.max_tokens.is_some() && request.max_completion_tokens.is_some() {
        return refuse("max_tokens", "Give `max_tokens` or `max_completion_tokens`, not both.");
    }
    let max_tokens = request.max_completion_tokens.or(request.max_tokens).unwrap_or(i64::MAX);
    request.settings(max_tokens, (request.logprobs == Some(true)).then(|| request.top_logprobs.unwrap_or(0)))
}

/// What the template takes: a system text, closed turns, the open instruction.
struct Conversation {
    system: Option<String>,
    history: Vec<Turn>,
    instruction: String,
}

/// Messages → turns. Neighbours of one role are joined by a line break; system texts come first; the last message is the user's.
fn conversation(messages: &[Message]) -> Result<Conversation, ApiError> {
    let refuse =
        |index: usize, message: &str| Err(ApiError::unprocessable("messages_order", format!("messages[{index}]"), message));
    let mut system: Vec<String> = Vec::new();
    let mut history: Vec<Turn> = Vec::new();
    let mut open: Vec<String> = Vec::new();
    let mut said_by = MessageRole::System;
    for (index, message) in messages.iter().enumerate() {
        let text = message.content.text();
        match message.role {
            MessageRole::System | MessageRole::Developer if open.is_empty() && history.is_empty() => system.push(text),
            MessageRole::System | MessageRole::Developer => {
                return refuse(index, "A system message must stand before the first user message.");
            }
            MessageRole::User => open.push(text),
            MessageRole::Assistant if said_by == MessageRole::Assistant => match history.last_mut() {
                Some(turn) => turn.output = format!("{}\n{text}", turn.output),
                None => return refuse(index, "An assistant message must follow a user message."),
            },
            MessageRole::Assistant if open.is_empty() => {
                return refuse(index, "An assistant message must follow a user message.");
            }
            MessageRole::Assistant => {
                history.push(Turn { instruction: open.join("\n"), input: String::new(), output: text });
                open.clear();
            }
        }
        said_by = message.role;
    }
    if open.is_empty() {
        return refuse(messages.len().saturating_sub(1), "The last message must be the user's: there is nothing to answer.");
    }
    let system = (!system.is_empty()).then(|| system.join("\n"));
    Ok(Conversation { system, history, instruction: open.join("\n") })
}

async fn prompt(model: &Arc<Model>, turns: Conversation) -> Result<Prompt, ApiError> {
    if model.template.is_none() {
        let message = format!(
            "The model '{}' was not trained with a chat template: use /v1/completions, or tune it to instructions first.",
            model.id
        );
        return Err(ApiError::bad_request("model", message).with_code("no_chat_template"));
    }
    let model = model.clone();
    let ids = lathe_jobs::waiting::blocking(move || {
        template::prompt(&model.tokenizer, turns.system.as_deref(), &turns.history, &turns.instruction, "")
    })
    .await
    .map_err(ApiError::internal)?;
    Ok(Prompt { ids, score: false, param: "messages".to_owned() })
}

struct ChatShape {
    envelope: Envelope,
    logprobs: bool,
}

impl Shape for ChatShape {
    type Whole = ChatCompletion;
    type Chunk = ChatCompletionChunk;

    fn whole(self, choices: Vec<Ended>) -> ChatCompletion {
        let usage = self.envelope.usage(choices.iter().map(|choice| choice.completion_tokens).sum());
        let shaped = |choice: Ended| ChatChoice {
            index: choice.index,
            logprobs: self.logprobs(&choice.tokens),
            message: AssistantMessage { role: "assistant", content: choice.text, refusal: None },
            finish_reason: finish_name(choice.reason),
        };
        ChatCompletion {
            choices: choices.into_iter().map(shaped).collect(),
            id: self.envelope.id,
            object: "chat.completion",
            created: self.envelope.created,
            model: self.envelope.model.id.clone(),
            usage,
        }
    }

    fn chunk(&mut self, step: Step) -> Option<ChatCompletionChunk> {
        let (index, delta, logprobs, finish_reason) = match step {
            Step::Ended { completion_tokens } if self.envelope.include_usage => {
                return Some(self.object(Vec::new(), Some(Some(self.envelope.usage(completion_tokens)))));
            }
            Step::Ended { .. } | Step::Grew { piece: Piece::Scored(_), .. } => return None,
            Step::Opened { index } => (index, ChatDelta { role: Some("assistant"), content: Some(String::new()) }, None, None),
            Step::Grew { index, piece: Piece::Text { text, tokens } } => {
                (index, ChatDelta { role: None, content: Some(text) }, self.logprobs(&tokens), None)
            }
            Step::Grew { index, piece: Piece::Finished { reason, .. } } => {
                (index, ChatDelta::default(), None, Some(finish_name(reason)))
            }
        };
        Some(self.object(vec![ChatChunkChoice { index, delta, logprobs, finish_reason }], self.envelope.no_usage()))
    }
}

impl ChatShape {
    fn object(&self, choices: Vec<ChatChunkChoice>, usage: Option<Option<Usage>>) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.envelope.id.clone(),
            object: "chat.completion.chunk",
            created: self.envelope.created,
            model: self.envelope.model.id.clone(),
            choices,
            usage,
        }
    }

    fn logprobs(&self, tokens: &[Spoken]) -> Option<ChatLogprobs> {
        let tokenizer = &self.envelope.model.tokenizer;
        let name = |token: u32| match tokenizer.token_bytes(token) {
            [] => (tokenizer.token_name(token), Vec::new()),
            bytes => (String::from_utf8_lossy(bytes).into_owned(), bytes.to_vec()),
        };
        let content = tokens.iter().map(|Spoken { token, .. }| {
            let (text, bytes) = name(token.token);
            let top_logprobs = token.top.iter().map(|(id, logprob)| {
                let (token, bytes) = name(*id);
                ChatTopLogprob { token, logprob: *logprob, bytes }
            });
            ChatTokenLogprob { token: text, logprob: token.logprob.unwrap_or(0.0), bytes, top_logprobs: top_logprobs.collect() }
        });
        self.logprobs.then(|| ChatLogprobs { content: content.collect(), refusal: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(texts: &[(MessageRole, &str)]) -> Vec<Message> {
        texts
            .iter()
            .map(|(role, text)| Message { role: *role, content: MessageContent::Text((*text).into()), refusal: None })
            .collect()
    }

    #[test]
    fn turns_follow_the_messages() {
        use MessageRole::*;
        let turns =
            conversation(&messages(&[(System, "s"), (User, "a"), (User, "b"), (Assistant, "c"), (User, "d")])).ok().unwrap();
        assert_eq!(turns.system.as_deref(), Some("s"));
        assert_eq!(turns.history, [Turn { instruction: "a\nb".into(), input: String::new(), output: "c".into() }]);
        assert_eq!(turns.instruction, "d");
    }

    #[test]
    fn nothing_to_answer_is_refused() {
        use MessageRole::*;
        assert!(conversation(&messages(&[(User, "a"), (Assistant, "b")])).is_err());
        assert!(conversation(&messages(&[(Assistant, "b"), (User, "a")])).is_err());
        assert!(conversation(&messages(&[(User, "a"), (System, "late")])).is_err());
    }
}
