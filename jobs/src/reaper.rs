//! Ends attempts whose lease has run out, so that no job waits for a runner that is gone.
//!
//! Every runner has a reaper; rows are taken with SKIP LOCKED, so several never do the same twice.
//! After it first reaches the database, and again after each time it could not, waited long for an answer,
//! or stood still itself, a reaper waits one lease: runners that were cut off with it renew theirs first.

use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection, PgPool};

use crate::{artifacts::Artifacts, ending, lease::LeaseError, replicas, settle, waiting::answered};

/// Works until it is dropped.
pub async fn run(db: PgPool, artifacts: Artifacts, lease_seconds: f64) {
    let lease = Duration::from_secs_f64(lease_seconds);
    let (mut reached, mut looked) = (false, Instant::now());
    loop {
        // Whatever held this one up may have held up its neighbours, and a cut in that time goes unseen.
        if !reached || looked.elapsed() > lease / 2 {
            match answered(sqlx::query_scalar!("SELECT 1 AS one").fetch_one(&db)).await {
                Ok(_) => tokio::time::sleep(lease).await,
                Err(error) => {
                    tracing::warn!(%error, "the reaper does not reach the database");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            }
        }
        // A database that stood still lets every lease run out at once. A lease that was renewed as it
        // should be outlives half its length; a round that takes longer is given up.
        reached = match tokio::time::timeout(lease / 2, sweep(&db, &artifacts)).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the reaper could not look for expired leases");
                false
            }
            Err(_) => {
                tracing::warn!("the database takes long to answer; the reaper waits one lease");
                false
            }
        };
        looked = Instant::now();
        tokio::time::sleep((lease / 3).min(Duration::from_secs(1))).await;
    }
}

/// One round: attempts, replicas, runners, and blocked jobs that nothing blocks. The number of
/// attempts ended.
pub async fn sweep(db: &PgPool, artifacts: &Artifacts) -> Result<usize, LeaseError> {
    let mut conn = db.acquire().await?;
    let mut ended = 0;
    while let Some((lease, state)) = ending::reap_one(&mut conn, artifacts).await? {
        tracing::warn!(job.id = lease.job_id, job.attempt = lease.attempt, job.state = %state, "ended an attempt whose lease ran out");
        ended += 1;
    }
    replicas::reap(&mut conn).await?;
    sqlx::query!("UPDATE runners SET stopped_at = now() WHERE stopped_at IS NULL AND expires_at < now()")
        .execute(&mut *conn)
        .await?;
    unblock(&mut conn).await?;
    Ok(ended)
}

/// The transaction that ends a job settles its dependants; this finds what is left where that one could
/// not see a job that was being resumed.
async fn unblock(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    let waiting = sqlx::query_scalar!(
        "SELECT id FROM jobs b WHERE state = 'blocked' AND NOT EXISTS (
             SELECT FROM job_dependencies d JOIN jobs n ON n.id = d.needs WHERE d.job_id = b.id AND n.state <> 'succeeded')
         ORDER BY seq FOR UPDATE SKIP LOCKED"
    )
    .fetch_all(&mut *tx)
    .await?;
    settle::release(&mut tx, &waiting).await?;
    tx.commit().await
}
