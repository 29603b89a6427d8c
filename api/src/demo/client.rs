//! A small typed client of Lathe's HTTP API: what the demo needs, no more.
//!
//! Requests that were refused for the moment (429, 503, a connection that broke) are made again
//! with growing pauses; creations carry an idempotency key, so that none happens twice. A refusal
//! for good is an error with the server's own sentence.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use reqwest::{Method, RequestBuilder, Response, StatusCode, multipart};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// Tries of one request, the first included.
const TRIES: u32 = 6;

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{what} was refused with {status}: {message}")]
    Refused { what: String, status: StatusCode, message: String },
    #[error("{what} had no answer: {source}")]
    Transport { what: String, source: reqwest::Error },
    #[error("{what} had an answer of another shape than documented: {detail}")]
    Shape { what: String, detail: String },
    #[error("an answer broke off: {0}")]
    BrokenStream(String),
}

/// What every resource has that a job makes.
#[derive(Debug, Deserialize)]
pub struct Resource {
    pub id: String,
    pub state: String,
    #[serde(default)]
    pub error: Option<Failure>,
}

/// Why a resource or a job has failed.
#[derive(Clone, Debug, Deserialize)]
pub struct Failure {
    pub message: String,
}

/// A training job while it goes on.
#[derive(Debug, Deserialize)]
pub struct Job {
    pub id: String,
    pub state: String,
    pub phase: Option<String>,
    /// The last finished step; 0 before the first.
    pub step: u64,
    pub steps: Option<u64>,
    pub loss: Option<f64>,
    pub tokens_per_second: Option<f64>,
    pub eta_seconds: Option<f64>,
    pub error: Option<Failure>,
    /// The id of the model that it makes.
    pub model: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct Metric {
    pub step: u64,
    pub loss: f64,
    #[serde(default)]
    pub validation_loss: Option<f64>,
}

#[derive(Debug, Deserialize)]
pub struct List<T> {
    pub data: Vec<T>,
}

pub struct Client {
    http: reqwest::Client,
    /// `http://host:port`, without a slash at the end.
    base: String,
    key: String,
}

impl Client {
    pub fn new(base: String, key: String) -> Result<Client, reqwest::Error> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .read_timeout(Duration::from_secs(120))
            .build()?;
        Ok(Client { http, base, key })
    }

    /// Whether `/readyz` says yes. A server that does not answer yet is not ready.
    pub async fn ready(&self) -> bool {
        let answer = self.http.get(format!("{}/readyz", self.base)).timeout(Duration::from_secs(2)).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let answer = self.send(&format!("GET {path}"), || Some(self.request(Method::GET, path))).await?;
        parsed(&format!("GET {path}"), answer).await
    }

    /// Creates something. However often it is tried, it is made once.
    pub async fn create<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, ClientError> {
        let key = format!("demo-{:032x}", rand::random::<u128>());
        let request = || Some(self.request(Method::POST, path).header("idempotency-key", &key).json(body));
        parsed(&format!("POST {path}"), self.send(&format!("POST {path}"), request).await?).await
    }

    /// Uploads a file and returns its id; it is streamed from the disk once, so it is not tried again.
    pub async fn upload(&self, path: &std::path::Path) -> Result<String, ClientError> {
        let what = format!("uploading {}", path.display());
        let unreadable = |error: std::io::Error| ClientError::Shape { what: what.clone(), detail: error.to_string() };
        let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
        let length = file.metadata().await.map_err(unreadable)?.len();
        let name = path.file_name().map_or_else(|| "file".to_owned(), |name| name.to_string_lossy().into_owned());
        let body = reqwest::Body::wrap_stream(tokio_util::io::ReaderStream::new(file));
        let part = multipart::Part::stream_with_length(body, length).file_name(name);
        let form = multipart::Form::new().text("purpose", "user_data").part("file", part);
        let mut request = Some(self.request(Method::POST, "/v1/files").multipart(form));
        #[derive(Deserialize)]
        struct Uploaded {
            id: String,
        }
        let uploaded: Uploaded = parsed(&what, self.send(&what, || request.take()).await?).await?;
        Ok(uploaded.id)
    }

    /// The greedy answer of a tuned model.
    pub async fn chat(&self, model: &str, question: &str, max_tokens: u32) -> Result<String, ClientError> {
        #[derive(Deserialize)]
        struct Message {
            content: Option<String>,
        }
        #[derive(Deserialize)]
        struct Choice {
            message: Message,
        }
        let answer: Choices<Choice> = self.generate("/v1/chat/completions", &chat_body(model, question, max_tokens)).await?;
        Ok(answer.choices.into_iter().next().and_then(|choice| choice.message.content).unwrap_or_default())
    }

    /// The greedy continuation of a text, up to the end of its line.
    pub async fn complete_line(&self, model: &str, prompt: &str, max_tokens: u32) -> Result<String, ClientError> {
        #[derive(Deserialize)]
        struct Choice {
            text: String,
        }
        let body = json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stop": ["\n"]});
        let answer: Choices<Choice> = self.generate("/v1/completions", &body).await?;
        Ok(answer.choices.into_iter().next().map(|choice| choice.text).unwrap_or_default())
    }

    async fn generate<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, ClientError> {
        let answer = self.send(&format!("POST {path}"), || Some(self.request(Method::POST, path).json(body))).await?;
        parsed(&format!("POST {path}"), answer).await
    }

    /// The greedy answer of a tuned model, piece by piece as it is made.
    pub async fn chat_stream(
        &self,
        model: &str,
        question: &str,
        max_tokens: u32,
    ) -> Result<impl Stream<Item = Result<String, ClientError>> + Unpin, ClientError> {
        let mut body = chat_body(model, question, max_tokens);
        body["stream"] = json!(true);
        let path = "/v1/chat/completions";
        let answer = self.send(&format!("POST {path}"), || Some(self.request(Method::POST, path).json(&body))).await?;
        Ok(pieces(answer.bytes_stream()))
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.key)
    }

    /// Sends what `request` makes, again while the refusal is for the moment and there is more to
    /// send.
    async fn send(&self, what: &str, mut request: impl FnMut() -> Option<RequestBuilder>) -> Result<Response, ClientError> {
        let mut pause = Duration::from_millis(250);
        let mut outcome = Err(ClientError::Shape { what: what.to_owned(), detail: "nothing was sent".to_owned() });
        for attempt in 1..=TRIES {
            let Some(request) = request() else { break };
            let asked = match request.send().await {
                Ok(answer) if answer.status().is_success() => return Ok(answer),
                Ok(answer) => {
                    let (status, asked) = (answer.status(), retry_after(&answer));
                    let for_good =
                        !may_pass(status) || answer.headers().get("x-should-retry").is_some_and(|value| value == "false");
                    outcome = Err(ClientError::Refused { what: what.to_owned(), status, message: sentence(answer).await });
                    if for_good {
                        break;
                    }
                    asked
                }
                Err(source) => {
                    outcome = Err(ClientError::Transport { what: what.to_owned(), source });
                    None
                }
            };
            if attempt < TRIES {
                tokio::time::sleep(asked.unwrap_or(pause).min(LONGEST_PAUSE)).await;
                pause *= 2;
            }
        }
        outcome
    }
}

#[derive(Deserialize)]
struct Choices<T> {
    choices: Vec<T>,
}

/// A question that is answered greedily.
pub fn chat_body(model: &str, question: &str, max_tokens: u32) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0})
}

/// Refusals that another moment may lift.
fn may_pass(status: StatusCode) -> bool {
    matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS)
        || status.is_server_error()
}

fn retry_after(answer: &Response) -> Option<Duration> {
    let seconds: u64 = answer.headers().get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// The server's own words where it has any.
async fn sentence(answer: Response) -> String {
    let text = answer.text().await.unwrap_or_default();
    let body: Option<Value> = serde_json::from_str(&text).ok();
    body.as_ref().and_then(|body| body["error"]["message"].as_str()).map_or(text, str::to_owned)
}

async fn parsed<T: DeserializeOwned>(what: &str, answer: Response) -> Result<T, ClientError> {
    let bytes = answer.bytes().await.map_err(|source| ClientError::Transport { what: what.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|error| ClientError::Shape { what: what.to_owned(), detail: error.to_string() })
}

/// The text of streamed chat chunks, up to `[DONE]`. A stream that ends before it is an error.
fn pieces(
    bytes: impl Stream<Item = reqwest::Result<Bytes>> + Send + 'static,
) -> impl Stream<Item = Result<String, ClientError>> + Unpin {
    let state = Some((bytes.boxed(), Vec::new()));
    futures_util::stream::unfold(state, |state| async {
        let (mut bytes, mut buffer): (_, Vec<u8>) = state?;
        loop {
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                match read_line(&line) {
                    Line::Nothing => {}
                    Line::Text(text) => return Some((Ok(text), Some((bytes, buffer)))),
                    Line::Done => return None,
                    Line::Failed(message) => return Some((Err(ClientError::BrokenStream(message)), None)),
                }
            }
            match bytes.next().await {
                Some(Ok(more)) => buffer.extend_from_slice(&more),
                Some(Err(error)) => return Some((Err(ClientError::BrokenStream(error.to_string())), None)),
                None => return Some((Err(ClientError::BrokenStream("it ended without [DONE]".to_owned())), None)),
            }
        }
    })
    .boxed()
}

#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// A comment, a blank line, or a chunk without text.
    Nothing,
    Text(String),
    Done,
    Failed(String),
}

/// One line of a stream of server-sent events.
fn read_line(line: &[u8]) -> Line {
    let Some(data) = line.strip_prefix(b"data:") else { return Line::Nothing };
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return Line::Done;
    }
    let Ok(chunk) = serde_json::from_slice::<Value>(data) else {
        return Line::Failed("a chunk is not JSON".to_owned());
    };
    if let Some(message) = chunk["error"]["message"].as_str() {
        return Line::Failed(message.to_owned());
    }
    match chunk["choices"][0]["delta"]["content"].as_str() {
        Some(text) if !text.is_empty() => Line::Text(text.to_owned()),
        _ => Line::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn collected(parts: &[&'static str]) -> Vec<Result<String, String>> {
        let bytes: Vec<_> = parts.iter().map(|part| Ok(Bytes::from_static(part.as_bytes()))).collect();
        pieces(futures_util::stream::iter(bytes)).map(|piece| piece.map_err(|error| error.to_string())).collect().await
    }

    #[tokio::test]
    async fn chunks_may_be_cut_anywhere() {
        let parts = [
            ": hello\n\nda",
            "ta: {\"choices\":[{\"delta\":{\"content\":\"Mo",
            "n\"}}]}\n\n",
            "data: {\"choices\":[]}\n\ndata: [DONE]\n\n",
        ];
        assert_eq!(collected(&parts).await, vec![Ok("Mon".to_owned())]);
    }

    #[tokio::test]
    async fn an_error_and_a_missing_end_are_both_noticed() {
        let failed = collected(&["data: {\"error\":{\"message\":\"the engine is gone\"}}\n\n"]).await;
        assert_eq!(failed, vec![Err("an answer broke off: the engine is gone".to_owned())]);
        let ended = collected(&["data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n"]).await;
        assert_eq!(ended.len(), 2);
        assert!(ended[1].is_err());
    }
}
