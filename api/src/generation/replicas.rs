//! The API's half of serving: finds a model's replica, or asks the runners for one, and waits.
//!
//! A replica is a leased row (see `lathe_jobs::replicas` for the runner's half). At most one live
//! row stands for a folder, which the database's unique index keeps true when requests race.

use std::time::Duration;

use lathe_model::engine::EngineConfig;
use sqlx::PgPool;
use tokio::time::Instant;

use super::models::{Model, no_model};
use crate::problem::ApiError;

/// After a failure the same answer is given for this long, and no engine is started.
const HOLD_OFF: Duration = Duration::from_secs(10);

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

/// Waits until the model is served, at most until `deadline`.
///
/// # Errors
/// 503 `model_loading` after the deadline, 503 `model_failed` where the engine could not start, 404 where
/// the model was deleted meanwhile.
pub async fn endpoint(db: &PgPool, model: &Model, deadline: Instant) -> Result<Endpoint, ApiError> {
    let mut poll = Duration::from_millis(20);
    let asked = Instant::now();
    loop {
        match standing(db, model, asked.elapsed()).await? {
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

async fn standing(db: &PgPool, model: &Model, waited: Duration) -> Result<Standing, ApiError> {
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
    let failed = sqlx::query_scalar!(
        r#"SELECT error ->> 'message' FROM replicas
           WHERE artifact = $1 AND state = 'failed' AND stopped_at > now() - make_interval(secs => $2)
           ORDER BY stopped_at DESC LIMIT 1"#,
        model.artifact,
        waited.max(HOLD_OFF).as_secs_f64()
    )
    .fetch_optional(db)
    .await?;
    if let Some(reason) = failed {
        return Ok(Standing::Failed(reason.unwrap_or_else(|| "its engine ended without a reason".into())));
    }
    ask(db, model).await?;
    Ok(Standing::Loading)
}

/// Asks the runners to serve the model.
async fn ask(db: &PgPool, model: &Model) -> Result<(), ApiError> {
    let id = lathe_jobs::ids::new("replica");
    let memory_bytes = EngineConfig::default().reserved_bytes(&model.config);
    // The lock waits for a deletion under way, and then finds the model deleted.
    let asked = sqlx::query_scalar!(
        r#"WITH model AS (SELECT id FROM models WHERE id = $2 AND deleted_at IS NULL FOR SHARE),
           asked AS (INSERT INTO replicas (id, model_id, checkpoint_id, artifact, state, memory_bytes)
                     SELECT $1, id, $3, $4, 'queued', $5 FROM model ON CONFLICT DO NOTHING)
           SELECT EXISTS (SELECT FROM model) AS "there!""#,
        id,
        model.model_id,
        model.checkpoint_id,
        model.artifact,
        i64::try_from(memory_bytes).unwrap_or(i64::MAX)
    )
    .fetch_one(db)
    .await;
    let there = match asked {
        // A checkpoint that was pruned meanwhile.
        Err(error) if error.as_database_error().is_some_and(|refused| refused.is_foreign_key_violation()) => false,
        asked => asked?,
    };
    if !there {
        return Err(no_model(&model.id));
    }
    sqlx::query!("SELECT pg_notify('lathe_replicas', $1)", id).execute(db).await?;
    Ok(())
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
