//! `/v1/training/jobs`: pretraining and tuning. This module holds what a job looks like and how one
//! is found; beside it, one file per concern.

pub(super) mod control;
pub(super) mod create;
pub mod events;
mod metrics;
pub(super) mod outputs;

use axum::{Json, extract::State};
use lathe_jobs::{
    spec::Spec,
    state::{JobState, RankState},
};
use lathe_model::{
    config::{JobSpec, Layout},
    protocol::Phase,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Project,
    metadata::Metadata,
    names::names,
    page::{List, Order, Page, fetch_page},
    parse::{Path, Query},
    problem::ApiError,
    resource::FailureDetail,
    state::AppState,
    train_request::{CoordinatesObject, HyperparametersBody, MethodBody, ParallelismBody, ValidationBody},
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create::create_training_job, list_training_jobs))
        .routes(routes!(get_training_job, control::delete_training_job))
        .merge(control::router())
        .merge(events::router())
        .merge(metrics::router())
        .merge(outputs::router())
}

names! {
    /// Where a job stands. One that waits to be tried again is `queued` with `run_after` ahead.
    JobStateName(JobState),
    /// What a running job is at.
    PhaseName(Phase),
}

/// Why a queued job is not claimed although its turn may have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitingFor {
    /// The project runs as many jobs as it may.
    RunningJobsQuota,
}

/// A training job. Times are unix seconds with milliseconds behind the point.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "training.job", "name": "small", "state": "running", "phase": "training",
    "method": {"type": "pretrain", "objective": "causal_lm"}, "model": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "model_config": {"architecture": "gpt", "layers": 4, "vocabulary": 1024},
    "base_model": null, "dataset": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "tokenizer": "tok_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "validation": {"fraction": 0.05},
    "hyperparameters": {"steps": 2000, "batch_size": 12, "precision": "fp32"}, "parallelism": {"data": 1}, "ranks": [], "priority": 0, "after": [], "queue_position": null, "waiting_for": null, "run_after": null,
    "step": 420, "steps": 2000, "loss": 2.31, "tokens_per_second": 21000.0, "trained_tokens": null, "eta_seconds": 57.8,
    "created_at": 1767225600.25, "started_at": 1767225600.31, "first_step_at": 1767225602.1, "finished_at": null, "attempts": 1, "failures": 0, "error": null,
    "checkpoints": [{"id": "ftckpt_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "step": 400, "best": true}], "metadata": {}}))]
pub struct TrainingJobObject {
    #[schema(examples("ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N"))]
    id: String,
    #[schema(examples("training.job"))]
    object: &'static str,
    name: Option<String>,
    state: JobStateName,
    /// While it runs.
    phase: Option<PhaseName>,
    method: Option<MethodBody>,
    /// Id of the model that it makes, from the beginning.
    model: Option<String>,
    /// The shape, every field resolved; `vocabulary` is 0 until the tokenizer is known.
    #[schema(value_type = Option<Object>)]
    model_config: Option<Value>,
    base_model: Option<String>,
    dataset: Option<String>,
    tokenizer: Option<String>,
    validation: Option<ValidationBody>,
    /// Resolved; null for what the first attempt still has to decide.
    hyperparameters: Option<HyperparametersBody>,
    parallelism: Option<ParallelismBody>,
    /// Of the newest attempt.
    ranks: Vec<RankObject>,
    priority: i32,
    after: Vec<String>,
    /// 1: the next of its kind to be claimed. Only while it is queued.
    queue_position: Option<i64>,
    /// Why it waits although its turn may have come.
    waiting_for: Option<WaitingFor>,
    /// When it is tried, where that lies ahead.
    run_after: Option<f64>,
    /// The last finished step.
    step: i64,
    steps: Option<i64>,
    loss: Option<f64>,
    /// Of the last step: tokens that are no padding over the time of the step, without evaluations and
    /// checkpoints.
    tokens_per_second: Option<f64>,
    /// Supervised tokens in all, once it has succeeded.
    trained_tokens: Option<i64>,
    /// At the pace of this attempt so far, evaluations and checkpoints included.
    eta_seconds: Option<f64>,
    created_at: f64,
    started_at: Option<f64>,
    first_step_at: Option<f64>,
    finished_at: Option<f64>,
    /// Attempts begun, interrupted ones too.
    attempts: i32,
    /// Attempts that failed; at `hyperparameters.max_attempts` the job does.
    failures: i32,
    error: Option<FailureDetail>,
    checkpoints: Vec<CheckpointNote>,
    metadata: Metadata,
}

names! {
    RankStateName(RankState),
}

/// A process that trains.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"rank": 1, "runner": "runner_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "device": {"kind": "cpu", "name": "EPYC", "threads": 8, "why": "no CUDA"},
    "coordinates": {"data": 1}, "state": "running", "step": 420, "heartbeat": 1767225612.5}))]
pub struct RankObject {
    rank: usize,
    runner: String,
    /// As the runner describes it.
    #[schema(value_type = Object)]
    device: Value,
    coordinates: CoordinatesObject,
    state: RankStateName,
    /// The last finished step that was heard of.
    step: i64,
    /// When it was last heard of.
    heartbeat: f64,
}

/// A checkpoint as a job names it; `/checkpoints` has the rest.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct CheckpointNote {
    #[schema(examples("ftckpt_01J9ZQ4M7K3T5W8X2Y6C0V1B4N"))]
    id: String,
    step: i64,
    /// Has the lowest validation loss.
    best: bool,
}

pub(super) struct JobRow {
    pub id: String,
    pub name: Option<String>,
    pub state: JobState,
    pub phase: Option<String>,
    pub priority: i32,
    pub spec: Value,
    pub request: Value,
    pub metadata: Value,
    pub dataset_id: Option<String>,
    pub tokenizer_id: Option<String>,
    pub base_model_id: Option<String>,
    pub model_id: Option<String>,
    pub max_attempts: i32,
    pub failures: i32,
    pub attempt: i32,
    pub step: i64,
    pub steps: Option<i64>,
    pub loss: Option<f64>,
    pub tokens_per_second: Option<f64>,
    pub seconds_per_step: Option<f64>,
    pub trained_tokens: Option<i64>,
    pub error: Option<Value>,
    pub run_after: OffsetDateTime,
    pub run_after_is_ahead: bool,
    pub created_at: OffsetDateTime,
    pub started_at: Option<OffsetDateTime>,
    pub first_step_at: Option<OffsetDateTime>,
    pub finished_at: Option<OffsetDateTime>,
    pub queue_position: Option<i64>,
    pub waits_for_quota: bool,
    pub checkpoints: Value,
    pub ranks: Value,
    pub training_file: Option<String>,
    pub validation_file: Option<String>,
}

/// `query_as!` of training jobs that are not deleted; `$tail` goes on with `AND …`.
macro_rules! select_jobs {
    ($tail:literal $(+ $more:literal)* $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            crate::routes::training::JobRow,
            r#"SELECT j.id, j.name, j.state AS "state: lathe_jobs::state::JobState", j.phase, j.priority, j.spec, j.request, j.metadata, j.dataset_id,
                      j.tokenizer_id, j.base_model_id, j.model_id, j.max_attempts, j.failures, j.attempt, j.step, j.steps, j.loss, j.tokens_per_second, j.seconds_per_step,
                      j.trained_tokens, j.error, j.run_after, j.run_after > now() AS "run_after_is_ahead!", j.created_at, j.started_at, j.first_step_at,
                      j.finished_at,
                      CASE WHEN j.state = 'queued' THEN
                          (SELECT count(*) + 1 FROM jobs o WHERE o.state = 'queued' AND o.finished_at IS NULL AND o.pool = j.pool
                             AND (o.priority > j.priority OR o.priority = j.priority AND (o.queued_at, o.id) < (j.queued_at, j.id))) END AS queue_position,
                      (j.state = 'queued' AND j.limited AND (SELECT running_jobs_quota FROM projects p WHERE p.id = j.project_id)
                         <= (SELECT count(*) FROM jobs r WHERE r.finished_at IS NULL AND r.state IN ('running', 'pausing', 'cancelling')
                               AND r.project_id = j.project_id)) IS TRUE AS "waits_for_quota!",
                      (SELECT coalesce(jsonb_agg(jsonb_build_object('id', c.id, 'step', c.step, 'best', c.best) ORDER BY c.step), '[]')
                         FROM checkpoints c WHERE c.job_id = j.id) AS "checkpoints!",
                      (SELECT coalesce(jsonb_agg(jsonb_build_object('rank', r.rank, 'runner', r.runner_id, 'device', r.devices -> 0, 'state', r.state,
                           'step', r.step, 'heartbeat', round(extract(epoch FROM r.heartbeat), 3)) ORDER BY r.rank), '[]')
                         FROM attempt_ranks r WHERE r.job_id = j.id AND r.attempt = j.attempt) AS "ranks!",
                      (SELECT file_id FROM dataset_files f WHERE f.dataset_id = j.dataset_id AND f.position = 0) AS training_file,
                      (SELECT file_id FROM dataset_files f WHERE f.dataset_id = j.validation_dataset_id AND f.position = 0) AS validation_file
               FROM jobs j
               WHERE j.kind = 'train' AND j.deleted_at IS NULL "# + $tail $(+ $more)*
            $(, $argument)*
        )
    };
}
pub(super) use select_jobs;

impl JobRow {
    /// The resolved spec, as far as it is resolved.
    pub fn spec(&self) -> Option<JobSpec> {
        match serde_json::from_value(self.spec.clone()) {
            Ok(Spec::Train(spec)) => Some(spec),
            _ => None,
        }
    }

    pub fn steps(&self, spec: Option<&JobSpec>) -> Option<i64> {
        self.steps.or_else(|| spec?.train.steps.and_then(|steps| i64::try_from(steps).ok()))
    }

    /// What is left at the pace of this attempt so far, evaluations and checkpoints included.
    pub fn eta_seconds(&self, spec: Option<&JobSpec>) -> Option<f64> {
        let pace = self.seconds_per_step.filter(|_| !self.state.is_finished())?;
        let left = (self.steps(spec)? - self.step).max(0);
        Some(left as f64 * pace)
    }
}

impl From<JobRow> for TrainingJobObject {
    fn from(row: JobRow) -> TrainingJobObject {
        let spec = row.spec();
        let spec = spec.as_ref();
        let mut hyperparameters: Option<HyperparametersBody> = spec.and_then(|spec| reread(&spec.train));
        if let Some(hyperparameters) = &mut hyperparameters {
            hyperparameters.max_attempts = Some(row.max_attempts);
        }
        let after = serde_json::from_value::<Option<Vec<String>>>(row.request["after"].clone()).ok().flatten();
        TrainingJobObject {
            object: "training.job",
            state: row.state.into(),
            phase: row.phase.as_ref().and_then(|phase| serde_json::from_value(Value::String(phase.clone())).ok()),
            method: spec.and_then(|spec| reread(&spec.method)),
            model_config: spec.and_then(|spec| serde_json::to_value(&spec.model).ok()),
            validation: spec.and_then(|spec| reread(&spec.validation)),
            hyperparameters,
            steps: row.steps(spec),
            eta_seconds: row.eta_seconds(spec),
            run_after: row.run_after_is_ahead.then(|| milliseconds(row.run_after)),
            created_at: milliseconds(row.created_at),
            started_at: row.started_at.map(milliseconds),
            first_step_at: row.first_step_at.map(milliseconds),
            finished_at: row.finished_at.map(milliseconds),
            after: after.unwrap_or_default(),
            checkpoints: serde_json::from_value(row.checkpoints).unwrap_or_default(),
            parallelism: spec.map(|spec| spec.layout.into()),
            ranks: spec.map(|spec| ranks(row.ranks, spec.layout)).unwrap_or_default(),
            error: FailureDetail::from_column(row.error),
            metadata: Metadata::from_row(row.metadata),
            id: row.id,
            name: row.name,
            model: row.model_id,
            base_model: row.base_model_id,
            dataset: row.dataset_id,
            tokenizer: row.tokenizer_id,
            priority: row.priority,
            queue_position: row.queue_position,
            waiting_for: row.waits_for_quota.then_some(WaitingFor::RunningJobsQuota),
            step: row.step,
            loss: row.loss,
            tokens_per_second: row.tokens_per_second,
            trained_tokens: row.trained_tokens,
            attempts: row.attempt,
            failures: row.failures,
        }
    }
}

/// The ranks of a row, with their places.
fn ranks(column: Value, layout: Layout) -> Vec<RankObject> {
    #[derive(Deserialize)]
    struct Rank {
        rank: usize,
        runner: String,
        device: Value,
        state: RankState,
        step: i64,
        heartbeat: f64,
    }
    let ranks: Vec<Rank> = serde_json::from_value(column).unwrap_or_default();
    let object = |Rank { rank, runner, device, state, step, heartbeat }| RankObject {
        coordinates: layout.coordinates(rank).into(),
        state: state.into(),
        rank,
        runner,
        device,
        step,
        heartbeat,
    };
    ranks.into_iter().map(object).collect()
}

/// A part of a spec in the shape that requests have, which is the same JSON.
fn reread<T: for<'de> Deserialize<'de>>(part: &impl Serialize) -> Option<T> {
    serde_json::to_value(part).ok().and_then(|part| serde_json::from_value(part).ok())
}

/// Unix seconds, to the millisecond.
pub(super) fn milliseconds(time: OffsetDateTime) -> f64 {
    (time.unix_timestamp_nanos() / 1_000_000) as f64 / 1000.0
}

pub(super) async fn find(conn: &mut PgConnection, project_id: &str, id: &str) -> Result<JobRow, ApiError> {
    select_jobs!("AND j.id = $1 AND j.project_id = $2", id, project_id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| ApiError::not_found("training job", id))
}

/// Which training jobs.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListTrainingJobs {
    /// Id of the last item of the page before.
    #[param(min_length = 1)]
    after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    /// Only those in this state.
    #[param(inline)]
    state: Option<JobStateName>,
    /// Only those of this name.
    name: Option<String>,
}

/// List training jobs
#[utoipa::path(
    get, path = "/v1/training/jobs", operation_id = "list_training_jobs", tag = "training", params(ListTrainingJobs),
    responses((status = 200, description = "A page", body = List<TrainingJobObject>))
)]
async fn list_training_jobs(
    State(state): State<AppState>,
    project: Project,
    Query(query): Query<ListTrainingJobs>,
) -> Result<Json<List<TrainingJobObject>>, ApiError> {
    let (page, rows) = page(&state, &project.project_id, query, false).await?;
    Ok(Json(List::of(rows.into_iter().map(TrainingJobObject::from).collect(), &page, |job| &job.id)))
}

/// The training jobs that a query asks for; of tuning alone if `tuned`.
pub(super) async fn page(
    state: &AppState,
    project_id: &str,
    query: ListTrainingJobs,
    tuned: bool,
) -> Result<(Page, Vec<JobRow>), ApiError> {
    let page = Page::asked(query.limit.unwrap_or(20), query.order, query.after, async |id| {
        sqlx::query_scalar!(
            "SELECT created_at FROM jobs WHERE id = $1 AND project_id = $2 AND kind = 'train' AND (NOT $3 OR base_model_id IS NOT NULL)",
            id,
            project_id,
            tuned,
        )
        .fetch_optional(&state.db)
        .await
    })
    .await?;
    let rows = fetch_page!(
        @ [select_jobs] []
        &state.db,
        &page,
        "AND j.project_id = $4 AND ($5::text IS NULL OR j.state = $5) AND ($6::text IS NULL OR j.name = $6)
         AND (NOT $7 OR j.base_model_id IS NOT NULL)",
        project_id,
        query.state.map(|state| state.0.as_str()),
        query.name,
        tuned,
    )?;
    Ok((page, rows))
}

/// Retrieve a training job
#[utoipa::path(
    get, path = "/v1/training/jobs/{job_id}", operation_id = "get_training_job", tag = "training", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = TrainingJobObject))
)]
async fn get_training_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<TrainingJobObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    Ok(Json(find(&mut conn, &project.project_id, &id).await?.into()))
}

#[cfg(test)]
mod tests;
