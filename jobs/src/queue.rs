//! The queue as its clients see it: enqueue, cancel, pause, resume, delete.
//!
//! Every function is one transaction, or a part of the caller's. A change of state is guarded by the
//! state that it leaves and listed in [`crate::state::TRANSITIONS`]. Taking and ending work is in
//! [`crate::lease`] and [`crate::ending`]. Locks are taken in one order, which `docs/job-states.md` states: an attempt, jobs as
//! they were made, what they make.

use lathe_model::protocol::Level;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::{
    events, quota, replicas, settle,
    spec::Spec,
    state::JobState,
    trace::{self, Context, KeyValue, Span, SpanKind},
};

/// A job to enqueue. Ids of resources are lineage; the rows themselves are the caller's.
#[derive(Clone, Debug)]
pub struct NewJob {
    pub id: String,
    pub project_id: String,
    pub name: Option<String>,
    pub spec: Spec,
    /// The body as accepted, for answers in the client's own words.
    pub request: Value,
    pub metadata: Value,
    /// Higher goes first.
    pub priority: i32,
    /// Attempts that may fail; interruptions do not count.
    pub max_attempts: i32,
    pub devices: i32,
    pub dataset_id: Option<String>,
    pub validation_dataset_id: Option<String>,
    pub tokenizer_id: Option<String>,
    pub base_model_id: Option<String>,
    pub model_id: Option<String>,
    /// Ids of jobs that must succeed first; ones that have are allowed.
    pub needs: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("there is no job {0}")]
    NeedNotFound(String),
    #[error("the job {0} has failed or was cancelled, so nothing can wait for it")]
    NeedFailed(String),
    #[error("the spec cannot be written as JSON: {0}")]
    Spec(#[from] serde_json::Error),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    #[error("there is no such job")]
    NotFound,
    #[error("this is not possible in the state {from}")]
    Illegal { from: JobState },
    /// Unfinished jobs start from it.
    #[error("it is needed by {}", .users.join(", "))]
    InUse { users: Vec<String> },
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Adds a job, queued or blocked by its needs, and tells the runners. Adds no event.
pub async fn enqueue(conn: &mut PgConnection, job: NewJob) -> Result<JobState, QueueError> {
    let mut tx = conn.begin().await?;
    let limited = quota::limits(&mut tx, &job.project_id).await?;
    let state = match job.needs.is_empty() || needs_all_met(&mut tx, &job.needs).await? {
        true => JobState::Queued,
        false => JobState::Blocked,
    };
    let kind = job.spec.kind();
    let span = Span::begin(SpanKind::Producer, format!("enqueue {kind}"), &Context::current(), || {
        vec![
            KeyValue::new("messaging.system", "lathe"),
            KeyValue::new("messaging.operation.type", "send"),
            KeyValue::new("messaging.operation.name", "enqueue"),
            KeyValue::new("messaging.destination.name", kind.as_str()),
            KeyValue::new("messaging.message.id", job.id.clone()),
        ]
    });
    sqlx::query!(
        "INSERT INTO jobs (id, project_id, kind, name, state, pool, devices, priority, spec, request, metadata, dataset_id,
                           validation_dataset_id, tokenizer_id, base_model_id, model_id, max_attempts, limited, traceparent, queued_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19,
                 CASE WHEN $5 = 'queued' THEN now() END)",
        job.id,
        job.project_id,
        kind.as_str(),
        job.name,
        state.as_str(),
        kind.pool().as_str(),
        job.devices,
        job.priority,
        serde_json::to_value(&job.spec)?,
        job.request,
        job.metadata,
        job.dataset_id,
        job.validation_dataset_id,
        job.tokenizer_id,
        job.base_model_id,
        job.model_id,
        job.max_attempts,
        limited,
        trace::written(&span.context()),
    )
    .execute(&mut *tx)
    .await?;
    if !job.needs.is_empty() {
        sqlx::query!(
            "INSERT INTO job_dependencies (job_id, needs) SELECT DISTINCT $1, needs FROM unnest($2::text[]) AS needs",
            job.id,
            &job.needs
        )
        .execute(&mut *tx)
        .await?;
    }
    settle::tell_runners(&mut tx, &job.id).await?;
    tx.commit().await?;
    Ok(state)
}

/// Whether every need has succeeded. The share lock orders this before or after the transaction that
/// ends a need, so that one of the two sees the other.
async fn needs_all_met(conn: &mut PgConnection, needs: &[String]) -> Result<bool, QueueError> {
    let found = sqlx::query!(
        r#"SELECT id, state AS "state: JobState" FROM jobs WHERE id = ANY($1) AND deleted_at IS NULL ORDER BY seq FOR SHARE"#,
        needs
    )
    .fetch_all(conn)
    .await?;
    if let Some(missing) = needs.iter().find(|need| found.iter().all(|row| row.id != **need)) {
        return Err(QueueError::NeedNotFound(missing.clone()));
    }
    match found.iter().find(|row| matches!(row.state, JobState::Failed | JobState::Cancelled)) {
        Some(failed) => Err(QueueError::NeedFailed(failed.id.clone())),
        None => Ok(found.iter().all(|row| row.state == JobState::Succeeded)),
    }
}

/// Asks a job to stop for good. One that is running becomes `cancelling` until its worker has stopped.
pub async fn cancel(conn: &mut PgConnection, job_id: &str) -> Result<JobState, TransitionError> {
    let mut tx = conn.begin().await?;
    let from = lock(&mut tx, job_id).await?;
    let to = match from {
        JobState::Blocked | JobState::Queued | JobState::Paused => JobState::Cancelled,
        JobState::Running | JobState::Pausing => JobState::Cancelling,
        JobState::Cancelling | JobState::Cancelled => return Ok(from),
        JobState::Succeeded | JobState::Failed => return Err(TransitionError::Illegal { from }),
    };
    change(&mut tx, job_id, from, to).await?;
    if to == JobState::Cancelled {
        settle::fail_resources(&mut tx, job_id, &settle::cancelled()).await?;
        settle::fail_dependants(&mut tx, job_id).await?;
    }
    let (code, message) = match to {
        JobState::Cancelled => ("job.cancelled", "The job was cancelled."),
        _ => ("job.cancelling", "The job is asked to stop."),
    };
    events::append(&mut tx, job_id, Level::Info, code, message, &json!({})).await?;
    tx.commit().await?;
    Ok(to)
}

/// Asks a job to save and stop until it is resumed.
pub async fn pause(conn: &mut PgConnection, job_id: &str) -> Result<JobState, TransitionError> {
    let mut tx = conn.begin().await?;
    let from = lock(&mut tx, job_id).await?;
    let to = match from {
        JobState::Blocked | JobState::Queued => JobState::Paused,
        JobState::Running => JobState::Pausing,
        JobState::Pausing | JobState::Paused => return Ok(from),
        JobState::Cancelling | JobState::Cancelled | JobState::Succeeded | JobState::Failed => {
            return Err(TransitionError::Illegal { from });
        }
    };
    change(&mut tx, job_id, from, to).await?;
    let (code, message) = match to {
        JobState::Paused => ("job.paused", "The job is paused."),
        _ => ("job.pausing", "The job is asked to save and stop."),
    };
    events::append(&mut tx, job_id, Level::Info, code, message, &json!({})).await?;
    tx.commit().await?;
    Ok(to)
}

/// Lets a paused job go on, from its newest whole checkpoint. One that goes on already stays as it is.
pub async fn resume(conn: &mut PgConnection, job_id: &str) -> Result<JobState, TransitionError> {
    let mut tx = conn.begin().await?;
    let from = lock(&mut tx, job_id).await?;
    match from {
        JobState::Paused => {}
        JobState::Blocked | JobState::Queued | JobState::Running => return Ok(from),
        JobState::Pausing | JobState::Cancelling | JobState::Cancelled | JobState::Succeeded | JobState::Failed => {
            return Err(TransitionError::Illegal { from });
        }
    }
    let blocked = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM job_dependencies d JOIN jobs n ON n.id = d.needs
                          WHERE d.job_id = $1 AND n.state <> 'succeeded') AS "blocked!""#,
        job_id
    )
    .fetch_one(&mut *tx)
    .await?;
    let to = if blocked { JobState::Blocked } else { JobState::Queued };
    change(&mut tx, job_id, from, to).await?;
    events::append(&mut tx, job_id, Level::Info, "job.resumed", "The job is to go on.", &json!({})).await?;
    tx.commit().await?;
    Ok(to)
}

/// Removes an ended job from every listing. Its row stays as a tombstone for lineage; its checkpoints'
/// rows go at once, engines that serve one are told to stop, and the keys of the folders are returned
/// for removal after the commit.
pub async fn delete(conn: &mut PgConnection, job_id: &str) -> Result<Vec<String>, TransitionError> {
    let mut tx = conn.begin().await?;
    let from = lock(&mut tx, job_id).await?;
    if !from.is_finished() {
        return Err(TransitionError::Illegal { from });
    }
    sqlx::query!("SELECT id FROM checkpoints WHERE job_id = $1 ORDER BY id FOR UPDATE", job_id).fetch_all(&mut *tx).await?;
    // Asked once nobody can begin to need one.
    let users = sqlx::query_scalar!(
        "SELECT j.id FROM jobs j JOIN models m ON m.job_id = $1 JOIN checkpoints c ON c.job_id = $1
         WHERE j.finished_at IS NULL AND j.base_model_id = m.id || ':ckpt-step-' || c.step ORDER BY j.id LIMIT 10",
        job_id,
    )
    .fetch_all(&mut *tx)
    .await?;
    if !users.is_empty() {
        return Err(TransitionError::InUse { users });
    }
    sqlx::query!("UPDATE jobs SET deleted_at = now() WHERE id = $1 AND deleted_at IS NULL", job_id).execute(&mut *tx).await?;
    replicas::stop_serving_checkpoints(&mut tx, job_id).await?;
    let folders =
        sqlx::query_scalar!("DELETE FROM checkpoints WHERE job_id = $1 RETURNING artifact", job_id).fetch_all(&mut *tx).await?;
    tx.commit().await?;
    Ok(folders)
}

/// Where a job stands, and stays until the transaction ends.
pub async fn lock(conn: &mut PgConnection, job_id: &str) -> Result<JobState, TransitionError> {
    sqlx::query_scalar!(r#"SELECT state AS "state: JobState" FROM jobs WHERE id = $1 AND deleted_at IS NULL FOR UPDATE"#, job_id)
        .fetch_optional(conn)
        .await?
        .ok_or(TransitionError::NotFound)
}

/// A change of state that no attempt is part of.
async fn change(conn: &mut PgConnection, job_id: &str, from: JobState, to: JobState) -> Result<(), TransitionError> {
    debug_assert!(from.can_become(to), "{from} → {to}");
    let changed = sqlx::query!(
        "UPDATE jobs SET state = $3,
             queued_at = CASE WHEN $3 = 'queued' THEN now() ELSE queued_at END,
             run_after = CASE WHEN $3 = 'queued' THEN now() ELSE run_after END,
             finished_at = CASE WHEN $3 = 'cancelled' THEN now() END
         WHERE id = $1 AND state = $2",
        job_id,
        from.as_str(),
        to.as_str(),
    )
    .execute(&mut *conn)
    .await?;
    if changed.rows_affected() != 1 {
        return Err(TransitionError::Illegal { from });
    }
    settle::tell_runners(conn, job_id).await?;
    Ok(())
}
