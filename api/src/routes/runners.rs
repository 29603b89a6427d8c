//! `/v1/runners`: the processes that do the work. Admin keys only.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Admin,
    page::{List, Order, Page, fetch_page},
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
    /// It takes no work; `refused` says why.
    Refused,
    /// Its lease ran out.
    Lost,
    Stopped,
}

impl RunnerState {
    fn as_str(self) -> &'static str {
        match self {
            RunnerState::Live => "live",
            RunnerState::Refused => "refused",
            RunnerState::Lost => "lost",
            RunnerState::Stopped => "stopped",
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "runner_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "runner", "name": "node-1", "host": "node-1", "pid": 4711, "version": "0.1.0", "state": "live",
    "devices": [{"kind": "cpu"}], "light_slots": 1, "device_slots": 1, "jobs": ["ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N"], "started_at": 1767225600, "expires_at": 1767225610, "stopped_at": null}))]
pub struct RunnerObject {
    #[schema(examples("runner_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    id: String,
    #[schema(examples("runner"))]
    object: &'static str,
    name: String,
    host: String,
    pid: i32,
    version: String,
    #[schema(value_type = RunnerState)]
    state: String,
    /// Why it takes no work, in a sentence.
    refused: Option<String>,
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
    #[param(min_length = 1)]
    after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    /// Only those in this state.
    #[param(inline)]
    state: Option<RunnerState>,
    /// Only those of this name.
    name: Option<String>,
}

struct RunnerRow {
    id: String,
    name: String,
    host: String,
    pid: i32,
    version: String,
    state: String,
    refused: Option<String>,
    devices: Value,
    light_slots: i32,
    device_slots: i32,
    started_at: OffsetDateTime,
    expires_at: OffsetDateTime,
    stopped_at: Option<OffsetDateTime>,
    jobs: Vec<String>,
}

/// List runners, stopped ones too
#[utoipa::path(get, path = "/v1/runners", operation_id = "list_runners", tag = "operating", params(ListRunners), responses((status = 200, description = "A page", body = List<RunnerObject>)))]
async fn list_runners(
    State(state): State<AppState>,
    _: Admin,
    Query(query): Query<ListRunners>,
) -> Result<Json<List<RunnerObject>>, ApiError> {
    let page = Page::asked(query.limit.unwrap_or(20), query.order, query.after, async |id| {
        sqlx::query_scalar!("SELECT started_at FROM runners WHERE id = $1", id).fetch_optional(&state.db).await
    })
    .await?;
    let rows = fetch_page!(
        RunnerRow,
        &state.db,
        &page,
        r#"SELECT id, name, host, pid, version, state AS "state!", refused, devices, light_slots, device_slots, started_at, expires_at, stopped_at,
                  ARRAY(SELECT job_id FROM job_attempts a WHERE a.runner_id = r.id AND a.ended_at IS NULL) AS "jobs!"
           FROM (SELECT *, started_at AS created_at,
                        CASE WHEN stopped_at IS NOT NULL THEN 'stopped' WHEN expires_at <= now() THEN 'lost'
                             WHEN refused IS NOT NULL THEN 'refused' ELSE 'live' END AS state FROM runners) r
           WHERE ($4::text IS NULL OR state = $4) AND ($5::text IS NULL OR name = $5)"#,
        query.state.map(RunnerState::as_str),
        query.name,
    )?;
    let runners = rows.into_iter().map(|row| RunnerObject {
        id: row.id,
        object: "runner",
        name: row.name,
        host: row.host,
        pid: row.pid,
        version: row.version,
        state: row.state,
        refused: row.refused,
        devices: row.devices,
        light_slots: row.light_slots,
        device_slots: row.device_slots,
        jobs: row.jobs,
        started_at: row.started_at.unix_timestamp(),
        expires_at: row.expires_at.unix_timestamp(),
        stopped_at: row.stopped_at.map(OffsetDateTime::unix_timestamp),
    });
    Ok(Json(List::of(runners.collect(), &page, |runner| &runner.id)))
}
