//! `/healthz`: the process answers. `/readyz`: it can do its work, with the reason if it cannot.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{problem::ApiError, state::AppState};

/// What a server that is not ready asks its prober to wait.
const RETRY_AFTER_SECONDS: &str = "2";

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(get_health)).routes(routes!(get_readiness))
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"status": "ok", "version": "0.1.0"}))]
pub struct Health {
    #[schema(examples("ok"))]
    status: &'static str,
    version: &'static str,
}

/// Whether the process lives
#[utoipa::path(get, path = "/healthz", operation_id = "get_health", tag = "health", responses((status = 200, description = "It does", body = Health)))]
async fn get_health() -> Json<Health> {
    Json(Health { status: "ok", version: env!("CARGO_PKG_VERSION") })
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"ready": true, "checks": [{"name": "database", "ok": true, "detail": "reachable"}]}))]
pub struct Readiness {
    ready: bool,
    checks: Vec<Check>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Check {
    /// `database`, `migrations`, `disk` or `runners`.
    name: &'static str,
    ok: bool,
    /// What was found, and what to do where it is not as it should be.
    detail: String,
}

/// Whether the server can do its work
///
/// Checks the database, its migrations, the disk's low mark and that a runner is there.
#[utoipa::path(
    get, path = "/readyz", operation_id = "get_readiness", tag = "health",
    responses((status = 200, description = "Ready", body = Readiness), (status = 503, description = "Not ready; `checks` says why", body = Readiness))
)]
async fn get_readiness(State(state): State<AppState>) -> Response {
    let checks =
        vec![check_database(&state).await, check_migrations(&state).await, check_disk(&state).await, check_runners(&state).await];
    let ready = checks.iter().all(|check| check.ok);
    let readiness = Json(Readiness { ready, checks });
    if ready {
        return readiness.into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, RETRY_AFTER_SECONDS)], readiness).into_response()
}

async fn check_database(state: &AppState) -> Check {
    let answer = sqlx::query("SELECT 1").execute(&state.db).await;
    let (ok, detail) = match answer {
        Ok(_) => (true, "reachable".to_owned()),
        Err(error) => (false, ApiError::from(error).body.error.message),
    };
    Check { name: "database", ok, detail }
}

/// The newest migration in the database must be the newest one that this binary knows.
async fn check_migrations(state: &AppState) -> Check {
    let known = crate::MIGRATOR.iter().map(|migration| migration.version).max();
    let applied: Result<Option<i64>, _> =
        sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success").fetch_one(&state.db).await;
    let (ok, detail) = match applied {
        Ok(applied) if applied == known => (true, format!("at {}", known.unwrap_or_default())),
        Ok(applied) => (
            false,
            format!(
                "the database is at {} and this binary at {}; run `lathe migrate` of the newer one",
                applied.unwrap_or_default(),
                known.unwrap_or_default()
            ),
        ),
        Err(_) => (false, "the database's migrations cannot be read".to_owned()),
    };
    Check { name: "migrations", ok, detail }
}

async fn check_disk(state: &AppState) -> Check {
    let low = state.config.disk_low_bytes;
    let (ok, detail) = match state.free_bytes().await {
        Ok(free) if free >= low => (true, format!("{free} bytes free")),
        Ok(free) => (false, format!("{free} bytes are free and the low mark is {low}; delete what is no longer needed")),
        Err(error) => {
            tracing::warn!(%error, "the artifacts' file system cannot be read");
            (false, "the artifacts' file system cannot be read".to_owned())
        }
    };
    Check { name: "disk", ok, detail }
}

async fn check_runners(state: &AppState) -> Check {
    let live = sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM runners WHERE stopped_at IS NULL AND expires_at > now() AND refused IS NULL"#
    )
    .fetch_one(&state.db)
    .await;
    let (ok, detail) = match live {
        Ok(0) => (
            false,
            "no runner is at work, so jobs wait; start `lathe runner`, or see in /v1/runners why one is refused".to_owned(),
        ),
        Ok(live) => (true, format!("{live} there")),
        Err(_) => (false, "the runners cannot be read".to_owned()),
    };
    Check { name: "runners", ok, detail }
}
