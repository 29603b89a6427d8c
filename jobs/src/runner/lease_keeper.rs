//! The two tasks beside an attempt's conversation with its worker: one keeps the lease, one writes under
//! it. Both wait for the database, and neither stops the work for that: only a lease that has become
//! someone else's does.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use lathe_model::protocol::Level;
use serde_json::json;
use tokio::time::Instant;

use super::{
    attempt::{Attempt, Control},
    outbox::Write,
};
use crate::{
    artifacts, checkpoints,
    lease::{self, LeaseError},
    metrics::{self, Event},
    state::JobState,
    waiting::answered,
};

/// Between two attempts to reach a database that is away.
pub const RETRY: Duration = Duration::from_secs(1);

/// Renews the lease three times in its length, at once when the job is spoken of, and every second
/// while the database is away.
pub async fn renew(attempt: Arc<Attempt>) {
    let seconds = attempt.context.config.lease_seconds;
    let (period, mut spoken) = (Duration::from_secs_f64(seconds / 3.0), attempt.context.spoken_of.subscribe());
    loop {
        let steps: Vec<i64> = attempt.steps.iter().map(|step| step.load(Ordering::Relaxed)).collect();
        let renewed = match attempt.context.db.acquire().await {
            Ok(mut conn) => {
                let beat = lease::heartbeat(&mut conn, &attempt.lease, seconds, &steps);
                tokio::time::timeout(period, beat).await.unwrap_or(Err(LeaseError::Database(sqlx::Error::PoolTimedOut)))
            }
            Err(error) => Err(error.into()),
        };
        let next = match renewed {
            Ok(state) => {
                let control = match state {
                    JobState::Pausing => Control::Pause,
                    JobState::Cancelling => Control::Cancel,
                    _ => Control::Run,
                };
                attempt.control.send_if_modified(|current| std::mem::replace(current, control) != control);
                period
            }
            Err(LeaseError::Lost) => {
                attempt.control.send_replace(Control::LeaseLost);
                return;
            }
            Err(error) => {
                tracing::warn!(job.id = attempt.lease.job_id, %error, "a lease could not be renewed; the work goes on");
                period.min(RETRY)
            }
        };
        let until = Instant::now() + next;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => break,
                heard = spoken.recv() => match heard {
                    Ok(id) if id != attempt.lease.job_id => continue,
                    // Too many to keep count of, so perhaps this one.
                    Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => break,
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => { tokio::time::sleep_until(until).await; break }
                },
            }
        }
    }
}

/// Writes what waits until it is closed and empty.
pub async fn write_all(attempt: Arc<Attempt>) {
    while let Some(write) = attempt.outbox.next().await {
        match answered(write_one(&attempt, &write)).await {
            Ok(()) => attempt.outbox.done(),
            Err(LeaseError::Lost) => {
                attempt.control.send_replace(Control::LeaseLost);
                return;
            }
            Err(LeaseError::Database(error)) if !is_permanent(&error) => {
                tracing::warn!(job.id = attempt.lease.job_id, %error, "reports wait for the database");
                attempt.outbox.put_back(write);
                tokio::time::sleep(RETRY).await;
            }
            Err(LeaseError::Artifact(error)) if error.is_away() => {
                tracing::warn!(job.id = attempt.lease.job_id, %error, "a checkpoint waits for the artifact store");
                attempt.outbox.put_back(write);
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => {
                tracing::error!(job.id = attempt.lease.job_id, %error, "a report could not be kept");
                attempt.outbox.done();
            }
        }
    }
}

async fn write_one(attempt: &Attempt, write: &Write) -> Result<(), LeaseError> {
    let (lease, artifacts) = (&attempt.lease, &attempt.context.artifacts);
    let mut conn = attempt.context.db.acquire().await?;
    match write {
        Write::Batch(batch) if batch.is_empty() => Ok(()),
        Write::Batch(batch) => metrics::record(&mut conn, lease, batch).await,
        Write::Stored(path) => {
            let failed = |source| artifacts::ArtifactError::Io { key: path.display().to_string(), source };
            let bytes = tokio::fs::read(path).await.map_err(failed)?;
            let batch = serde_json::from_slice(&bytes).map_err(|error| failed(io::Error::other(error)))?;
            metrics::record(&mut conn, lease, &batch).await
        }
        Write::Started(numerics) => metrics::started(&mut conn, lease, numerics).await,
        Write::Resolved(spec) => metrics::resolved(&mut conn, lease, spec).await,
        Write::Checkpoint(staged) => {
            let begun = SystemTime::now();
            let id = checkpoints::register(&mut conn, artifacts, lease, staged).await?;
            attempt.trace.published(staged.step, begun);
            artifacts.share_log(&lease.job_id, lease.attempt).await;
            let data =
                json!({ "checkpoint": id, "step": staged.step, "validation_loss": staged.validation_loss, "best": staged.best });
            attempt.outbox.gather(true, |batch| {
                batch.events.push(Event::new(Level::Info, "checkpoint.saved", &format!("Saved step {}.", staged.step), data))
            });
            checkpoints::prune(&mut conn, artifacts, lease, attempt.keep_checkpoints.load(Ordering::Relaxed)).await
        }
    }
}

/// An error that the same statement would meet again.
pub fn is_permanent(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(refused) => {
            // Connection, resources, operator, system, and a transaction that lost against another.
            let passing = ["08", "40", "53", "55", "57", "58"];
            refused.code().is_some_and(|code| !passing.iter().any(|class| code.starts_with(class)))
        }
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => false,
        _ => true,
    }
}
