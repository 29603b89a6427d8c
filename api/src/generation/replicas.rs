//! The API's half of serving: finds a model's replica, or asks the runners for one, and waits.
//!
//! A replica is a leased row (see `lathe_jobs::replicas` for the runner's half). At most one live
//! row stands for a folder, which the database's unique index keeps true when requests race.

use std::time::{Duration, Instant};

use sqlx::PgPool;

use super::models::Model;
use crate::problem::ApiError;

/// How long a request waits for a model to load before 503 `model_loading`.
pub const LOADING_PATIENCE: Duration = Duration::from_secs(60);

/// Where a model is served.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub replica_id: String,
    pub address: String,
    pub secret: String,
}

enum Standing {
    Ready(Endpoint),
    Loading,
    Failed(String),
}

/// Waits until the model's folder is served.
///
/// # Errors
/// 503 `model_loading` after [`LOADING_PATIENCE`], 503 `model_failed` where the engine could not start.
pub async fn endpoint(db: &PgPool, model: &Model) -> Result<Endpoint, ApiError> {
    let deadline = Instant::now() + LOADING_PATIENCE;
    let mut poll = Duration::from_millis(20);
    let asked_at = std::time::SystemTime::now();
    loop {
        match standing(db, model, asked_at).await? {
            Standing::Ready(endpoint) => return Ok(endpoint),
            Standing::Failed(reason) => {
                return Err(ApiError::unavailable("model_failed", 10, format!("The model could not be loaded: {reason}")));
            }
            Standing::Loading if Instant::now() >= deadline => {
                let message = "The model is still loading; try again in a few seconds. If this persists, look whether a runner is at work (GET /v1/runners).";
                return Err(ApiError::unavailable("model_loading", 5, message));
            }
            Standing::Loading => {
                tokio::time::sleep(poll).await;
                poll = (poll * 2).min(Duration::from_millis(250));
            }
        }
    }
}

async fn standing(db: &PgPool, model: &Model, asked_at: std::time::SystemTime) -> Result<Standing, ApiError> {
    let live = sqlx::query!(
        r#"SELECT id, state, address, secret FROM replicas
           WHERE artifact = $1 AND state IN ('queued', 'starting', 'ready')"#,
        model.artifact
    )
    .fetch_optional(db)
    .await?;
    if let Some(row) = live {
        return Ok(match (row.state.as_str(), row.address, row.secret) {
            ("ready", Some(address), Some(secret)) => Standing::Ready(Endpoint { replica_id: row.id, address, secret }),
            _ => Standing::Loading,
        });
    }
    let waited = asked_at.elapsed().unwrap_or_default().as_secs_f64();
    let failed = sqlx::query_scalar!(
        r#"SELECT error ->> 'message' FROM replicas
           WHERE artifact = $1 AND state = 'failed' AND stopped_at > now() - make_interval(secs => $2)
           ORDER BY stopped_at DESC LIMIT 1"#,
        model.artifact,
        waited
    )
    .fetch_optional(db)
    .await?;
    if let Some(reason) = failed {
        return Ok(Standing::Failed(reason.unwrap_or_else(|| "its engine ended without a reason".into())));
    }
    let id = lathe_jobs::ids::new("replica");
    sqlx::query!(
        r#"INSERT INTO replicas (id, model_id, checkpoint_id, artifact, state, memory_bytes) VALUES ($1, $2, $3, $4, 'queued', $5)
           ON CONFLICT DO NOTHING"#,
        id,
        model.model_id,
        model.checkpoint_id,
        model.artifact,
        model.bytes
    )
    .execute(db)
    .await
    .map_err(|error| match error.as_database_error().is_some_and(|refused| refused.is_foreign_key_violation()) {
        // A checkpoint that was pruned meanwhile.
        true => ApiError::not_found("model", &model.id).with_code("model_not_found"),
        false => error.into(),
    })?;
    sqlx::query!("SELECT pg_notify('lathe_replicas', $1)", id).execute(db).await?;
    Ok(Standing::Loading)
}

/// Keeps a replica from being unloaded as idle. At most a write every few seconds and replica.
pub async fn touch(db: &PgPool, replica_id: &str) -> Result<(), ApiError> {
    sqlx::query!(
        "UPDATE replicas SET last_used_at = now() WHERE id = $1 AND last_used_at < now() - interval '5 seconds'",
        replica_id
    )
    .execute(db)
    .await?;
    Ok(())
}
