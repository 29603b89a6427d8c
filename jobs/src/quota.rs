//! What a project may take: bytes of storage, and jobs that run at a time.
//!
//! A job of a project with a limit on running jobs is marked (`jobs.limited`), and waits in its project's own
//! queue. A claim looks into those queues of projects that have room, and passes by the others whole, however
//! many of their jobs wait (see [`crate::lease::claim`]). The limit holds for claims: a job that runs when it is
//! lowered goes on.

use sqlx::PgConnection;

use crate::{lease::Claimant, settle};

/// Quotas of a project; none: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quotas {
    pub storage_bytes: Option<i64>,
    pub running_jobs: Option<i32>,
}

/// What a project takes now. Bytes of what is not deleted; an upload takes what it promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub files: i64,
    pub uploads: i64,
    pub datasets: i64,
    pub tokenizers: i64,
    pub models: i64,
    pub checkpoints: i64,
    pub running_jobs: i64,
}

impl Usage {
    /// Bytes of all together.
    pub fn storage_bytes(&self) -> i64 {
        self.files + self.uploads + self.datasets + self.tokenizers + self.models + self.checkpoints
    }
}

/// Sums the rows of a project up, the caller's uncommitted ones included.
pub async fn usage(conn: &mut PgConnection, project_id: &str) -> Result<Usage, sqlx::Error> {
    sqlx::query_as!(
        Usage,
        r#"SELECT (SELECT coalesce(sum(bytes), 0)::bigint FROM files WHERE project_id = $1 AND deleted_at IS NULL) AS "files!",
                  (SELECT coalesce(sum(greatest(u.bytes, (SELECT sum(p.bytes) FROM upload_parts p WHERE p.upload_id = u.id))), 0)::bigint
                   FROM uploads u WHERE u.project_id = $1 AND u.state = 'pending' AND u.expires_at > now()) AS "uploads!",
                  (SELECT coalesce(sum(coalesce(bytes, (statistics ->> 'bytes')::bigint)), 0)::bigint
                   FROM datasets WHERE project_id = $1 AND deleted_at IS NULL) AS "datasets!",
                  (SELECT coalesce(sum(bytes), 0)::bigint FROM tokenizers WHERE project_id = $1 AND deleted_at IS NULL) AS "tokenizers!",
                  (SELECT coalesce(sum(bytes), 0)::bigint FROM models WHERE project_id = $1 AND deleted_at IS NULL) AS "models!",
                  (SELECT coalesce(sum(c.bytes), 0)::bigint FROM checkpoints c JOIN jobs j ON j.id = c.job_id
                   WHERE j.project_id = $1 AND j.kind = 'train') AS "checkpoints!",
                  (SELECT count(*) FROM jobs
                   WHERE finished_at IS NULL AND state IN ('running', 'pausing', 'cancelling') AND project_id = $1) AS "running_jobs!""#,
        project_id
    )
    .fetch_one(conn)
    .await
}

/// The quota on a project's storage, where there is one and `more` bytes would exceed it. Holds the project until the
/// transaction ends, so that two never count the same room.
pub async fn exceeded_storage(conn: &mut PgConnection, project_id: &str, more: i64) -> Result<Option<i64>, sqlx::Error> {
    let quota = sqlx::query_scalar!(
        r#"SELECT storage_quota_bytes AS "quota!" FROM projects WHERE id = $1 AND storage_quota_bytes IS NOT NULL FOR NO KEY UPDATE"#,
        project_id
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(quota) = quota else { return Ok(None) };
    let used = usage(conn, project_id).await?.storage_bytes();
    Ok(Some(quota).filter(|quota| used.saturating_add(more) > *quota))
}

/// Sets a project's quotas, and marks its unfinished jobs accordingly. Whether they were others before; none:
/// there is no such project.
pub async fn set(conn: &mut PgConnection, project_id: &str, quotas: Quotas) -> Result<Option<bool>, sqlx::Error> {
    // Waits for whoever adds a job, and keeps others from it.
    let changed = sqlx::query_scalar!(
        r#"WITH before AS (SELECT id, storage_quota_bytes, running_jobs_quota FROM projects WHERE id = $1 FOR NO KEY UPDATE)
           UPDATE projects p SET storage_quota_bytes = $2, running_jobs_quota = $3 FROM before WHERE p.id = before.id
           RETURNING (before.storage_quota_bytes, before.running_jobs_quota) IS DISTINCT FROM ($2::bigint, $3::integer) AS "changed!""#,
        project_id,
        quotas.storage_bytes,
        quotas.running_jobs,
    )
    .fetch_optional(&mut *conn)
    .await?;
    sqlx::query!(
        "UPDATE jobs SET limited = $2 WHERE project_id = $1 AND finished_at IS NULL AND limited <> $2",
        project_id,
        quotas.running_jobs.is_some(),
    )
    .execute(&mut *conn)
    .await?;
    // There may be room now.
    settle::tell_runners(conn, "").await?;
    Ok(changed)
}

/// Whether a project's jobs are limited; stays so until the transaction ends.
pub(crate) async fn limits(conn: &mut PgConnection, project_id: &str) -> Result<bool, sqlx::Error> {
    let limited = sqlx::query_scalar!(
        r#"SELECT running_jobs_quota IS NOT NULL AS "limited!" FROM projects WHERE id = $1 FOR SHARE"#,
        project_id
    )
    .fetch_optional(conn)
    .await?;
    Ok(limited.unwrap_or(false))
}

/// Of the projects with a quota that have room, the one whose next job comes first.
pub(crate) async fn open_project(conn: &mut PgConnection, claimant: &Claimant) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar!(
        "SELECT p.id FROM projects p CROSS JOIN LATERAL (
             SELECT priority, queued_at, id FROM jobs
             WHERE state = 'queued' AND limited AND project_id = p.id AND pool = $1 AND devices <= $2 AND run_after <= now()
             ORDER BY priority DESC, queued_at, id LIMIT 1) next
         WHERE p.running_jobs_quota > (SELECT count(*) FROM jobs r
                                       WHERE r.finished_at IS NULL AND r.state IN ('running', 'pausing', 'cancelling')
                                         AND r.project_id = p.id)
         ORDER BY next.priority DESC, next.queued_at, next.id LIMIT 1",
        claimant.pool.as_str(),
        claimant.capacity,
    )
    .fetch_optional(conn)
    .await
}

/// Holds a project against other claims until the transaction ends; statements after this see what they claimed.
pub(crate) async fn hold(conn: &mut PgConnection, project_id: &str) -> Result<(), sqlx::Error> {
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtext('lathe_quota'), hashtext($1)) AS held", project_id)
        .fetch_one(conn)
        .await
        .map(drop)
}
