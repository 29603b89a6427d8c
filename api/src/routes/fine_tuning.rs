//! `/v1/fine_tuning/jobs`: tuning jobs in OpenAI's shapes, as its SDKs read them. The rows are those
//! of `/v1/training/jobs`, and so are the ids; pretraining does not show here.
//!
//! What OpenAI's API has and this one does not (integrations, other methods than `supervised`) is not
//! in the schema, and so is refused.

mod shapes;

use std::collections::BTreeMap;

use axum::{Json, extract::State, http::StatusCode};
use lathe_jobs::{
    audit::{self, Deed},
    spec::{DatasetSource, Documents, Format, OnBadRow},
};
use lathe_model::config::{Method, Schedule, Template, TrainConfig, Validation};
use sqlx::{Connection, PgConnection};
use utoipa_axum::{router::OpenApiRouter, routes};

use self::shapes::{
    CreateFineTuningJob, FineTuningCheckpointObject, FineTuningEventObject, FineTuningHyperparameters, FineTuningJobObject,
    ListCheckpoints, ListEvents,
};
use super::training::{self, JobRow, ListTrainingJobs, control::Action, create, outputs::CheckpointsPage, select_jobs};
use crate::{
    auth::Project,
    idempotency::Creation,
    metadata::Metadata,
    page::{List, Page},
    parse::{Body, NoBody, Path, Query},
    problem::ApiError,
    resource,
    routes::datasets::NewDataset,
    state::AppState,
    train_request::{HyperparametersBody, MAX_ATTEMPTS, Origin, TrainRequest},
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_fine_tuning_job, list_fine_tuning_jobs))
        .routes(routes!(get_fine_tuning_job))
        .routes(routes!(cancel_fine_tuning_job))
        .routes(routes!(pause_fine_tuning_job))
        .routes(routes!(resume_fine_tuning_job))
        .routes(routes!(list_fine_tuning_events))
        .routes(routes!(list_fine_tuning_checkpoints))
}

/// Create a fine-tuning job
///
/// The files become datasets; the job waits for them.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs", operation_id = "create_fine_tuning_job", tag = "fine-tuning", request_body = CreateFineTuningJob,
    responses(
        (status = 200, description = "The job", body = FineTuningJobObject),
        (status = 404, description = "The model or a file is unknown; `param` says which"),
        (status = 409, description = "The model has failed"),
        (status = 422, description = "`hyperparameters` are given twice and differ"),
    )
)]
async fn create_fine_tuning_job(
    State(state): State<AppState>,
    project: Project,
    creation: Creation,
    Body(body): Body<CreateFineTuningJob>,
) -> Result<Json<FineTuningJobObject>, ApiError> {
    let stored = serde_json::to_value(&body).map_err(ApiError::internal)?;
    let hyperparameters = body.hyperparameters()?;
    let mut conn = state.db.acquire().await?;
    let mut tx = conn.begin().await?;
    resource::require_storage(&mut tx, &project.project_id, 1).await?;
    let dataset = insert_dataset(&mut tx, &project, &body.training_file, "training_file").await?;
    let validation = match &body.validation_file {
        Some(file) => Some(Validation::Dataset { dataset: insert_dataset(&mut tx, &project, file, "validation_file").await? }),
        None => None,
    };
    let method = Method::Instruction { template: Template::Ins };
    let request = TrainRequest {
        layout: Default::default(),
        train: train_config(&hyperparameters, &method, body.seed, validation.is_some())?,
        method,
        origin: Origin::Base { model: body.model, tokenizer: None },
        dataset,
        validation,
        max_attempts: MAX_ATTEMPTS,
        name: body.suffix.clone(),
        priority: 0,
        after: Vec::new(),
        metadata: body.metadata.map_or_else(BTreeMap::new, |metadata| metadata.0),
    };
    let id = create::insert(&mut tx, &project.project_id, request, stored, body.suffix.as_deref()).await.map_err(|error| {
        if error.body.error.param.as_deref() == Some("base_model") { error.with_param("model") } else { error }
    })?;
    let row = find(&mut tx, &project.project_id, &id).await?;
    let job = FineTuningJobObject::new(row, &project.project_id);
    audit::record(&mut tx, project.did(Deed::TrainingJobCreated, &id)).await?;
    creation.commit(&state.db, tx, StatusCode::OK, &job).await?;
    Ok(Json(job))
}

/// A dataset of one file, made for the job.
async fn insert_dataset(conn: &mut PgConnection, project: &Project, file: &str, param: &str) -> Result<String, ApiError> {
    let source = DatasetSource::Files {
        files: vec![file.to_owned()],
        format: Format::Auto,
        columns: BTreeMap::new(),
        documents: Documents::File,
        on_bad_row: OnBadRow::Reject,
    };
    let dataset = NewDataset { name: file, source, metadata: Metadata::default(), implicit: true };
    let inserted = dataset.insert(conn, &project.project_id).await;
    inserted.map_err(|error| if error.body.error.param.is_some() { error.with_param(param) } else { error })
}

/// What the native route would train with, for these hyperparameters.
fn train_config(
    hyperparameters: &FineTuningHyperparameters,
    method: &Method,
    seed: Option<u64>,
    validated: bool,
) -> Result<TrainConfig, ApiError> {
    let native = HyperparametersBody {
        epochs: hyperparameters.n_epochs.as_ref().and_then(|epochs| epochs.number()).map(|epochs| epochs as f64),
        batch_size: hyperparameters.batch_size.as_ref().and_then(|size| size.number()),
        seed,
        ..HyperparametersBody::default()
    };
    let mut train = native.resolve(method, validated)?;
    let multiplier = hyperparameters.learning_rate_multiplier.as_ref().and_then(|multiplier| multiplier.number()).unwrap_or(1.0);
    if let Schedule::Cosine { peak, floor, .. } = &mut train.schedule {
        *peak *= multiplier;
        *floor *= multiplier;
    }
    Ok(train)
}

async fn find(conn: &mut PgConnection, project_id: &str, id: &str) -> Result<JobRow, ApiError> {
    select_jobs!("AND j.id = $1 AND j.project_id = $2 AND j.base_model_id IS NOT NULL", id, project_id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| ApiError::not_found("fine-tuning job", id))
}

/// List fine-tuning jobs
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs", operation_id = "list_fine_tuning_jobs", tag = "fine-tuning", params(ListTrainingJobs),
    responses((status = 200, description = "A page", body = List<FineTuningJobObject>))
)]
async fn list_fine_tuning_jobs(
    State(state): State<AppState>,
    project: Project,
    Query(query): Query<ListTrainingJobs>,
) -> Result<Json<List<FineTuningJobObject>>, ApiError> {
    let (page, rows) = training::page(&state, &project.project_id, query, true).await?;
    let jobs = rows.into_iter().map(|row| FineTuningJobObject::new(row, &project.project_id));
    Ok(Json(List::of(jobs.collect(), &page, |job| &job.id)))
}

/// Retrieve a fine-tuning job
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{job_id}", operation_id = "get_fine_tuning_job", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = FineTuningJobObject))
)]
async fn get_fine_tuning_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<FineTuningJobObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    Ok(Json(FineTuningJobObject::new(find(&mut conn, &project.project_id, &id).await?, &project.project_id)))
}

async fn act(state: &AppState, project: &Project, id: &str, action: Action) -> Result<Json<FineTuningJobObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    find(&mut conn, &project.project_id, id).await?;
    action.apply(&mut conn, project, id).await?;
    Ok(Json(FineTuningJobObject::new(find(&mut conn, &project.project_id, id).await?, &project.project_id)))
}

/// Cancel a fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{job_id}/cancel", operation_id = "cancel_fine_tuning_job", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = FineTuningJobObject), (status = 409, description = "It has ended"))
)]
async fn cancel_fine_tuning_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    _: NoBody,
) -> Result<Json<FineTuningJobObject>, ApiError> {
    act(&state, &project, &id, Action::Cancel).await
}

/// Pause a fine-tuning job
///
/// A paused one shows as `queued`; `state` says `paused`.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{job_id}/pause", operation_id = "pause_fine_tuning_job", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = FineTuningJobObject), (status = 409, description = "It has ended or is being cancelled"))
)]
async fn pause_fine_tuning_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    _: NoBody,
) -> Result<Json<FineTuningJobObject>, ApiError> {
    act(&state, &project, &id, Action::Pause).await
}

/// Resume a paused fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{job_id}/resume", operation_id = "resume_fine_tuning_job", tag = "fine-tuning", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = FineTuningJobObject), (status = 409, description = "It has ended or is still stopping"))
)]
async fn resume_fine_tuning_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    _: NoBody,
) -> Result<Json<FineTuningJobObject>, ApiError> {
    act(&state, &project, &id, Action::Resume).await
}

/// List a fine-tuning job's events
///
/// Newest first.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{job_id}/events", operation_id = "list_fine_tuning_events", tag = "fine-tuning", params(("job_id" = String, Path), ListEvents),
    responses((status = 200, description = "A page", body = List<FineTuningEventObject>))
)]
async fn list_fine_tuning_events(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<ListEvents>,
) -> Result<Json<List<FineTuningEventObject>>, ApiError> {
    let mut conn = state.db.acquire().await?;
    find(&mut conn, &project.project_id, &id).await?;
    let before = match &query.after {
        Some(after) => {
            let number = shapes::event_number(&id, after);
            sqlx::query_scalar!("SELECT id FROM job_events WHERE job_id = $1 AND id = $2", id, number)
                .fetch_optional(&mut *conn)
                .await?
                .ok_or_else(|| ApiError::no_such_item(after))?
        }
        None => i64::MAX,
    };
    let page = Page::first(query.limit.unwrap_or(20), None);
    let rows = sqlx::query_as!(
        training::events::EventRow,
        "SELECT id, level, code, message, data, created_at FROM job_events WHERE job_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3",
        id,
        before,
        page.fetch(),
    )
    .fetch_all(&mut *conn)
    .await?;
    Ok(Json(List::of(rows.into_iter().map(|row| FineTuningEventObject::new(&id, row)).collect(), &page, |event| &event.id)))
}

/// List a fine-tuning job's checkpoints
///
/// Newest first.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{job_id}/checkpoints", operation_id = "list_fine_tuning_checkpoints", tag = "fine-tuning",
    params(("job_id" = String, Path), ListCheckpoints),
    responses((status = 200, description = "A page", body = List<FineTuningCheckpointObject>))
)]
async fn list_fine_tuning_checkpoints(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<ListCheckpoints>,
) -> Result<Json<List<FineTuningCheckpointObject>>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let job = find(&mut conn, &project.project_id, &id).await?;
    let page = CheckpointsPage { limit: query.limit.unwrap_or(10), order: None, after: query.after };
    let (page, rows) = page.of(&mut conn, &id).await?;
    let model = job.model_id.unwrap_or_default();
    Ok(Json(List::of(
        rows.into_iter().map(|row| FineTuningCheckpointObject::new(&id, &model, row)).collect(),
        &page,
        |checkpoint| &checkpoint.id,
    )))
}
