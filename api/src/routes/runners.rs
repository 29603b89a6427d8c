//! `/v1/runners`: the processes that do the work. Admin keys only.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Admin,
    page::{List, Order, Page},
    parse::Query,
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_runners))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunnerState {
    Live,
    Lost,
    Stopped,
}

impl RunnerState {
    fn as_str(self) -> &'static str {
        match self {
            RunnerState::Live => "live",
            RunnerState::Lost => "lost",
            RunnerState::Stopped => "stopped",
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct RunnerObject {
    #[schema(examples("runner_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    id: String,
    #[schema(examples("runner"))]
    object: &'static str,
    name: String,
    host: String,
    pid: i32,
    version: String,
    /// `live`, `lost` (its lease ran out) or `stopped`.
    #[schema(examples("live"))]
    state: String,
    /// What was found and why.
    devices: Value,
    light_slots: i32,
    device_slots: i32,
    /// The jobs that it runs now.
    jobs: Vec<String>,
    /// Unix seconds.
    started_at: i64,
    expires_at: i64,
    stopped_at: Option<i64>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListRunners {
    /// The id of the last item of the page before.
    after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    #[param(inline)]
    state: Option<RunnerState>,
}

/// List runners, stopped ones too
#[utoipa::path(get, path = "/v1/runners", operation_id = "list_runners", tag = "operating", params(ListRunners), responses((status = 200, description = "A page", body = List<RunnerObject>)))]
async fn list_runners(
    State(state): State<AppState>,
    _: Admin,
    Query(query): Query<ListRunners>,
) -> Result<Json<List<RunnerObject>>, ApiError> {
    let mut page = Page::first(query.limit.unwrap_or(20), query.order);
    if let Some(id) = query.after {
        let started_at =
            sqlx::query_scalar!("SELECT started_at FROM runners WHERE id = $1", id).fetch_optional(&state.db).await?;
        page = page.after(id, started_at)?;
    }
    let rows = sqlx::query!(
        r#"SELECT id, name, host, pid, version, state AS "state!", devices, light_slots, device_slots, started_at, expires_at, stopped_at,
                  ARRAY(SELECT job_id FROM job_attempts a WHERE a.runner_id = r.id AND a.ended_at IS NULL) AS "jobs!"
           FROM (SELECT *, CASE WHEN stopped_at IS NOT NULL THEN 'stopped' WHEN expires_at <= now() THEN 'lost' ELSE 'live' END AS state FROM runners) r
           WHERE ($1::text IS NULL OR state = $1)
             AND ($2::timestamptz IS NULL OR CASE WHEN $4 THEN (started_at, id) > ($2, $3) ELSE (started_at, id) < ($2, $3) END)
           ORDER BY CASE WHEN $4 THEN started_at END, CASE WHEN $4 THEN id END, started_at DESC, id DESC LIMIT $5"#,
        query.state.map(RunnerState::as_str),
        page.after,
        page.after_id,
        page.ascending,
        page.fetch(),
    )
    .fetch_all(&state.db)
    .await?;
    let runners = rows.into_iter().map(|row| RunnerObject {
        id: row.id,
        object: "runner",
        name: row.name,
        host: row.host,
        pid: row.pid,
        version: row.version,
        state: row.state,
        devices: row.devices,
        light_slots: row.light_slots,
        device_slots: row.device_slots,
        jobs: row.jobs,
        started_at: row.started_at.unix_timestamp(),
        expires_at: row.expires_at.unix_timestamp(),
        stopped_at: row.stopped_at.map(time::OffsetDateTime::unix_timestamp),
    });
    Ok(Json(List::of(runners.collect(), &page, |runner| &runner.id)))
}
