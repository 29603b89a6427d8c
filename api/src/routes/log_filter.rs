//! `/v1/log_filter`: what every api and runner logs, while they run. Admin keys only.

use axum::{Json, extract::State};
use lathe_jobs::{
    audit::{self, Deed},
    log_filter,
};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{auth::Admin, logging, parse::Body, problem::ApiError, resource::seconds, state::AppState};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(get_log_filter, set_log_filter, delete_log_filter))
}

/// What the audit log calls it. There is one, of all projects; its entries are of the project of the key.
const RESOURCE: &str = "log_filter";

/// What is logged, by module.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"filter": "info,lathe_jobs=debug", "expires_after": 3600}))]
pub struct SetLogFilter {
    /// As `--log` takes it: a level, and levels of modules.
    #[schema(min_length = 1, max_length = 1000)]
    filter: String,
    /// Seconds until each process logs again what it was started with. None: until this is changed.
    #[schema(minimum = 1, maximum = 2592000)]
    expires_after: Option<i64>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "log_filter", "filter": "info,lathe_jobs=debug", "expires_at": 1767229200}))]
pub struct LogFilterObject {
    #[schema(examples("log_filter"))]
    object: &'static str,
    /// Null: each process logs what it was started with.
    filter: Option<String>,
    /// Unix seconds.
    expires_at: Option<i64>,
}

async fn current(db: &PgPool) -> Result<Json<LogFilterObject>, ApiError> {
    let (filter, expires_at) = log_filter::current(db).await?.map(|found| (found.filter, found.expires_at)).unzip();
    Ok(Json(LogFilterObject { object: "log_filter", filter, expires_at: expires_at.flatten().map(seconds) }))
}

/// Retrieve what is logged
#[utoipa::path(get, path = "/v1/log_filter", operation_id = "get_log_filter", tag = "operating", responses((status = 200, description = "The filter", body = LogFilterObject)))]
async fn get_log_filter(State(state): State<AppState>, _: Admin) -> Result<Json<LogFilterObject>, ApiError> {
    current(&state.db).await
}

/// Set what is logged
///
/// By every api and runner, within two seconds. Workers and engines keep to what their runner was started with.
#[utoipa::path(
    put, path = "/v1/log_filter", operation_id = "set_log_filter", tag = "operating", request_body = SetLogFilter,
    responses((status = 200, description = "The filter", body = LogFilterObject))
)]
async fn set_log_filter(
    State(state): State<AppState>,
    Admin(caller): Admin,
    Body(request): Body<SetLogFilter>,
) -> Result<Json<LogFilterObject>, ApiError> {
    if let Err(sentence) = logging::parse(&request.filter) {
        return Err(ApiError::unprocessable("invalid_log_filter", "filter", format!("{sentence}.")));
    }
    let mut tx = state.db.begin().await?;
    log_filter::set(&mut *tx, &request.filter, request.expires_after).await?;
    audit::record(&mut tx, caller.did(Deed::LogFilterSet, RESOURCE)).await?;
    tx.commit().await?;
    current(&state.db).await
}

/// Log again what each process was started with
#[utoipa::path(delete, path = "/v1/log_filter", operation_id = "delete_log_filter", tag = "operating", responses((status = 200, description = "No filter", body = LogFilterObject)))]
async fn delete_log_filter(State(state): State<AppState>, Admin(caller): Admin) -> Result<Json<LogFilterObject>, ApiError> {
    let mut tx = state.db.begin().await?;
    if log_filter::clear(&mut *tx).await? {
        audit::record(&mut tx, caller.did(Deed::LogFilterDeleted, RESOURCE)).await?;
    }
    tx.commit().await?;
    current(&state.db).await
}
