//! Taking work and keeping it, under a lease.
//!
//! A claim is one short transaction that makes an attempt with a fresh random token. From then on
//! every write names the token and takes effect only while that attempt has not ended; otherwise it
//! is [`LeaseError::Lost`] and the work must stop. No row stays locked while a job runs. An attempt
//! whose time has run out keeps its lease until a reaper has ended it, so a runner that was cut off
//! from the database goes on when it is back unless someone has decided otherwise.

use lathe_model::protocol::Level;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::{
    artifacts::ArtifactError,
    events, ids, settle,
    state::{JobState, Kind, Pool},
};

/// The right to write about one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub job_id: String,
    pub attempt: i32,
    pub token: String,
}

#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("the lease is lost")]
    Lost,
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Who claims, and what is free there.
#[derive(Clone, Debug)]
pub struct Claimant {
    pub runner_id: String,
    pub pool: Pool,
    /// Devices that are free; a job that states more is left for another runner.
    pub devices: i32,
    /// What the rank will run on, for its row.
    pub offered: Value,
    pub lease_seconds: f64,
}

/// A job as its runner needs it.
#[derive(Clone, Debug)]
pub struct Claimed {
    pub lease: Lease,
    pub kind: Kind,
    /// A [`crate::spec::Spec`], perhaps of a later version than this one reads.
    pub spec: Value,
    pub dataset_id: Option<String>,
    pub validation_dataset_id: Option<String>,
    pub tokenizer_id: Option<String>,
    pub base_model_id: Option<String>,
    pub model_id: Option<String>,
}

/// Takes the job that is next: the highest priority, then the longest queued.
pub async fn claim(conn: &mut PgConnection, claimant: &Claimant) -> Result<Option<Claimed>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let Some(row) = sqlx::query!(
        r#"WITH next AS (
               SELECT id FROM jobs
               WHERE state = 'queued' AND pool = $1 AND devices <= $2 AND run_after <= now()
               ORDER BY priority DESC, queued_at, id FOR UPDATE SKIP LOCKED LIMIT 1
           )
           UPDATE jobs SET state = 'running', attempt = attempt + 1, started_at = coalesce(started_at, now()), phase = 'preparing'
           FROM next WHERE jobs.id = next.id AND state = 'queued'
           RETURNING jobs.id, attempt, kind AS "kind: Kind", spec, dataset_id, validation_dataset_id, tokenizer_id, base_model_id, model_id"#,
        claimant.pool.as_str(),
        claimant.devices,
    )
    .fetch_optional(&mut *tx)
    .await?
    else {
        return Ok(None);
    };
    let lease = Lease { job_id: row.id, attempt: row.attempt, token: ids::secret() };
    sqlx::query!(
        "INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at) VALUES ($1, $2, $3, $4, now() + make_interval(secs => $5))",
        lease.job_id,
        lease.attempt,
        claimant.runner_id,
        lease.token,
        claimant.lease_seconds,
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "INSERT INTO attempt_ranks (job_id, attempt, rank, runner_id, devices, state) VALUES ($1, $2, 0, $3, $4, 'starting')",
        lease.job_id,
        lease.attempt,
        claimant.runner_id,
        claimant.offered,
    )
    .execute(&mut *tx)
    .await?;
    settle::start_resources(&mut tx, &lease.job_id).await?;
    let data = json!({ "attempt": lease.attempt, "runner": claimant.runner_id });
    let message = format!("Attempt {} has begun.", lease.attempt);
    events::append(&mut tx, &lease.job_id, Level::Info, "job.started", &message, &data).await?;
    tx.commit().await?;
    Ok(Some(Claimed {
        lease,
        kind: row.kind,
        spec: row.spec,
        dataset_id: row.dataset_id,
        validation_dataset_id: row.validation_dataset_id,
        tokenizer_id: row.tokenizer_id,
        base_model_id: row.base_model_id,
        model_id: row.model_id,
    }))
}

/// Renews the lease and says where the job stands, so that a control change is seen even if its
/// notification was not.
pub async fn heartbeat(conn: &mut PgConnection, lease: &Lease, lease_seconds: f64, step: i64) -> Result<JobState, LeaseError> {
    sqlx::query_scalar!(
        r#"WITH beat AS (
               UPDATE job_attempts SET expires_at = now() + make_interval(secs => $2)
               WHERE lease_token = $1 AND ended_at IS NULL RETURNING job_id, n
           ), rank AS (
               UPDATE attempt_ranks r SET heartbeat = now(), step = $3, state = 'running'
               FROM beat WHERE r.job_id = beat.job_id AND r.attempt = beat.n AND r.rank = 0
           )
           SELECT state AS "state: JobState" FROM jobs JOIN beat ON beat.job_id = jobs.id"#,
        lease.token,
        lease_seconds,
        step,
    )
    .fetch_optional(conn)
    .await?
    .ok_or(LeaseError::Lost)
}

/// Holds the attempt, unended, for this transaction alone; every fenced write begins with this.
pub async fn fence(tx: &mut PgConnection, lease: &Lease) -> Result<(), LeaseError> {
    sqlx::query_scalar!(
        r#"SELECT n FROM job_attempts WHERE lease_token = $1 AND ended_at IS NULL FOR NO KEY UPDATE"#,
        lease.token
    )
    .fetch_optional(tx)
    .await?
    .map(drop)
    .ok_or(LeaseError::Lost)
}
