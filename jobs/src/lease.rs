//! Taking work and keeping it, under a lease.
//!
//! A claim is one short transaction that makes an attempt with a fresh random token. From then on
//! every write names the token and takes effect only while that attempt has not ended; otherwise it
//! is [`LeaseError::Lost`] and the work must stop. No row stays locked while a job runs. An attempt
//! whose time has run out keeps its lease until a reaper has ended it, so a runner that was cut off
//! from the database goes on when it is back unless someone has decided otherwise.

use serde_json::Value;
use sqlx::{Connection, PgConnection};

use crate::{
    artifacts::ArtifactError,
    events, ids, quota,
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
    /// Devices that are free.
    pub devices: i32,
    /// Devices in all. A job that states more is left for another runner; one that states more than are free waits, and the jobs
    /// behind it with it, so that it comes to its turn.
    pub capacity: i32,
    /// What the ranks will run on, for their rows: the devices that are free, in an array.
    pub offered: Value,
    pub lease_seconds: f64,
}

/// A job as its runner needs it.
#[derive(Clone, Debug)]
pub struct Claimed {
    pub lease: Lease,
    pub kind: Kind,
    /// Of those that were offered, the first so many are the job's.
    pub devices: i32,
    /// A [`crate::spec::Spec`], perhaps of a later version than this one reads.
    pub spec: Value,
    pub dataset_id: Option<String>,
    pub validation_dataset_id: Option<String>,
    pub tokenizer_id: Option<String>,
    pub base_model_id: Option<String>,
    pub model_id: Option<String>,
    /// The context of the request that made the job ([`crate::trace::read`]).
    pub traceparent: Option<String>,
}

/// How often another runner may be quicker before a claim is left to the next look.
const RUNNERS_QUICKER: usize = 3;

/// Makes an attempt of the job that `$next` (a query of one id, over the parameters from `$9` on) finds. One
/// statement, so that a claim costs one answer of the database and one version of the job's row.
macro_rules! claim_next {
    ($conn:expr, $claimant:expr, $next:literal $(, $argument:expr)*) => {{
        let (claimant, token) = ($claimant, ids::secret());
        let row = sqlx::query!(
            "WITH next AS (" + $next + r#"), claimed AS (
                   UPDATE jobs SET state = 'running', attempt = attempt + 1, started_at = coalesce(started_at, now()),
                       phase = 'preparing', next_event = next_event + 1
                   FROM next WHERE jobs.id = next.id AND state = 'queued'
                   RETURNING jobs.id, attempt, next_event - 1 AS event, kind, devices, spec, dataset_id, validation_dataset_id, tokenizer_id,
                       base_model_id, model_id, traceparent
               ), attempts AS (
                   INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at)
                   SELECT id, attempt, $3, $4, now() + make_interval(secs => $5) FROM claimed
               ), ranks AS (
                   INSERT INTO attempt_ranks (job_id, attempt, rank, runner_id, devices, state)
                   SELECT id, attempt, rank, $3, jsonb_build_array($6::jsonb -> rank), 'starting'
                   FROM claimed, generate_series(0, greatest(devices, 1) - 1) AS rank
               ), begun_datasets AS (
                   UPDATE datasets SET state = 'running' FROM claimed WHERE job_id = claimed.id AND state = 'queued'
               ), begun_tokenizers AS (
                   UPDATE tokenizers SET state = 'running' FROM claimed WHERE job_id = claimed.id AND state = 'queued'
               ), begun_models AS (
                   UPDATE models SET state = 'running' FROM claimed WHERE job_id = claimed.id AND state = 'queued'
               ), events AS (
                   INSERT INTO job_events (job_id, id, level, code, message, data)
                   SELECT id, event, 'info', 'job.started', format('Attempt %s has begun.', attempt),
                       jsonb_build_object('attempt', attempt, 'runner', $3::text) FROM claimed
               )
               SELECT id, attempt, kind AS "kind: Kind", devices, spec, dataset_id, validation_dataset_id, tokenizer_id, base_model_id, model_id, traceparent,
                   pg_notify($7, id) AS told
               FROM claimed"#,
            claimant.pool.as_str(),
            claimant.devices,
            claimant.runner_id,
            token,
            claimant.lease_seconds,
            claimant.offered,
            events::CHANNEL,
            claimant.capacity
            $(, $argument)*
        )
        .fetch_optional($conn)
        .await?;
        row.map(|row| Claimed {
            lease: Lease { job_id: row.id, attempt: row.attempt, token },
            kind: row.kind,
            devices: row.devices,
            spec: row.spec,
            dataset_id: row.dataset_id,
            validation_dataset_id: row.validation_dataset_id,
            tokenizer_id: row.tokenizer_id,
            base_model_id: row.base_model_id,
            model_id: row.model_id,
            traceparent: row.traceparent,
        })
    }};
}

/// Takes the job that is next: the highest priority, then the longest queued, of those whose project may run
/// one more. One statement where no project with a quota has anything to claim.
pub async fn claim(conn: &mut PgConnection, claimant: &Claimant) -> Result<Option<Claimed>, sqlx::Error> {
    for _ in 0..RUNNERS_QUICKER {
        if let Some(claimed) = claim_unlimited(conn, claimant, true).await? {
            return Ok(Some(claimed));
        }
        let Some(project) = quota::open_project(conn, claimant).await? else { return Ok(None) };
        if let Some(claimed) = claim_limited(conn, claimant, &project).await? {
            return Ok(Some(claimed));
        }
        // A job without a quota comes first, or another runner was quicker.
        if let Some(claimed) = claim_unlimited(conn, claimant, false).await? {
            return Ok(Some(claimed));
        }
    }
    Ok(None)
}

/// From the projects without a quota. `yields`: only if no project with one has anything to claim.
async fn claim_unlimited(conn: &mut PgConnection, claimant: &Claimant, yields: bool) -> Result<Option<Claimed>, sqlx::Error> {
    Ok(claim_next!(
        conn,
        claimant,
        "SELECT id FROM (
             SELECT id, devices FROM jobs
             WHERE state = 'queued' AND NOT limited AND pool = $1 AND devices <= $8 AND run_after <= now()
               AND NOT ($9 AND EXISTS (
                   SELECT FROM projects p
                   WHERE p.running_jobs_quota IS NOT NULL
                     AND EXISTS (SELECT FROM jobs j
                                 WHERE j.state = 'queued' AND j.limited AND j.project_id = p.id AND j.pool = $1
                                   AND j.devices <= $8 AND j.run_after <= now())
                     AND p.running_jobs_quota > (SELECT count(*) FROM jobs r
                                                 WHERE r.finished_at IS NULL AND r.state IN ('running', 'pausing', 'cancelling')
                                                   AND r.project_id = p.id)))
             ORDER BY priority DESC, queued_at, id FOR UPDATE SKIP LOCKED LIMIT 1) first
         WHERE devices <= $2",
        yields
    ))
}

/// From one project with a quota, if it has room and its next job comes before all of the projects without
/// one. Claims of one project go one after the other, so that two never count the same room.
async fn claim_limited(conn: &mut PgConnection, claimant: &Claimant, project: &str) -> Result<Option<Claimed>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    quota::hold(&mut tx, project).await?;
    let claimed = claim_next!(
        &mut *tx,
        claimant,
        "SELECT id FROM jobs
         WHERE state = 'queued' AND id = (
             SELECT mine.id
             FROM (SELECT id, priority, queued_at FROM jobs
                   WHERE state = 'queued' AND limited AND project_id = $9 AND pool = $1 AND devices <= $8 AND run_after <= now()
                   ORDER BY priority DESC, queued_at, id LIMIT 1) mine
             LEFT JOIN (SELECT id, priority, queued_at FROM jobs
                        WHERE state = 'queued' AND NOT limited AND pool = $1 AND devices <= $8 AND run_after <= now()
                        ORDER BY priority DESC, queued_at, id LIMIT 1) other ON true
             WHERE (other.id IS NULL OR (-mine.priority::bigint, mine.queued_at, mine.id) < (-other.priority::bigint, other.queued_at, other.id))
               AND (SELECT running_jobs_quota FROM projects WHERE id = $9)
                 > (SELECT count(*) FROM jobs
                    WHERE finished_at IS NULL AND state IN ('running', 'pausing', 'cancelling') AND project_id = $9))
           AND devices <= $2
         FOR UPDATE SKIP LOCKED",
        project
    );
    tx.commit().await?;
    Ok(claimed)
}

/// Renews the lease and says where the job stands, so that a control change is seen even if its
/// notification was not. `steps` are those of the ranks, in their order.
pub async fn heartbeat(
    conn: &mut PgConnection,
    lease: &Lease,
    lease_seconds: f64,
    steps: &[i64],
) -> Result<JobState, LeaseError> {
    sqlx::query_scalar!(
        r#"WITH beat AS (
               UPDATE job_attempts SET expires_at = now() + make_interval(secs => $2)
               WHERE lease_token = $1 AND ended_at IS NULL RETURNING job_id, n
           ), rank AS (
               UPDATE attempt_ranks r SET heartbeat = now(), step = at.step, state = 'running'
               FROM beat, unnest($3::bigint[]) WITH ORDINALITY AS at (step, number)
               WHERE r.job_id = beat.job_id AND r.attempt = beat.n AND r.rank = at.number - 1
           )
           SELECT state AS "state: JobState" FROM jobs JOIN beat ON beat.job_id = jobs.id"#,
        lease.token,
        lease_seconds,
        steps,
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
