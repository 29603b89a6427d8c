//! A job's events: numbered 1, 2, 3 … without gaps, in the order in which they become visible.
//!
//! The number comes from the job's own row, which stays locked until the transaction ends, so a
//! reader that has seen event n has seen every event before it. That is what lets a stream resume.

use lathe_model::protocol::Level;
use serde_json::Value;
use sqlx::PgConnection;

/// Announces a job whose events, metrics or state changed; the payload is its id.
pub const CHANNEL: &str = "lathe_events";

/// Adds an event and returns its number. The job must exist.
pub async fn append(
    conn: &mut PgConnection,
    job_id: &str,
    level: Level,
    code: &str,
    message: &str,
    data: &Value,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"WITH next AS (
               UPDATE jobs SET next_event = next_event + 1 WHERE id = $1 RETURNING next_event - 1 AS id
           ), added AS (
               INSERT INTO job_events (job_id, id, level, code, message, data)
               SELECT $1, next.id, $2, $3, $4, $5 FROM next RETURNING id
           ), told AS (
               SELECT pg_notify($6, $1)
           )
           SELECT added.id AS "id!" FROM added, told"#,
        job_id,
        level_name(level),
        code,
        message,
        data,
        CHANNEL,
    )
    .fetch_one(conn)
    .await
}

/// Neither text nor jsonb of the database takes a NUL.
pub fn clean(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// Wakes the streams of a job without an event (a metric, a change of state).
pub async fn wake(conn: &mut PgConnection, job_id: &str) -> Result<(), sqlx::Error> {
    sqlx::query!("SELECT pg_notify($1, $2) AS told", CHANNEL, job_id).fetch_one(conn).await.map(drop)
}

pub fn level_name(level: Level) -> &'static str {
    match level {
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
    }
}
