//! How attempts end, and what that means for their jobs: the next state, what is published, who follows.
//!
//! Each end is one transaction under the lease, so that it takes effect as a whole or not at all, and once.

use lathe_model::protocol::{Failure, FailureCode, Level};
use serde_json::json;
use sqlx::{Connection, PgConnection};

use crate::{
    artifacts::Artifacts,
    events,
    lease::{Lease, LeaseError},
    publish::{self, Product},
    settle,
    state::{JobState, Kind, Outcome},
};

/// Losses running from which on each counts as a failure: a job that takes its host down must end.
const LOSSES_FORGIVEN: i64 = 4;

/// How an attempt came to its end.
#[derive(Clone, Debug)]
pub enum Ending {
    /// The worker is done; the product is published as a part of ending the job.
    Succeeded(Product),
    /// The worker stopped because it was asked to.
    Stopped,
    /// The runner is to stop.
    Interrupted,
    /// The disk is nearly full: the job waits until some of it is free.
    DiskLow,
    Failed(Failure),
    /// Nobody has renewed the lease.
    Lost,
}

/// What an ending means for a job that stands in some state.
#[derive(Debug, PartialEq)]
struct Settlement {
    state: JobState,
    outcome: Outcome,
    counts: bool,
    failure: Option<Failure>,
}

/// A leased job when its attempt ends.
#[derive(Clone, Copy, Debug)]
struct Standing {
    state: JobState,
    kind: Kind,
    /// Before this attempt.
    failures: i32,
    max_attempts: i32,
    /// Running, before this attempt.
    losses: i64,
}

/// Where a leased job goes.
fn settle_state(job: Standing, ending: &Ending) -> Settlement {
    let outcome = match ending {
        Ending::Succeeded(_) => Outcome::Succeeded,
        Ending::Stopped if job.state == JobState::Pausing => Outcome::Paused,
        Ending::Stopped | Ending::Interrupted | Ending::DiskLow => Outcome::Interrupted,
        Ending::Failed(_) => Outcome::Failed,
        Ending::Lost => Outcome::Lost,
    };
    if job.state == JobState::Cancelling {
        let outcome = if outcome == Outcome::Lost { outcome } else { Outcome::Cancelled };
        return Settlement { state: JobState::Cancelled, outcome, counts: false, failure: None };
    }
    let again = if job.state == JobState::Pausing { JobState::Paused } else { JobState::Queued };
    let failure = match ending {
        Ending::Succeeded(_) => return Settlement { state: JobState::Succeeded, outcome, counts: false, failure: None },
        Ending::Failed(failure) => failure.clone(),
        Ending::Lost if job.losses >= LOSSES_FORGIVEN => Failure {
            code: FailureCode::WorkerCrashed,
            message: format!("The runner was lost {} times in a row while it ran this job.", job.losses + 1),
            param: None,
            retryable: true,
        },
        Ending::Stopped | Ending::Interrupted | Ending::DiskLow | Ending::Lost => {
            return Settlement { state: again, outcome, counts: false, failure: None };
        }
    };
    if failure.code == FailureCode::DiskFull {
        return no_room(job.kind, failure);
    }
    if !failure.retryable {
        return Settlement { state: JobState::Failed, outcome, counts: true, failure: Some(failure) };
    }
    if job.failures + 1 < job.max_attempts {
        return Settlement { state: again, outcome, counts: true, failure: Some(failure) };
    }
    let exhausted = Failure {
        code: FailureCode::AttemptsExhausted,
        message: format!("{} attempts failed. The last one: {}", job.failures + 1, failure.message),
        param: failure.param,
        retryable: false,
    };
    Settlement { state: JobState::Failed, outcome, counts: true, failure: Some(exhausted) }
}

/// No attempt finds room that nobody makes. What is saved waits to be resumed; other jobs have nothing to keep.
fn no_room(kind: Kind, failure: Failure) -> Settlement {
    match kind.saves() {
        true => Settlement { state: JobState::Paused, outcome: Outcome::Paused, counts: false, failure: Some(failure) },
        false => Settlement { state: JobState::Failed, outcome: Outcome::Failed, counts: true, failure: Some(failure) },
    }
}

/// Seconds before the attempt that follows a failure: 1, 4, 16 …, at most 5 minutes.
fn back_off(failures: i32) -> f64 {
    4f64.powi(failures.clamp(1, 6) - 1).min(300.0)
}

/// Ends the attempt and moves its job on: publishes what a success made, retries or fails, and lets
/// dependants follow. All of it takes effect or none; repeated after a lost answer it is
/// [`LeaseError::Lost`], which then means that it is done.
pub async fn finish(
    conn: &mut PgConnection,
    artifacts: &Artifacts,
    lease: &Lease,
    ending: Ending,
) -> Result<JobState, LeaseError> {
    let mut tx = conn.begin().await?;
    let live =
        sqlx::query_scalar!("SELECT n FROM job_attempts WHERE lease_token = $1 AND ended_at IS NULL FOR UPDATE", lease.token)
            .fetch_optional(&mut *tx)
            .await?;
    if live.is_none() {
        return Err(LeaseError::Lost);
    }
    let state = end(&mut tx, artifacts, lease, ending).await?;
    tx.commit().await?;
    Ok(state)
}

/// Ends one attempt whose lease has run out, whoever held it, and says which.
pub async fn reap_one(conn: &mut PgConnection, artifacts: &Artifacts) -> Result<Option<(Lease, JobState)>, LeaseError> {
    let mut tx = conn.begin().await?;
    let Some(expired) = sqlx::query!(
        "SELECT job_id, n, lease_token FROM job_attempts WHERE ended_at IS NULL AND expires_at < now()
         ORDER BY expires_at FOR UPDATE SKIP LOCKED LIMIT 1"
    )
    .fetch_optional(&mut *tx)
    .await?
    else {
        return Ok(None);
    };
    let lease = Lease { job_id: expired.job_id, attempt: expired.n, token: expired.lease_token };
    let state = end(&mut tx, artifacts, &lease, Ending::Lost).await?;
    tx.commit().await?;
    Ok(Some((lease, state)))
}

/// The transaction's body: the caller has locked the attempt.
async fn end(tx: &mut PgConnection, artifacts: &Artifacts, lease: &Lease, ending: Ending) -> Result<JobState, LeaseError> {
    let job = sqlx::query!(
        r#"SELECT state AS "state: JobState", kind AS "kind: Kind", failures, max_attempts FROM jobs WHERE id = $1 FOR UPDATE"#,
        lease.job_id
    )
    .fetch_one(&mut *tx)
    .await?;
    let losses = match ending {
        Ending::Lost => losses_running(tx, lease).await?,
        _ => 0,
    };
    let (state, kind, failures, max_attempts) = (job.state, job.kind, job.failures, job.max_attempts);
    let settled = settle_state(Standing { state, kind, failures, max_attempts, losses }, &ending);
    debug_assert!(job.state.can_become(settled.state), "{} → {}", job.state, settled.state);
    if let (Ending::Succeeded(product), JobState::Succeeded) = (&ending, settled.state) {
        publish::register(tx, artifacts, lease, product).await?;
    }
    let failures = job.failures + i32::from(settled.counts);
    let wait = if settled.counts { back_off(failures) } else { 0.0 };
    move_on(tx, lease, job.state, &settled, &Move { failures, wait, ending: &ending }).await?;
    follow(tx, lease, &settled).await?;
    Ok(settled.state)
}

/// What else an end writes.
struct Move<'a> {
    failures: i32,
    /// Seconds until the next attempt may begin.
    wait: f64,
    ending: &'a Ending,
}

/// Ends attempt and rank, moves the job to its new state and says so, in one statement. Runners are told
/// of every state but success, which is nothing to them.
async fn move_on(
    tx: &mut PgConnection,
    lease: &Lease,
    from: JobState,
    settled: &Settlement,
    more: &Move<'_>,
) -> Result<(), LeaseError> {
    let error = settled.failure.as_ref().filter(|_| settled.state == JobState::Failed).map(settle::error_of);
    let mut data = json!({ "attempt": lease.attempt, "outcome": settled.outcome });
    if let Some(failure) = &settled.failure {
        data["code"] = json!(failure.code);
    }
    let (level, code, message) = describe(settled, more.ending, more.wait);
    let moved = sqlx::query!(
        "WITH attempts AS (
             UPDATE job_attempts SET ended_at = now(), outcome = $7 WHERE lease_token = $8 AND ended_at IS NULL
         ), ranks AS (
             UPDATE attempt_ranks SET state = 'ended' WHERE job_id = $1 AND attempt = $9
         ), moved AS (
             UPDATE jobs SET state = $3, failures = $4, error = $5, phase = NULL, next_event = next_event + 1,
                 finished_at = CASE WHEN $3 IN ('cancelled', 'succeeded', 'failed') THEN now() END,
                 queued_at = CASE WHEN $3 = 'queued' THEN now() ELSE queued_at END,
                 run_after = CASE WHEN $3 = 'queued' THEN now() + make_interval(secs => $6) ELSE run_after END
             WHERE id = $1 AND state = $2 RETURNING id, next_event - 1 AS event
         ), events AS (
             INSERT INTO job_events (job_id, id, level, code, message, data) SELECT id, event, $10, $11, $12, $13 FROM moved
         )
         SELECT pg_notify($14, id) AS told, CASE WHEN $3 <> 'succeeded' THEN pg_notify($15, id) END AS woken
         FROM moved",
        lease.job_id,
        from.as_str(),
        settled.state.as_str(),
        more.failures,
        error,
        more.wait,
        settled.outcome.as_str(),
        lease.token,
        lease.attempt,
        events::level_name(level),
        code,
        message,
        data,
        events::CHANNEL,
        settle::CHANNEL,
    )
    .fetch_optional(tx)
    .await?;
    moved.map(drop).ok_or(LeaseError::Lost)
}

/// What an end of an attempt means to others: resources and dependants.
async fn follow(tx: &mut PgConnection, lease: &Lease, settled: &Settlement) -> Result<(), sqlx::Error> {
    match settled.state {
        JobState::Succeeded => settle::release_dependants(tx, &lease.job_id).await?,
        JobState::Failed => {
            if let Some(failure) = &settled.failure {
                settle::fail_resources(tx, &lease.job_id, failure).await?;
            }
            settle::fail_dependants(tx, &lease.job_id).await?;
        }
        JobState::Cancelled => {
            settle::fail_resources(tx, &lease.job_id, &settle::cancelled()).await?;
            settle::fail_dependants(tx, &lease.job_id).await?;
        }
        _ => {}
    }
    Ok(())
}

fn describe(settled: &Settlement, ending: &Ending, wait: f64) -> (Level, &'static str, String) {
    let reason = settled.failure.as_ref().map_or("", |failure| failure.message.as_str());
    match (settled.state, settled.outcome) {
        (JobState::Succeeded, _) => (Level::Info, "job.succeeded", "The job has succeeded.".into()),
        (JobState::Failed, _) => (Level::Error, "job.failed", reason.into()),
        (JobState::Cancelled, _) => (Level::Info, "job.cancelled", "The job was cancelled.".into()),
        (JobState::Paused, _) if settled.failure.is_none() => (Level::Info, "job.paused", "The job is paused.".into()),
        (JobState::Paused, _) => (Level::Warn, "job.paused", format!("The job is paused: {reason}")),
        (_, Outcome::Failed) => {
            (Level::Warn, "job.retrying", format!("The attempt failed and is repeated in {wait} seconds: {reason}"))
        }
        (_, Outcome::Lost) => {
            (Level::Warn, "job.lost", "The runner was lost; the job goes on from its newest checkpoint.".into())
        }
        _ if matches!(ending, Ending::DiskLow) => {
            let message = "The disk is nearly full; the job goes on from its newest checkpoint once some of it is free.";
            (Level::Warn, "job.waiting_for_disk", message.into())
        }
        _ => (Level::Info, "job.interrupted", "The runner is stopping; the job goes on from its newest checkpoint.".into()),
    }
}

/// Attempts lost one after another, up to the one before this.
async fn losses_running(tx: &mut PgConnection, lease: &Lease) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"SELECT count(*) AS "losses!" FROM job_attempts
           WHERE job_id = $1 AND outcome = 'lost'
             AND n > coalesce((SELECT max(n) FROM job_attempts WHERE job_id = $1 AND outcome <> 'lost'), 0)"#,
        lease.job_id
    )
    .fetch_one(tx)
    .await
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn failed(code: FailureCode, retryable: bool) -> Ending {
        Ending::Failed(Failure { code, message: "killed by signal 9".into(), param: None, retryable })
    }

    fn crash(retryable: bool) -> Ending {
        failed(FailureCode::WorkerCrashed, retryable)
    }

    fn standing(state: JobState, failures: i32, losses: i64) -> Standing {
        Standing { state, kind: Kind::Train, failures, max_attempts: 3, losses }
    }

    fn endings() -> Vec<Ending> {
        let product = Product::Statistics { statistics: Value::Null };
        let stops = [Ending::Succeeded(product), Ending::Stopped, Ending::Interrupted, Ending::DiskLow, Ending::Lost];
        stops.into_iter().chain([crash(true), crash(false), failed(FailureCode::DiskFull, true)]).collect()
    }

    #[test]
    fn every_ending_of_every_leased_state_is_a_legal_transition() {
        for from in JobState::ALL.iter().filter(|state| state.is_leased()) {
            for (ending, kind) in endings().iter().flat_map(|ending| Kind::ALL.iter().map(move |kind| (ending, *kind))) {
                for (failures, losses) in [(0, 0), (2, 0), (0, 9), (2, 9)] {
                    let settled = settle_state(Standing { kind, ..standing(*from, failures, losses) }, ending);
                    assert!(from.can_become(settled.state), "{from} → {} by {ending:?}", settled.state);
                    assert!(settled.state != JobState::Failed || settled.failure.is_some());
                }
            }
        }
    }

    #[test]
    fn failures_count_and_interruptions_do_not() {
        let retried = settle_state(standing(JobState::Running, 1, 0), &crash(true));
        assert_eq!((retried.state, retried.counts), (JobState::Queued, true));
        let exhausted = settle_state(standing(JobState::Running, 2, 0), &crash(true));
        let failure = exhausted.failure.expect("it failed");
        assert_eq!((exhausted.state, failure.code), (JobState::Failed, FailureCode::AttemptsExhausted));
        assert!(failure.message.contains("killed by signal 9"));
        for ending in [Ending::Interrupted, Ending::DiskLow, Ending::Lost] {
            let settled = settle_state(standing(JobState::Running, 2, 3), &ending);
            assert_eq!((settled.state, settled.counts), (JobState::Queued, false));
        }
        assert!(settle_state(standing(JobState::Running, 0, 4), &Ending::Lost).counts);
        assert_eq!(settle_state(standing(JobState::Running, 0, 0), &crash(false)).state, JobState::Failed);
    }

    #[test]
    fn a_full_disk_pauses_a_training_and_fails_what_has_nothing_to_keep() {
        let full = failed(FailureCode::DiskFull, true);
        let paused = settle_state(standing(JobState::Running, 2, 0), &full);
        assert_eq!((paused.state, paused.counts), (JobState::Paused, false));
        let (level, code, message) = describe(&paused, &full, 0.0);
        assert_eq!((level, code), (Level::Warn, "job.paused"));
        assert!(message.contains("killed by signal 9"), "{message}");
        let ingestion = settle_state(Standing { kind: Kind::Ingest, ..standing(JobState::Running, 0, 0) }, &full);
        assert_eq!(
            (ingestion.state, ingestion.failure.map(|failure| failure.code)),
            (JobState::Failed, Some(FailureCode::DiskFull))
        );
    }

    #[test]
    fn back_off_grows_to_five_minutes() {
        assert_eq!([1, 2, 3, 4, 5, 6, 99].map(back_off), [1.0, 4.0, 16.0, 64.0, 256.0, 300.0, 300.0]);
    }
}
