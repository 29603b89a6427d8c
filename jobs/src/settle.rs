//! What follows for others when a job ends: dependants are released or fail, the dataset, tokenizer or
//! model that it was to make becomes failed with it, and runners are told.
//!
//! Every function runs in the transaction that ends the job, after the update that ends it. Several jobs
//! are locked in the order in which they were made (`jobs.seq`), and resources after jobs.

use lathe_model::protocol::{Failure, FailureCode, Level};
use serde_json::json;
use sqlx::PgConnection;

use crate::events;

/// Announces work or a control change to runners; the payload is the job's id, or empty where it may be any.
pub const CHANNEL: &str = "lathe_jobs";

/// Tells every runner that there is work, or that a job's state changed. Sent at the commit.
pub async fn tell_runners(conn: &mut PgConnection, job_id: &str) -> Result<(), sqlx::Error> {
    sqlx::query!("SELECT pg_notify($1, $2) AS told", CHANNEL, job_id).fetch_one(conn).await.map(drop)
}

/// Queues the dependants of a job that has succeeded, where nothing else keeps them blocked.
pub async fn release_dependants(conn: &mut PgConnection, job_id: &str) -> Result<(), sqlx::Error> {
    // Locked before their needs are looked at: when two needs succeed at once, the later transaction
    // looks after the earlier one has committed.
    let waiting = sqlx::query_scalar!(
        "SELECT j.id FROM jobs j JOIN job_dependencies d ON d.job_id = j.id
         WHERE d.needs = $1 AND j.state = 'blocked' ORDER BY j.seq FOR UPDATE OF j",
        job_id,
    )
    .fetch_all(&mut *conn)
    .await?;
    release(conn, &waiting).await
}

/// Queues those of the blocked jobs `waiting`, which are locked, whose needs have all succeeded.
pub async fn release(conn: &mut PgConnection, waiting: &[String]) -> Result<(), sqlx::Error> {
    if waiting.is_empty() {
        return Ok(());
    }
    let released = sqlx::query_scalar!(
        "UPDATE jobs SET state = 'queued', queued_at = now()
         WHERE id = ANY($1) AND state = 'blocked' AND NOT EXISTS (
             SELECT FROM job_dependencies d JOIN jobs n ON n.id = d.needs WHERE d.job_id = jobs.id AND n.state <> 'succeeded')
         RETURNING id",
        waiting,
    )
    .fetch_all(&mut *conn)
    .await?;
    for id in released {
        events::append(conn, &id, Level::Info, "job.queued", "Everything that the job needs is there.", &json!({})).await?;
        tell_runners(conn, &id).await?;
    }
    Ok(())
}

/// Fails everything that needs a job which has failed or was cancelled, and what needs that in turn.
pub async fn fail_dependants(conn: &mut PgConnection, job_id: &str) -> Result<(), sqlx::Error> {
    loop {
        // All at once, so that they are locked in one order.
        let doomed = sqlx::query_scalar!(
            "WITH RECURSIVE doomed AS (
                 SELECT job_id FROM job_dependencies WHERE needs = $1
                 UNION SELECT d.job_id FROM job_dependencies d JOIN doomed ON d.needs = doomed.job_id)
             SELECT id FROM jobs WHERE id IN (SELECT job_id FROM doomed) AND state IN ('blocked', 'paused') ORDER BY seq FOR UPDATE",
            job_id,
        )
        .fetch_all(&mut *conn)
        .await?;
        let mut failed = false;
        for id in &doomed {
            failed |= fail_with_its_need(conn, id).await?;
        }
        // Another round finds what was added while this one waited for a lock.
        if !failed {
            return Ok(());
        }
    }
}

/// Fails a locked job if something that it needs has not succeeded and never will.
async fn fail_with_its_need(conn: &mut PgConnection, job_id: &str) -> Result<bool, sqlx::Error> {
    let cause = sqlx::query_scalar!(
        "SELECT n.id FROM job_dependencies d JOIN jobs n ON n.id = d.needs
         WHERE d.job_id = $1 AND n.state IN ('failed', 'cancelled') ORDER BY n.seq LIMIT 1",
        job_id,
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(cause) = cause else { return Ok(false) };
    let failure = Failure {
        code: FailureCode::DependencyFailed,
        message: format!(
            "The job {cause}, which this one needs, did not succeed. Repair and repeat that one, then create this one again."
        ),
        param: None,
        retryable: false,
    };
    let failed = sqlx::query!(
        "UPDATE jobs SET state = 'failed', error = $2, finished_at = now(), phase = NULL
         WHERE id = $1 AND state IN ('blocked', 'paused')",
        job_id,
        error_of(&failure),
    )
    .execute(&mut *conn)
    .await?;
    if failed.rows_affected() == 0 {
        return Ok(false);
    }
    fail_resources(conn, job_id, &failure).await?;
    events::append(conn, job_id, Level::Error, "job.failed", &failure.message, &json!({ "code": failure.code })).await?;
    Ok(true)
}

/// Fails what a job was to make.
pub async fn fail_resources(conn: &mut PgConnection, job_id: &str, failure: &Failure) -> Result<(), sqlx::Error> {
    let error = error_of(failure);
    sqlx::query!(
        "UPDATE datasets SET state = 'failed', error = $2 WHERE job_id = $1 AND state IN ('queued', 'running')",
        job_id,
        error
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "UPDATE tokenizers SET state = 'failed', error = $2 WHERE job_id = $1 AND state IN ('queued', 'running')",
        job_id,
        error
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "UPDATE models SET state = 'failed', error = $2 WHERE job_id = $1 AND state IN ('queued', 'running')",
        job_id,
        error
    )
    .execute(&mut *conn)
    .await?;
    Ok(())
}

/// Why what a cancelled job was to make will not come.
pub fn cancelled() -> Failure {
    Failure {
        code: FailureCode::Cancelled,
        message: "The job that was to make this was cancelled.".into(),
        param: None,
        retryable: false,
    }
}

/// The column `error` of jobs and resources.
pub fn error_of(failure: &Failure) -> serde_json::Value {
    json!({ "code": failure.code, "message": failure.message, "param": failure.param })
}
