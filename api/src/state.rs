//! What every handler shares. Cheap to clone; holds no request's state.

use std::{
    collections::BTreeMap,
    io,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::http::{HeaderValue, Method, StatusCode};
use lathe_jobs::{artifacts::Artifacts, waiting};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio_util::sync::CancellationToken;

use crate::{caller::KeyCache, event_hub::EventHub, rate_limit::RateLimits, tokenizer_cache::TokenizerCache};

/// The API's limits and switches, each a flag of `lathe api`.
#[derive(Clone, Debug)]
pub struct ApiConfig {
    /// Bytes of a JSON body.
    pub json_limit: usize,
    /// Bytes of an uploaded file.
    pub file_limit: u64,
    /// Bytes of one part of an upload.
    pub part_limit: u64,
    /// Origins that browsers may call from; none: no CORS headers at all.
    pub cors_origins: Vec<HeaderValue>,
    /// A token of its own for `/metrics`, besides admin keys.
    pub metrics_token: Option<String>,
    /// Free bytes of the artifacts' file system below which `/readyz` fails.
    pub disk_low_bytes: u64,
    /// Time in which a request's head must arrive.
    pub header_timeout: Duration,
    /// Time in which a body must bring its next bytes.
    pub idle_body_timeout: Duration,
    /// Time in which an answer must be finished, counted from its start on a loaded model.
    pub generation_deadline: Duration,
    /// Requests that one key may send in a minute; none: as many as it likes.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Time that a request waits for its model to load.
    pub loading_patience: Duration,
    /// Between the comments that keep a silent stream's connection alive.
    pub stream_comments: Duration,
    /// Time in which a handler that waits must hear something; its request is a 503 then.
    pub stuck_after: Duration,
    /// Time that open requests get to end at shutdown.
    pub shutdown_grace: Duration,
}

impl Default for ApiConfig {
    fn default() -> Self {
        ApiConfig {
            json_limit: 4 << 20,
            file_limit: 8 << 30,
            part_limit: 64 << 20,
            cors_origins: Vec::new(),
            metrics_token: None,
            disk_low_bytes: 1 << 30,
            header_timeout: Duration::from_secs(10),
            idle_body_timeout: Duration::from_secs(60),
            generation_deadline: Duration::from_secs(600),
            requests_per_minute: None,
            loading_patience: Duration::from_secs(60),
            stream_comments: Duration::from_secs(10),
            stuck_after: waiting::STUCK,
            shutdown_grace: Duration::from_secs(5),
        }
    }
}

/// How long one statement may take, locks included; beyond that its request is a 503.
pub const QUERY_DEADLINE: Duration = Duration::from_secs(10);

/// How the API holds its connections: a request waits for one, and then for an answer, no longer than a
/// client waits for its 503.
pub fn pool_options(query_deadline: Duration) -> PgPoolOptions {
    let milliseconds = query_deadline.as_millis();
    // Told to the session rather than in the connection's start, which poolers of connections refuse.
    let deadlines: Arc<str> = format!(
        "SET statement_timeout = {milliseconds}; SET lock_timeout = {milliseconds}; SET idle_in_transaction_session_timeout = '60s'"
    )
    .into();
    waiting::pool_options().max_connections(16).acquire_timeout(Duration::from_secs(3)).after_connect(move |conn, _| {
        let deadlines = deadlines.clone();
        // Made of a number alone.
        Box::pin(async move { sqlx::raw_sql(sqlx::AssertSqlSafe(&*deadlines)).execute(conn).await.map(drop) })
    })
}

#[derive(Clone)]
pub struct AppState {
    pub db: PgPool,
    pub artifacts: Artifacts,
    pub config: Arc<ApiConfig>,
    /// For engines.
    pub http: reqwest::Client,
    pub keys: Arc<KeyCache>,
    pub requests: Arc<RequestCounts>,
    pub rates: Arc<RateLimits>,
    pub tokenizers: Arc<TokenizerCache>,
    pub events: Arc<EventHub>,
    /// Cancelled when the server stops: streams end themselves, new requests are not taken.
    pub shutdown: CancellationToken,
}

impl AppState {
    pub fn new(db: PgPool, artifacts: Artifacts, config: ApiConfig) -> AppState {
        AppState {
            db,
            artifacts,
            config: Arc::new(config),
            // Engines are near: a proxy of the environment is not for them.
            http: reqwest::Client::builder().no_proxy().build().unwrap_or_default(),
            keys: Arc::default(),
            requests: Arc::default(),
            rates: Arc::default(),
            tokenizers: Arc::default(),
            events: Arc::default(),
            shutdown: CancellationToken::new(),
        }
    }

    /// Bytes free to this process on the artifacts' file system.
    pub async fn free_bytes(&self) -> io::Result<u64> {
        let root = self.artifacts.root().to_owned();
        let found = waiting::blocking(move || nix::sys::statvfs::statvfs(&root)).await.map_err(io::Error::other)??;
        // Both are u64 on Linux and narrower elsewhere.
        #[allow(clippy::useless_conversion)]
        Ok(u64::from(found.blocks_available()) * u64::from(found.fragment_size()))
    }
}

/// Answers by method, route (as written in the document, not as asked for) and status.
#[derive(Debug, Default)]
pub struct RequestCounts(Mutex<BTreeMap<(String, String, u16), u64>>);

impl RequestCounts {
    pub fn add(&self, method: &Method, route: &str, status: StatusCode) {
        // A closed set, so that no client grows the map with methods of its own.
        let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
        let method = if known.contains(method) { method.as_str() } else { "other" };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((method.to_owned(), route.to_owned(), status.as_u16())).or_default() += 1;
    }

    pub fn snapshot(&self) -> BTreeMap<(String, String, u16), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
