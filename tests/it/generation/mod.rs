//! Completions and chat over HTTP, on models whose every word is known: what an answer says, what its
//! scores are, how many progress together, and how they end. This module asks and listens.

mod answers;
mod endings;
mod scores;
mod together;

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream::BoxStream};
use lathe_tests::{PATIENCE, TestApp};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{handmade::Handmade, training::text};

pub const COMPLETIONS: &str = "/v1/completions";
pub const CHAT: &str = "/v1/chat/completions";

/// With the changes of `more`.
pub fn with(body: &Value, more: Value) -> Value {
    let mut body = body.clone();
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

/// A stream of events as it arrives.
pub struct Live {
    bytes: BoxStream<'static, reqwest::Result<Vec<u8>>>,
    buffer: Vec<u8>,
    /// Comments seen so far.
    pub comments: usize,
}

impl Live {
    pub async fn open(request: reqwest::RequestBuilder) -> Live {
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let bytes = response.bytes_stream().map(|chunk| chunk.map(|bytes| bytes.to_vec())).boxed();
        Live { bytes, buffer: Vec::new(), comments: 0 }
    }

    /// The next event; the text `[DONE]` as a JSON string.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                // A line may have come in parts that end within a character.
                let line = String::from_utf8(self.buffer.drain(..=end).collect()).expect("events are text");
                match line.trim_end() {
                    "" => {}
                    comment if comment.starts_with(':') => self.comments += 1,
                    line => {
                        let data = line.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {line}"));
                        return Some(serde_json::from_str(data).unwrap_or_else(|_| Value::from(data)));
                    }
                }
            }
            self.buffer.extend(self.bytes.next().await?.expect("the connection holds"));
        }
    }

    pub async fn rest(mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

pub async fn open(app: &TestApp, path: &str, body: &Value) -> Live {
    Live::open(app.request(Method::POST, path).json(&with(body, json!({"stream": true})))).await
}

/// The chunks of a stream that must end well.
async fn streamed(app: &TestApp, path: &str, body: &Value) -> Vec<Value> {
    let mut events = open(app, path, body).await.rest().await;
    assert_eq!(events.pop(), Some("[DONE]".into()));
    events
}

/// Text of a choice in a completion's or a chat's chunks or whole answers.
fn said(objects: &[Value], index: u64) -> String {
    let choices = objects.iter().flat_map(|object| object["choices"].as_array().expect("choices"));
    let texts = choices.filter(|choice| choice["index"] == index).map(|choice| {
        let texts = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
        texts.into_iter().filter_map(Value::as_str).collect::<String>()
    });
    texts.collect()
}

/// Names of tokens in the log probabilities of either shape.
fn token_names(objects: &[Value]) -> Vec<String> {
    let mut names = Vec::new();
    for logprobs in
        objects.iter().flat_map(|object| object["choices"].as_array().expect("choices")).map(|choice| &choice["logprobs"])
    {
        names.extend(logprobs["tokens"].as_array().into_iter().flatten().map(|name| text(name).to_owned()));
        names.extend(logprobs["content"].as_array().into_iter().flatten().map(|entry| text(&entry["token"]).to_owned()));
    }
    names
}

async fn stack(model: Handmade) -> (TestApp, String) {
    let app = TestApp::start().await;
    let model = model.register(&app).await;
    (app, model)
}

/// A prompt of one token, so that a scripted model answers with its whole script.
fn prompt_of(model: &str) -> Value {
    json!({"model": model, "prompt": "x", "temperature": 0, "max_tokens": 64})
}

/// What the engine says of itself, once there is one: a stream is open before its model is loaded.
async fn engine_load(app: &TestApp) -> Value {
    let db = PgPool::connect(&app.database_url()).await.expect("the stack's database");
    let began = Instant::now();
    let (address, secret): (String, String) = loop {
        let ready = sqlx::query_as("SELECT address, secret FROM replicas WHERE state = 'ready'").fetch_optional(&db);
        if let Some(replica) = ready.await.expect("the table is there") {
            break replica;
        }
        assert!(began.elapsed() < PATIENCE, "no engine is ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    db.close().await;
    assert_eq!(app.client.get(format!("http://{address}/load")).send().await.expect("an answer").status(), 401);
    app.send(app.client.get(format!("http://{address}/load")).bearer_auth(secret)).await.ok()
}

/// The last event of a stream that breaks off.
pub async fn broken(stream: Live) -> Value {
    let events = stream.rest().await;
    assert!(!events.contains(&"[DONE]".into()), "a broken answer is not done");
    let last = events.last().expect("an error event");
    assert_eq!(last["error"]["type"], "server_error", "{last}");
    assert!(events[..events.len() - 1].iter().all(|event| event.get("error").is_none()));
    last["error"].clone()
}
