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
//! The answer is kept in the transaction that creates ([`Creation::commit`]): whenever a server dies,
//! either both are there or neither, and a repetition is answered with what was made or makes it.
//!
//! A creation goes on when its client is gone, so that the retry finds its answer.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use lathe_jobs::{
    trace::FutureExt,
    waiting::{answered, patient},
};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::{PgExecutor, PgPool, Postgres, Transaction};
use time::OffsetDateTime;

use crate::{
    auth::Project,
    commit::commit,
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

/// How long an identity stays taken by a request whose server no longer says that it answers it, and how
/// often that is said.
const RESERVED_SECONDS: f64 = 60.0;
const RENEWED: Duration = Duration::from_secs(5);

/// What makes two requests the same one.
#[derive(Clone, Debug)]
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

/// How the handler of a creation ends it. Of a request that no other repeats, it keeps nothing.
#[derive(Clone, Debug, Default)]
pub struct Creation(Option<Arc<Reserved>>);

/// An identity that is this request's.
#[derive(Debug)]
struct Reserved {
    identity: Identity,
    /// When it was taken, by the database's clock; whoever takes it over later has another time.
    since: OffsetDateTime,
    /// The request's line, and what tells a form's fields once they have arrived.
    line: String,
    fingerprint: Option<Fingerprint>,
}

impl Reserved {
    /// The hash of a request that has wholly arrived.
    fn body_sha256(&self) -> Option<String> {
        match &self.fingerprint {
            Some(fingerprint) => fingerprint.get().map(|form| hash(&self.line, form.as_bytes())),
            None => Some(self.identity.body_sha256.clone()),
        }
    }
}

impl Creation {
    /// Commits what was created together with the answer to whoever repeats the request.
    ///
    /// # Errors
    /// 409 where the request took so long that a repetition of it was let in; nothing is created then.
    pub async fn commit<T: Serialize>(
        &self,
        db: &PgPool,
        mut tx: Transaction<'_, Postgres>,
        status: StatusCode,
        answer: &T,
    ) -> Result<(), ApiError> {
        if let Some(reserved) = &self.0
            && let Some(body_sha256) = reserved.body_sha256()
        {
            let response = serde_json::to_value(answer).map_err(ApiError::internal)?;
            let kept = Kept { status, response, body_sha256 };
            if !store(&mut *tx, reserved, &kept).await? {
                return Err(ApiError::in_flight());
            }
        }
        Ok(commit(db, tx).await?)
    }
}

impl<S: Sync> FromRequestParts<S> for Creation {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Creation, Infallible> {
        Ok(parts.extensions.get().cloned().unwrap_or_default())
    }
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
    let mut request = Request::from_parts(parts, body);
    let since = match held {
        Reservation::Taken { since } => since,
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
    };
    let reserved = Arc::new(Reserved { identity, since, line, fingerprint });
    request.extensions_mut().insert(Creation(Some(reserved.clone())));
    let answering = async move {
        let answer = tokio::select! {
            answer = next.run(request) => answer,
            never = stay_reserved(&state.db, &reserved) => match never {},
        };
        answered(keep_refusal(&state.db, reserved, answer)).await
    };
    patient(tokio::spawn(answering.with_current_context())).await.map_err(ApiError::internal)?
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
    Taken {
        since: OffsetDateTime,
    },
    /// Another one's, which is being answered.
    Unanswered,
    Answered {
        body_sha256: String,
        status: StatusCode,
        response: Value,
    },
}

/// Takes the identity for this request unless it is taken. A reservation that is neither answered nor
/// renewed is void after a minute: its server died before it created anything, or can no longer.
async fn reserve(db: &PgPool, identity: &Identity, streamed: bool) -> Result<Reservation, ApiError> {
    let taken = sqlx::query_scalar!(
        "INSERT INTO idempotent_requests AS held (project_id, key, body_sha256, expires_at)
         VALUES ($1, $2, $3, now() + make_interval(secs => $4))
         ON CONFLICT (project_id, key) DO UPDATE
            SET body_sha256 = excluded.body_sha256, status = NULL, response = NULL, created_at = now(), expires_at = excluded.expires_at
            WHERE held.expires_at <= now() OR (NOT $5 AND held.status IS NOT NULL)
         RETURNING created_at",
        identity.project_id,
        identity.key,
        identity.body_sha256,
        RESERVED_SECONDS,
        identity.replays,
    )
    .fetch_optional(db)
    .await?;
    if let Some(since) = taken {
        return Ok(Reservation::Taken { since });
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

/// Renews the reservation for as long as its request is being answered.
async fn stay_reserved(db: &PgPool, reserved: &Reserved) -> Infallible {
    loop {
        tokio::time::sleep(RENEWED).await;
        let renewal = sqlx::query!(
            "UPDATE idempotent_requests SET expires_at = now() + make_interval(secs => $4)
             WHERE project_id = $1 AND key = $2 AND created_at = $3 AND status IS NULL",
            reserved.identity.project_id,
            reserved.identity.key,
            reserved.since,
            RESERVED_SECONDS,
        );
        // Where it cannot be, it runs out; what another makes meanwhile is then the only one.
        if let Err(error) = answered(renewal.execute(db)).await {
            tracing::warn!(%error, "a request's idempotency key could not be renewed");
        }
    }
}

fn repeated(status: StatusCode, response: Value) -> Response {
    let mut answer = (status, axum::Json(response)).into_response();
    answer.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    answer
}

/// An answer for whoever repeats its request.
struct Kept {
    status: StatusCode,
    response: Value,
    /// Of the request.
    body_sha256: String,
}

/// Keeps a refusal that will stay true; what was created has kept its answer itself. Any other answer
/// frees the identity for the next attempt.
async fn keep_refusal(db: &PgPool, reserved: Arc<Reserved>, answer: Response) -> Result<Response, ApiError> {
    let lasting = answer.status().is_success() || matches!(answer.status().as_u16(), 400 | 404 | 413 | 415 | 422);
    let (parts, body) = answer.into_parts();
    let bytes = parse::read_body(&parts.headers, body, ANSWER_LIMIT).await?;
    let response = serde_json::from_slice::<Value>(&bytes).ok().filter(|_| lasting);
    let kept = response.zip(reserved.body_sha256());
    let kept = kept.map(|(response, body_sha256)| Kept { status: parts.status, response, body_sha256 });
    let done = match &kept {
        // The database keeps no U+0000, which the name of a refused field may hold. Refused anew is as good.
        Some(kept) if parse::find_nul(&kept.response, String::new()).is_none() => store(db, &reserved, kept).await.map(drop),
        _ => free(db, &reserved).await,
    };
    if let Err(error) = done {
        // The reservation runs out by itself.
        tracing::warn!(%error, "a request's idempotency key stays taken for a while");
    }
    Ok(Response::from_parts(parts, Body::from(bytes)))
}

/// False: the identity is another's, or has its answer already.
async fn store(db: impl PgExecutor<'_>, reserved: &Reserved, kept: &Kept) -> Result<bool, sqlx::Error> {
    let identity = &reserved.identity;
    let stored = sqlx::query!(
        "UPDATE idempotent_requests
         SET status = $4, response = $5, expires_at = now() + make_interval(secs => $6), body_sha256 = $7
         WHERE project_id = $1 AND key = $2 AND created_at = $3 AND status IS NULL",
        identity.project_id,
        identity.key,
        reserved.since,
        i32::from(kept.status.as_u16()),
        kept.response,
        identity.kept,
        kept.body_sha256,
    )
    .execute(db)
    .await?;
    Ok(stored.rows_affected() == 1)
}

async fn free(db: &PgPool, reserved: &Reserved) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "DELETE FROM idempotent_requests WHERE project_id = $1 AND key = $2 AND created_at = $3 AND status IS NULL",
        reserved.identity.project_id,
        reserved.identity.key,
        reserved.since,
    )
    .execute(db)
    .await
    .map(drop)
}
