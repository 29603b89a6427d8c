//! Commits whose answer may be lost.
//!
//! A database that dies after it has committed and before it has said so leaves a client without an
//! answer: repeating the creation would make a second thing, and undoing its other half (a file's
//! bytes) would lose the first. PostgreSQL remembers how each recent transaction ended, and is asked.

use std::time::{Duration, Instant};

use lathe_jobs::waiting::unless_stuck;
use sqlx::{PgPool, Postgres, Transaction};

use crate::problem::is_connection_loss;

/// How long the outcome is asked for; longer than a crashed server usually takes to recover.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long one answer may take. Less than whoever waits for the whole of it would wait for nothing.
const ANSWER: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(200);

/// Commits, and on a lost connection finds out whether it did.
///
/// # Errors
/// The commit's own error where it did not take effect, or where nobody could be asked in time.
pub async fn commit(db: &PgPool, mut tx: Transaction<'_, Postgres>) -> Result<(), sqlx::Error> {
    let id = sqlx::query_scalar!(r#"SELECT pg_current_xact_id()::text AS "id!""#).fetch_one(&mut *tx).await?;
    match bounded(tx.commit()).await {
        Err(error) if is_lost(&error) => match outcome(db, &id).await {
            Some(true) => Ok(()),
            Some(false) | None => Err(error),
        },
        ended => ended,
    }
}

async fn bounded<T>(question: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    unless_stuck(ANSWER, question).await.unwrap_or_else(|stuck| Err(stuck.into()))
}

/// A server that is told to stop says so, and may have committed before.
fn is_lost(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|refused| refused.code());
    is_connection_loss(error) || code.is_some_and(|code| code.starts_with("57P") || code.starts_with("08"))
}

/// Whether the transaction has committed; `None`: it cannot be told.
async fn outcome(db: &PgPool, id: &str) -> Option<bool> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let status = bounded(sqlx::query_scalar!("SELECT pg_xact_status($1::text::xid8) AS status", id).fetch_one(db)).await;
        match status.as_ref().map(Option::as_deref) {
            Ok(Some("committed")) => return Some(true),
            Ok(Some("aborted")) => return Some(false),
            // Too long ago to be remembered.
            Ok(None) => return None,
            // Still ending, or still away.
            Ok(Some(_)) | Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[sqlx::test(migrations = "../migrations")]
    async fn the_outcome_of_a_transaction_is_known_afterwards(db: PgPool) {
        let mut ids = Vec::new();
        for (name, commits) in [("kept", true), ("dropped", false)] {
            let mut tx = db.begin().await.expect("the database is there");
            sqlx::query("INSERT INTO projects (id, name) VALUES ($1, $1)").bind(name).execute(&mut *tx).await.expect("a new row");
            let id: String =
                sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(&mut *tx).await.expect("it has an id");
            ids.push(id);
            match commits {
                true => commit(&db, tx).await.expect("the database is there"),
                false => tx.rollback().await.expect("the database is there"),
            }
        }
        assert_eq!((outcome(&db, &ids[0]).await, outcome(&db, &ids[1]).await), (Some(true), Some(false)));
    }
}
