//! Who asks: bearer keys, hashed at rest, looked up before any body is read.
//!
//! [`require_key`] wraps every route under `/v1`, so none can forget it; [`Project`] and [`Admin`]
//! hand the caller to a handler. Secrets are never stored or logged.

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, header, request::Parts},
    middleware::Next,
    response::Response,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use lathe_jobs::{
    audit::{self, Actor, Deed, Entry},
    ids,
};
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection};

pub use crate::caller::{Project, Scope};
use crate::{problem::ApiError, state::AppState};

/// The id of the project that the bootstrap key belongs to.
pub const DEFAULT_PROJECT: &str = "proj_default";

/// A caller whose key has the scope `admin`.
#[derive(Clone, Debug)]
pub struct Admin(pub Project);

impl FromRequestParts<AppState> for Project {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        match parts.extensions.get::<Project>() {
            Some(caller) => Ok(caller.clone()),
            None => caller(state, &parts.headers).await,
        }
    }
}

impl FromRequestParts<AppState> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let caller = Project::from_request_parts(parts, state).await?;
        if caller.scope != Scope::Admin {
            return Err(ApiError::forbidden("This needs a key of scope `admin`."));
        }
        Ok(Admin(caller))
    }
}

/// Middleware: 401 without a valid key; with one, the caller is in the request's extensions.
pub async fn require_key(State(state): State<AppState>, mut request: Request, next: Next) -> Result<Response, ApiError> {
    let caller = caller(&state, request.headers()).await?;
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

/// The secret in `Authorization: Bearer …`.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, secret) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim()).filter(|secret| !secret.is_empty())
}

async fn caller(state: &AppState, headers: &HeaderMap) -> Result<Project, ApiError> {
    let hash = hash(bearer(headers).ok_or_else(ApiError::unauthorized)?);
    if let Some(caller) = state.keys.get(&hash) {
        return Ok(caller);
    }
    let row = sqlx::query!("SELECT id, project_id, scope FROM api_keys WHERE hash = $1 AND revoked_at IS NULL", hash)
        .fetch_optional(&state.db)
        .await?
        .ok_or_else(ApiError::unauthorized)?;
    let scope = if row.scope == "admin" { Scope::Admin } else { Scope::Project };
    let caller = Project { project_id: row.project_id, key_id: row.id, scope };
    state.keys.put(hash, caller.clone());
    Ok(caller)
}

fn hash(secret: &str) -> String {
    hex::encode(Sha256::digest(secret))
}

/// A key just made; the only moment at which its secret is known.
#[derive(Debug)]
pub struct NewKey {
    pub id: String,
    pub secret: String,
}

/// A new key's secret: 256 random bits.
pub fn new_secret() -> String {
    format!("sk-lathe-{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// Makes a key for a project that exists.
pub async fn create_key(
    conn: &mut PgConnection,
    project_id: &str,
    name: Option<&str>,
    scope: Scope,
) -> Result<NewKey, sqlx::Error> {
    let secret = new_secret();
    let id = insert_key(conn, project_id, name, scope, &secret).await?;
    Ok(NewKey { id, secret })
}

async fn insert_key(
    conn: &mut PgConnection,
    project_id: &str,
    name: Option<&str>,
    scope: Scope,
    secret: &str,
) -> Result<String, sqlx::Error> {
    let id = ids::new("key");
    let hint: String = secret.chars().rev().take(4).collect::<Vec<_>>().into_iter().rev().collect();
    sqlx::query!(
        "INSERT INTO api_keys (id, project_id, name, scope, hash, hint) VALUES ($1, $2, $3, $4, $5, $6)",
        id,
        project_id,
        name,
        scope.as_str(),
        hash(secret),
        hint,
    )
    .execute(conn)
    .await?;
    Ok(id)
}

/// Makes sure that `secret` is an admin key of the project `default`, which is made if it is not
/// there. A key that was revoked stays revoked.
pub async fn bootstrap(conn: &mut PgConnection, secret: &str) -> Result<(), sqlx::Error> {
    sqlx::query!("INSERT INTO projects (id, name) VALUES ($1, 'default') ON CONFLICT DO NOTHING", DEFAULT_PROJECT)
        .execute(&mut *conn)
        .await?;
    let known = sqlx::query_scalar!("SELECT id FROM api_keys WHERE hash = $1", hash(secret)).fetch_optional(&mut *conn).await?;
    if known.is_none() {
        let mut tx = conn.begin().await?;
        match insert_key(&mut tx, DEFAULT_PROJECT, Some("bootstrap"), Scope::Admin, secret).await {
            // Another process that starts at the same time made it.
            Err(sqlx::Error::Database(error)) if error.constraint() == Some("api_keys_hash_unique") => {}
            made => {
                let (actor, deed) = (Actor::System, Deed::KeyCreated);
                audit::record(&mut tx, Entry { project_id: DEFAULT_PROJECT, actor, deed, resource_id: &made? }).await?;
                tx.commit().await?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bearer_credentials_count() {
        let with = |value: &'static str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        assert_eq!(bearer(&with("Bearer abc")), Some("abc"));
        assert_eq!(bearer(&with("bearer  abc ")), Some("abc"));
        for wrong in ["abc", "Basic abc", "Bearer", "Bearer  "] {
            assert_eq!(bearer(&with(wrong)), None, "{wrong}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }
}
