//! Creations happen once, however often their request is sent.
//!
//! A request with `Idempotency-Key` is answered once and the answer kept for 24 hours: the same key
//! with the same body gets it again, with another body 422, and while the first is still being
//! answered 409. OpenAI's SDKs send no such key but count their retries in
//! `x-stainless-retry-count`; a retry of a creation gets the answer of the first attempt for 10
//! minutes, found by API key and body. Only [`CREATIONS`] are covered: never a generation, and never
//! an answer that holds a secret.
//!
//! A form with a file is not held in memory: its handler hashes it while it arrives
//! ([`Fingerprint`]), and a repetition is hashed before it gets the first answer.
//!
//! A creation goes on when its client is gone, so that the retry finds its answer.

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::PgPool;

use crate::{
    auth::Project,
    multipart::{self, Fingerprint},
    parse,
    problem::ApiError,
    state::AppState,
};

/// The POST routes whose repetition would create a second thing.
pub const CREATIONS: [&str; 8] = [
    "/v1/projects",
    "/v1/files",
    "/v1/uploads",
    "/v1/uploads/{upload_id}/parts",
    "/v1/datasets",
    "/v1/tokenizers",
    "/v1/training/jobs",
    "/v1/fine_tuning/jobs",
];

/// Marks an answer that an earlier request got first.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// Bytes of an answer that can be kept.
const ANSWER_LIMIT: usize = 64 << 20;

/// What makes two requests the same one.
struct Identity {
    project_id: String,
    key: String,
    /// Of the request; of its line alone for a form, until that has arrived.
    body_sha256: String,
    /// Seconds for which the answer is kept.
    kept: f64,
    /// Whether an answer of an earlier request may be given.
    replays: bool,
}

/// Middleware, inside of [`crate::auth::require_key`].
pub async fn replay(State(state): State<AppState>, request: Request, next: Next) -> Result<Response, ApiError> {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let creates = request.method() == Method::POST && CREATIONS.contains(&route);
    let marked = request.headers().contains_key("idempotency-key") || request.headers().contains_key("x-stainless-retry-count");
    let caller = request.extensions().get::<Project>().cloned();
    let (true, true, Some(caller)) = (creates, marked, caller) else {
        return Ok(next.run(request).await);
    };
    let (mut parts, body) = request.into_parts();
    let line = format!("{} {}\n", parts.method, parts.uri);
    let fingerprint = is_multipart(&parts.headers).then(Fingerprint::default);
    let (body, body_sha256) = match &fingerprint {
        Some(_) => (body, hash(&line, b"")),
        None => {
            let bytes = parse::read_body(&parts.headers, body, state.config.json_limit).await?;
            let hash = hash(&line, &bytes);
            (Body::from(bytes), hash)
        }
    };
    let Some(mut identity) = identity(&parts.headers, caller, body_sha256, fingerprint.is_some())? else {
        return Ok(next.run(Request::from_parts(parts, body)).await);
    };
    let held = reserve(&state.db, &identity, fingerprint.is_some()).await?;
    if let Some(fingerprint) = &fingerprint {
        parts.extensions.insert(fingerprint.clone());
    }
    let request = Request::from_parts(parts, body);
    match held {
        Reservation::Taken => {}
        Reservation::Unanswered if identity.replays => return Err(ApiError::in_flight()),
        // Another request with the same body, meant as such: the two are nothing to each other.
        Reservation::Unanswered => return Ok(next.run(request).await),
        Reservation::Answered { body_sha256, status, response } => {
            if fingerprint.is_some() {
                identity.body_sha256 = hash(&line, multipart::fingerprint(&state, request).await?.as_bytes());
            }
            if body_sha256 != identity.body_sha256 {
                let message = "This `Idempotency-Key` was used with another request; use a new one.";
                return Err(ApiError::unprocessable("idempotency_key_reused", "Idempotency-Key", message));
            }
            return Ok(repeated(status, response));
        }
    }
    let answering = tokio::spawn(async move {
        let answer = next.run(request).await;
        let arrived = match &fingerprint {
            Some(fingerprint) => fingerprint.get().map(|form| hash(&line, form.as_bytes())),
            None => Some(identity.body_sha256.clone()),
        };
        keep(&state.db, identity, arrived, answer).await
    });
    answering.await.map_err(ApiError::internal)?
}

fn hash(line: &str, body: &[u8]) -> String {
    hex::encode(Sha256::new_with_prefix(line).chain_update(body).finalize())
}

fn is_multipart(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.trim_start().to_ascii_lowercase().starts_with("multipart/")
}

fn identity(headers: &HeaderMap, caller: Project, body_sha256: String, streamed: bool) -> Result<Option<Identity>, ApiError> {
    if let Some(key) = headers.get("idempotency-key") {
        let key = key.to_str().ok().filter(|key| (1..=255).contains(&key.len()));
        let key = key.ok_or_else(|| {
            ApiError::bad_request("Idempotency-Key", "`Idempotency-Key` must have 1 to 255 visible ASCII characters.")
        })?;
        let identity =
            Identity { project_id: caller.project_id, key: format!("key/{key}"), body_sha256, kept: 86_400.0, replays: true };
        return Ok(Some(identity));
    }
    let retries =
        headers.get("x-stainless-retry-count").and_then(|count| count.to_str().ok()).and_then(|count| count.parse::<u32>().ok());
    // A file's repetition is found by its content, in its handler.
    Ok(retries.filter(|_| !streamed).map(|retries| Identity {
        key: format!("retry/{}/{body_sha256}", caller.key_id),
        project_id: caller.project_id,
        body_sha256,
        kept: 600.0,
        replays: retries > 0,
    }))
}

/// What stands under an identity.
enum Reservation {
    /// It is this request's now.
    Taken,
    /// Another one's, which is being answered.
    Unanswered,
    Answered {
        body_sha256: String,
        status: StatusCode,
        response: Value,
    },
}

/// Takes the identity for this request unless it is taken. An unanswered reservation is void after a
/// minute (an hour for an upload): its server died.
async fn reserve(db: &PgPool, identity: &Identity, streamed: bool) -> Result<Reservation, ApiError> {
    let patience = if streamed { 3_600.0 } else { 60.0 };
    let taken = sqlx::query!(
        "INSERT INTO idempotent_requests AS held (project_id, key, body_sha256, expires_at)
         VALUES ($1, $2, $3, now() + make_interval(secs => $4))
         ON CONFLICT (project_id, key) DO UPDATE
            SET body_sha256 = excluded.body_sha256, status = NULL, response = NULL, created_at = now(), expires_at = excluded.expires_at
            WHERE held.expires_at <= now() OR (NOT $5 AND held.status IS NOT NULL)",
        identity.project_id,
        identity.key,
        identity.body_sha256,
        patience,
        identity.replays,
    )
    .execute(db)
    .await?;
    if taken.rows_affected() == 1 {
        return Ok(Reservation::Taken);
    }
    let held = sqlx::query!(
        "SELECT body_sha256, status, response FROM idempotent_requests WHERE project_id = $1 AND key = $2",
        identity.project_id,
        identity.key,
    )
    .fetch_optional(db)
    .await?;
    let Some(held) = held else { return Ok(Reservation::Unanswered) };
    // Another body is refused at once; a form's is compared when its own has arrived.
    if !streamed && held.body_sha256 != identity.body_sha256 {
        return Ok(Reservation::Answered { body_sha256: held.body_sha256, status: StatusCode::OK, response: Value::Null });
    }
    match (held.status.and_then(|status| StatusCode::from_u16(status as u16).ok()), held.response) {
        (Some(status), Some(response)) => Ok(Reservation::Answered { body_sha256: held.body_sha256, status, response }),
        _ => Ok(Reservation::Unanswered),
    }
}

fn repeated(status: StatusCode, response: Value) -> Response {
    let mut answer = (status, axum::Json(response)).into_response();
    answer.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    answer
}

/// Keeps an answer that will stay true to a request that has `arrived` (its hash); any other frees the
/// identity for the next attempt.
async fn keep(db: &PgPool, identity: Identity, arrived: Option<String>, answer: Response) -> Result<Response, ApiError> {
    let lasting = answer.status().is_success() || matches!(answer.status().as_u16(), 400 | 404 | 413 | 415 | 422);
    let (parts, body) = answer.into_parts();
    let bytes = parse::read_body(&parts.headers, body, ANSWER_LIMIT).await?;
    let kept = serde_json::from_slice::<Value>(&bytes).ok().filter(|_| lasting).zip(arrived);
    if let Err(error) = store(db, &identity, parts.status, kept.as_ref()).await {
        // What was asked for has happened; losing its record must not turn the answer into a failure.
        tracing::warn!(%error, "the answer to a creation waits for the database");
        tokio::spawn(store_later(db.clone(), identity, parts.status, kept));
    }
    Ok(Response::from_parts(parts, Body::from(bytes)))
}

async fn store(db: &PgPool, identity: &Identity, status: StatusCode, kept: Option<&(Value, String)>) -> Result<(), sqlx::Error> {
    let stored = match kept {
        Some((response, arrived)) => {
            sqlx::query!(
                "UPDATE idempotent_requests
                 SET status = $3, response = $4, expires_at = now() + make_interval(secs => $5), body_sha256 = $6
                 WHERE project_id = $1 AND key = $2",
                identity.project_id,
                identity.key,
                i32::from(status.as_u16()),
                response,
                identity.kept,
                arrived,
            )
            .execute(db)
            .await
        }
        None => {
            sqlx::query!("DELETE FROM idempotent_requests WHERE project_id = $1 AND key = $2", identity.project_id, identity.key)
                .execute(db)
                .await
        }
    };
    stored.map(drop)
}

/// Stores as soon as the database is back, before the reservation becomes void.
async fn store_later(db: PgPool, identity: Identity, status: StatusCode, kept: Option<(Value, String)>) {
    for _ in 0..100 {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        if store(&db, &identity, status, kept.as_ref()).await.is_ok() {
            return;
        }
    }
    tracing::error!("the answer to a creation could not be kept");
}
