//! What a training job leaves behind while it runs: checkpoints and logs.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use axum::{Json, extract::State};
use lathe_jobs::checkpoints;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Project,
    page::{List, Order, Page, fetch_page},
    parse::{Path, Query},
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_training_checkpoints)).routes(routes!(get_training_logs))
}

/// A checkpoint.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "ftckpt_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "training.checkpoint", "model": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N:ckpt-step-400", "step": 400, "attempt": 1, "bytes": 11120640, "loss": 2.33,
    "validation_loss": 2.41, "best": true, "created_at": 1767225620.5}))]
pub struct CheckpointObject {
    #[schema(examples("ftckpt_01J9ZQ4M7K3T5W8X2Y6C0V1B4N"))]
    id: String,
    #[schema(examples("training.checkpoint"))]
    object: &'static str,
    /// The name under which it answers, and serves as a `base_model`.
    #[schema(examples("model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N:ckpt-step-200"))]
    model: String,
    step: i64,
    attempt: i32,
    bytes: i64,
    loss: Option<f64>,
    validation_loss: Option<f64>,
    /// Has the lowest validation loss.
    best: bool,
    /// Unix seconds, to the millisecond.
    created_at: f64,
}

pub(in crate::routes) struct CheckpointRow {
    pub id: String,
    pub step: i64,
    attempt: i32,
    bytes: i64,
    pub loss: Option<f64>,
    pub validation_loss: Option<f64>,
    best: bool,
    pub created_at: OffsetDateTime,
}

impl CheckpointObject {
    fn new(model_id: &str, row: CheckpointRow) -> CheckpointObject {
        CheckpointObject {
            id: row.id,
            object: "training.checkpoint",
            model: checkpoints::model_name(model_id, row.step),
            step: row.step,
            attempt: row.attempt,
            bytes: row.bytes,
            loss: row.loss,
            validation_loss: row.validation_loss,
            best: row.best,
            created_at: super::milliseconds(row.created_at),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct CheckpointsQuery {
    /// Id of the last checkpoint of the page before.
    #[param(min_length = 1)]
    after: Option<String>,
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
}

/// Which of a job's checkpoints.
pub(in crate::routes) struct CheckpointsPage {
    pub limit: i64,
    pub order: Option<Order>,
    pub after: Option<String>,
}

impl CheckpointsPage {
    pub async fn of(self, conn: &mut PgConnection, job_id: &str) -> Result<(Page, Vec<CheckpointRow>), ApiError> {
        let page = Page::asked(self.limit, self.order, self.after, async |after| {
            sqlx::query_scalar!("SELECT created_at FROM checkpoints WHERE id = $1 AND job_id = $2", after, job_id)
                .fetch_optional(&mut *conn)
                .await
        })
        .await?;
        let rows = fetch_page!(
            CheckpointRow,
            &mut *conn,
            &page,
            "SELECT id, step, attempt, bytes, loss, validation_loss, best, created_at FROM checkpoints WHERE job_id = $4",
            job_id,
        )?;
        Ok((page, rows))
    }
}

/// List a training job's checkpoints
#[utoipa::path(
    get, path = "/v1/training/jobs/{job_id}/checkpoints", operation_id = "list_training_checkpoints", tag = "training",
    params(("job_id" = String, Path), CheckpointsQuery),
    responses((status = 200, description = "A page", body = List<CheckpointObject>))
)]
async fn list_training_checkpoints(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<CheckpointsQuery>,
) -> Result<Json<List<CheckpointObject>>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let model_id = super::find(&mut conn, &project.project_id, &id).await?.model_id.unwrap_or_default();
    let page = CheckpointsPage { limit: query.limit.unwrap_or(100), order: query.order, after: query.after };
    let (page, rows) = page.of(&mut conn, &id).await?;
    Ok(Json(List::of(rows.into_iter().map(|row| CheckpointObject::new(&model_id, row)).collect(), &page, |checkpoint| {
        &checkpoint.id
    })))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LogsQuery {
    /// Default: the newest.
    #[param(minimum = 1, maximum = 2147483647)]
    attempt: Option<i32>,
    /// Length of the tail.
    #[param(minimum = 1, maximum = 1048576, default = 65536)]
    bytes: Option<u64>,
}

/// The end of a worker's log.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "training.logs", "attempt": 1, "text": "step 400 of 2000\n", "truncated": false}))]
pub struct LogsObject {
    #[schema(examples("training.logs"))]
    object: &'static str,
    /// 0: none has begun.
    attempt: i32,
    /// Whole lines.
    text: String,
    /// Whether the log is longer.
    truncated: bool,
}

/// Retrieve the tail of a training job's log
#[utoipa::path(
    get, path = "/v1/training/jobs/{job_id}/logs", operation_id = "get_training_logs", tag = "training", params(("job_id" = String, Path), LogsQuery),
    responses((status = 200, description = "The tail", body = LogsObject))
)]
async fn get_training_logs(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Json<LogsObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let job = super::find(&mut conn, &project.project_id, &id).await?;
    drop(conn);
    let attempt = query.attempt.unwrap_or(job.attempt);
    if attempt > job.attempt {
        return Err(ApiError::not_found("attempt", &attempt.to_string()).with_param("attempt"));
    }
    let (log, bytes) = (state.artifacts.fetch_log(&id, attempt).await?, query.bytes.unwrap_or(64 << 10));
    let read = lathe_jobs::waiting::blocking(move || tail(log.path(), bytes));
    let (text, truncated) = read.await.map_err(ApiError::internal)?.map_err(ApiError::internal)?;
    Ok(Json(LogsObject { object: "training.logs", attempt, text, truncated }))
}

/// The last lines of a file, at most `bytes` of them; nothing for a file that is not there. Blocks.
fn tail(path: &std::path::Path, bytes: u64) -> io::Result<(String, bool)> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((String::new(), false)),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    let start = length.saturating_sub(bytes);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(bytes).read_to_end(&mut tail)?;
    let begin = if start == 0 { 0 } else { tail.iter().position(|byte| *byte == b'\n').map_or(0, |newline| newline + 1) };
    Ok((String::from_utf8_lossy(&tail[begin..]).into_owned(), start > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_begins_with_a_whole_line() {
        let path = std::env::temp_dir().join(format!("lathe-tail-{}", std::process::id()));
        std::fs::write(&path, "first\nsecond\nthird\n").unwrap();
        assert_eq!(tail(&path, 10).unwrap(), ("third\n".to_owned(), true));
        assert_eq!(tail(&path, 100).unwrap(), ("first\nsecond\nthird\n".to_owned(), false));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(tail(&path, 100).unwrap(), (String::new(), false));
    }
}
