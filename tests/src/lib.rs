//! A whole stack for one test: `lathe serve` on a data directory and a database of its own.
//!
//! [`TestApp::start`] gives one with a fixed admin key and short leases. When it is dropped, the
//! stack is stopped and two things are checked: no process is left, and no job is unfinished (unless
//! [`Builder::leaves_jobs`] said so). Where `DATABASE_URL` names a server, the app has a database
//! there; otherwise, and with [`Builder::embedded`], it has an embedded server.

mod network;
mod pretence;
mod processes;
mod stack;

use std::time::{Duration, Instant};

use lathe_api::MIGRATOR;
use reqwest::{Method, StatusCode, header::HeaderMap, multipart};
use serde_json::Value;
use sqlx::migrate::Migrator;

pub use self::{
    network::Network,
    pretence::Pretence,
    processes::{Kind, still_running},
    stack::{Builder, TestApp, can_mount, lathe},
};

/// The admin key of every [`TestApp`].
pub const KEY: &str = "sk-lathe-test-key-of-the-integration-tests-0000000000";

/// How long [`TestApp::wait_for`] waits, on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a request got.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
    /// Null where the body is not JSON.
    pub body: Value,
}

impl Answer {
    /// The body of a 2xx; anything else ends the test with what was said.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.status.is_success(), "{}: {}", self.status, self.text);
        self.body
    }

    /// The error object of an answer with this status.
    #[track_caller]
    pub fn refused(self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        self.body["error"].clone()
    }
}

impl TestApp {
    /// A request with the admin key, or with one that [`TestApp::with_key`] set.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let answer = request.send().await.expect("the server answers");
        let (status, headers) = (answer.status(), answer.headers().clone());
        let text = answer.text().await.expect("the body is text");
        Answer { status, headers, body: serde_json::from_str(&text).unwrap_or_default(), text }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// A POST without a body.
    pub async fn post(&self, path: &str) -> Answer {
        self.send(self.request(Method::POST, path)).await
    }

    pub async fn post_json(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Uploads a file and gives its object.
    pub async fn upload(&self, filename: &str, purpose: &str, content: impl Into<Vec<u8>>) -> Value {
        let part = multipart::Part::bytes(content.into()).file_name(filename.to_owned());
        let form = multipart::Form::new().text("purpose", purpose.to_owned()).part("file", part);
        self.send(self.request(Method::POST, "/v1/files").multipart(form)).await.ok()
    }

    /// Asks for the resource at `path` until its `state` is one of `states`; ends the test when it
    /// has failed or been cancelled instead, or after [`PATIENCE`].
    pub async fn wait_for(&self, path: &str, states: &[&str]) -> Value {
        let began = Instant::now();
        loop {
            let found = self.get(path).await.ok();
            let state = found["state"].as_str().unwrap_or_else(|| panic!("{path} has no state: {found}"));
            if states.contains(&state) {
                return found;
            }
            assert!(!["failed", "cancelled"].contains(&state), "{path} is {state} and should be {states:?}: {found}");
            assert!(began.elapsed() < PATIENCE, "{path} is still {state} and should be {states:?}: {found}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The same stack, asked with another key.
    pub fn with_key(&self, key: &str) -> Caller<'_> {
        Caller { app: self, key: key.to_owned() }
    }
}

/// Someone else at the same stack.
pub struct Caller<'a> {
    app: &'a TestApp,
    key: String,
}

impl Caller<'_> {
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.app.client.request(method, format!("{}{path}", self.app.url)).bearer_auth(&self.key)
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.app.send(self.request(Method::GET, path)).await
    }

    pub async fn post_json(&self, path: &str, body: &Value) -> Answer {
        self.app.send(self.request(Method::POST, path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.app.send(self.request(Method::DELETE, path)).await
    }
}

/// The schema as it was at an older version.
pub fn schema_of(version: i64) -> Migrator {
    Migrator::with_migrations(MIGRATOR.iter().filter(|migration| migration.version <= version).cloned().collect())
}

/// Polls until `condition` gives something; ends the test after `limit`.
#[track_caller]
pub fn within<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(began.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
