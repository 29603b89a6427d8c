//! Cancelling, pausing, resuming and deleting training jobs.

use axum::{Json, extract::State};
use lathe_jobs::{
    audit::{self, Deed},
    queue::{self, TransitionError},
    state::JobState,
};
use sqlx::{Connection, PgConnection};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::TrainingJobObject;
use crate::{
    auth::Project,
    parse::{NoBody, Path},
    problem::ApiError,
    resource::{self, Deleted},
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(cancel_training_job))
        .routes(routes!(pause_training_job))
        .routes(routes!(resume_training_job))
}

/// What can be asked of a job.
#[derive(Clone, Copy, Debug)]
pub(in crate::routes) enum Action {
    Cancel,
    Pause,
    Resume,
}

impl Action {
    /// Carries it out on a job of the project; the same action twice changes nothing.
    pub async fn apply(self, conn: &mut PgConnection, caller: &Project, id: &str) -> Result<JobState, ApiError> {
        let mut tx = conn.begin().await?;
        super::find(&mut tx, &caller.project_id, id).await?;
        let from = queue::lock(&mut tx, id).await.map_err(|error| refused(error, id, self.participle()))?;
        let to = match self {
            Action::Cancel => queue::cancel(&mut tx, id).await,
            Action::Pause => queue::pause(&mut tx, id).await,
            Action::Resume => queue::resume(&mut tx, id).await,
        };
        let to = to.map_err(|error| refused(error, id, self.participle()))?;
        if to != from {
            audit::record(&mut tx, caller.did(self.deed(), id)).await?;
        }
        tx.commit().await?;
        Ok(to)
    }

    fn deed(self) -> Deed {
        match self {
            Action::Cancel => Deed::TrainingJobCancelled,
            Action::Pause => Deed::TrainingJobPaused,
            Action::Resume => Deed::TrainingJobResumed,
        }
    }

    fn participle(self) -> &'static str {
        match self {
            Action::Cancel => "cancelled",
            Action::Pause => "paused",
            Action::Resume => "resumed",
        }
    }
}

fn refused(error: TransitionError, id: &str, participle: &str) -> ApiError {
    match error {
        TransitionError::NotFound => ApiError::not_found("training job", id),
        TransitionError::Illegal { from } => {
            ApiError::conflict(format!("The job `{id}` is {from} and cannot be {participle}.")).with_code("illegal_state")
        }
        TransitionError::InUse { users } => resource::in_use("training job", id, &users),
        TransitionError::Database(error) => error.into(),
    }
}

async fn act(state: &AppState, project: &Project, id: &str, action: Action) -> Result<Json<TrainingJobObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    action.apply(&mut conn, project, id).await?;
    Ok(Json(super::find(&mut conn, &project.project_id, id).await?.into()))
}

/// Cancel a training job
///
/// One that runs becomes `cancelling` until its worker has stopped.
#[utoipa::path(
    post, path = "/v1/training/jobs/{job_id}/cancel", operation_id = "cancel_training_job", tag = "training", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = TrainingJobObject), (status = 409, description = "It has ended"))
)]
async fn cancel_training_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    _: NoBody,
) -> Result<Json<TrainingJobObject>, ApiError> {
    act(&state, &project, &id, Action::Cancel).await
}

/// Pause a training job
///
/// One that runs saves its last finished step and gives its device back.
#[utoipa::path(
    post, path = "/v1/training/jobs/{job_id}/pause", operation_id = "pause_training_job", tag = "training", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = TrainingJobObject), (status = 409, description = "It has ended or is being cancelled"))
)]
async fn pause_training_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    _: NoBody,
) -> Result<Json<TrainingJobObject>, ApiError> {
    act(&state, &project, &id, Action::Pause).await
}

/// Resume a paused training job
#[utoipa::path(
    post, path = "/v1/training/jobs/{job_id}/resume", operation_id = "resume_training_job", tag = "training", params(("job_id" = String, Path)),
    responses((status = 200, description = "The job", body = TrainingJobObject), (status = 409, description = "It has ended or is still stopping"))
)]
async fn resume_training_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    _: NoBody,
) -> Result<Json<TrainingJobObject>, ApiError> {
    act(&state, &project, &id, Action::Resume).await
}

/// Delete a training job
///
/// Only one that has ended, and that no unfinished job waits for or starts from. Its checkpoints go, and
/// engines that serve one stop; its model stays.
#[utoipa::path(
    delete, path = "/v1/training/jobs/{job_id}", operation_id = "delete_training_job", tag = "training", params(("job_id" = String, Path)),
    responses((status = 200, description = "Deleted", body = Deleted), (status = 409, description = "It has not ended, or an unfinished job needs it"))
)]
pub(super) async fn delete_training_job(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let mut tx = conn.begin().await?;
    super::find(&mut tx, &project.project_id, &id).await?;
    let users = sqlx::query_scalar!(
        "SELECT j.id FROM jobs j JOIN job_dependencies d ON d.job_id = j.id WHERE d.needs = $1 AND j.finished_at IS NULL ORDER BY j.created_at LIMIT 10",
        id,
    )
    .fetch_all(&mut *tx)
    .await?;
    let folders = queue::delete(&mut tx, &id).await.map_err(|error| refused(error, &id, "deleted; cancel it first"))?;
    if !users.is_empty() {
        return Err(resource::in_use("training job", &id, &users));
    }
    audit::record(&mut tx, project.did(Deed::TrainingJobDeleted, &id)).await?;
    tx.commit().await?;
    resource::remove_artifacts(&state, folders).await;
    Ok(Json(Deleted { id, object: "training.job", deleted: true }))
}
