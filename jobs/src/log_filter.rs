//! What processes log, while they run: an admin's filter in one row, which every api and runner looks at.
//!
//! The row is polled, not announced: a process that lost a notification would log the wrong things for ever.

use std::time::Duration;

use sqlx::{PgExecutor, PgPool};
use time::OffsetDateTime;

use crate::waiting::answered;

/// How soon a filter takes effect.
pub const LOOKED_AT: Duration = Duration::from_secs(2);

/// A filter that an admin has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter {
    /// By module, as `--log` takes it.
    pub filter: String,
    pub expires_at: Option<OffsetDateTime>,
}

/// The filter that holds now; none: what each process was started with.
pub async fn current(db: impl PgExecutor<'_>) -> Result<Option<LogFilter>, sqlx::Error> {
    sqlx::query_as!(LogFilter, "SELECT filter, expires_at FROM log_filter WHERE expires_at IS NULL OR expires_at > now()")
        .fetch_optional(db)
        .await
}

/// Sets the filter for all processes, for so many seconds or until it is changed.
pub async fn set(db: impl PgExecutor<'_>, filter: &str, seconds: Option<i64>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO log_filter (filter, expires_at) VALUES ($1, now() + make_interval(secs => $2::bigint))
         ON CONFLICT (single) DO UPDATE SET filter = excluded.filter, expires_at = excluded.expires_at",
        filter,
        seconds,
    )
    .execute(db)
    .await
    .map(drop)
}

/// Gives every process its own filter back. Whether another one held.
pub async fn clear(db: impl PgExecutor<'_>) -> Result<bool, sqlx::Error> {
    let held = sqlx::query_scalar!(
        r#"WITH gone AS (DELETE FROM log_filter RETURNING expires_at)
           SELECT EXISTS (SELECT FROM gone WHERE expires_at IS NULL OR expires_at > now()) AS "held!""#
    );
    held.fetch_one(db).await
}

/// Tells `apply` each filter that holds from now on, until it is dropped. While the database is away, the last
/// one stays.
pub async fn follow(db: PgPool, apply: fn(Option<&str>)) {
    let mut applied = None;
    loop {
        match answered(current(&db)).await {
            Ok(found) => {
                let filter = found.map(|found| found.filter);
                if filter != applied {
                    apply(filter.as_deref());
                    applied = filter;
                }
            }
            Err(error) => tracing::debug!(%error, "the log filter cannot be read"),
        }
        tokio::time::sleep(LOOKED_AT).await;
    }
}
