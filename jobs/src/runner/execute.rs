//! One attempt from the claim to its end: a worker is started, and its ending settled.
//!
//! Three tasks share it. One renews the lease and learns where the job stands, one writes what waits
//! in the [`Outbox`] ([`lease_keeper`]); this one talks with the worker ([`conversation`]) and never
//! waits for the database. Whichever finds the lease lost says so, and the worker is killed.

use std::{
    borrow::Cow,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::SystemTime,
};

use lathe_model::{
    failure,
    protocol::{Failure, FailureCode, Level, WorkerSpec},
};
use serde_json::json;
use sqlx::PgConnection;
use tokio::{sync::watch, task::JoinHandle};

use super::{
    attempt::{Attempt, Control},
    conversation::converse,
    gang::Members,
    lease_keeper::{self, RETRY, is_permanent},
    outbox::Outbox,
    spans::AttemptTrace,
};
use crate::{
    artifacts::{ArtifactError, Artifacts},
    child::{Child, Start},
    context::Context,
    devices::Device,
    ending::{self, Ending},
    lease::{Claimed, Lease, LeaseError},
    metrics::Event,
    publish,
    run::{self, Prepared},
    state::JobState,
    waiting::{self, answered},
};

/// Does what was claimed. Returns when the attempt has ended, here or for others.
/// `devices`: one for each rank.
pub async fn run(context: Arc<Context>, claimed: Claimed, devices: Vec<Device>) {
    let lease = claimed.lease.clone();
    let staging = context.artifacts.staging(&lease.job_id, lease.attempt);
    tracing::info!(job.id = lease.job_id, job.attempt = lease.attempt, job.kind = %claimed.kind, "claimed a job");
    let attempt = Arc::new(Attempt {
        outbox: Outbox::new(&staging),
        trace: AttemptTrace::begin(&claimed),
        control: watch::Sender::new(Control::Run),
        steps: devices.iter().map(|_| AtomicI64::new(0)).collect(),
        keep_checkpoints: AtomicI64::new(i64::MAX),
        context,
        lease,
    });
    let beating = tokio::spawn(lease_keeper::renew(attempt.clone()));
    let writing = tokio::spawn(lease_keeper::write_all(attempt.clone()));
    let ending = work(&attempt, &claimed, &devices, &staging).await;
    attempt.outbox.close();
    match ending {
        Some(ending) => {
            settle(&attempt, writing, &claimed, ending, &staging).await;
        }
        None => {
            tracing::warn!(
                job.id = attempt.lease.job_id,
                job.attempt = attempt.lease.attempt,
                "the lease was lost; the work is dropped"
            );
            writing.abort();
        }
    }
    attempt.trace.end();
    beating.abort();
    let _ = waiting::blocking(move || fs::remove_dir_all(staging)).await;
}

/// Writes out what waits, then ends the attempt, as long as it takes; gives up only when the runner
/// itself has to go, and then the lease runs out.
async fn settle(attempt: &Attempt, mut writing: JoinHandle<()>, claimed: &Claimed, ending: Ending, staging: &Path) {
    let ended = async {
        if (&mut writing).await.is_err() {
            tracing::error!(job.id = attempt.lease.job_id, "the task that writes reports ended by itself");
        }
        run::note_bad_rows(&attempt.context.db, claimed, staging).await;
        end(attempt, ending).await;
    };
    tokio::select! {
        () = ended => {}
        () = attempt.context.must_go() => {
            writing.abort();
            tracing::error!(job.id = attempt.lease.job_id, "the runner stops before the database took this attempt's end");
        }
    }
}

async fn end(attempt: &Attempt, mut ending: Ending) {
    let (lease, context) = (&attempt.lease, &attempt.context);
    context.artifacts.share_log(&lease.job_id, lease.attempt).await;
    loop {
        let finished = match context.db.acquire().await {
            Ok(mut conn) => answered(finish(&mut conn, &context.artifacts, lease, ending.clone())).await,
            Err(error) => Err(error.into()),
        };
        match finished {
            Ok(state) => {
                attempt.trace.settled(state, &ending);
                return tracing::info!(job.id = lease.job_id, job.attempt = lease.attempt, job.state = %state, "ended an attempt");
            }
            Err(LeaseError::Lost) => {
                return tracing::warn!(job.id = lease.job_id, job.attempt = lease.attempt, "the attempt had ended already");
            }
            Err(LeaseError::Artifact(error)) if error.is_away() => {
                tracing::warn!(job.id = lease.job_id, %error, "the end of an attempt waits for the artifact store");
                tokio::time::sleep(RETRY).await;
            }
            Err(LeaseError::Artifact(error)) => {
                tracing::error!(job.id = lease.job_id, %error, "the result could not be published");
                ending = Ending::Failed(publishing_failed(&error));
            }
            Err(LeaseError::Database(error)) if is_permanent(&error) => {
                tracing::error!(job.id = lease.job_id, %error, "the end of an attempt was refused");
                let message = "The result could not be recorded; the log of the runner says why.";
                ending = Ending::Failed(failure::retryable(FailureCode::Internal, message));
                tokio::time::sleep(RETRY).await;
            }
            Err(LeaseError::Database(error)) => {
                tracing::warn!(job.id = lease.job_id, %error, "the end of an attempt waits for the database");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Persists what a success made before the attempt is held, which is then only for a rename.
async fn finish(conn: &mut PgConnection, artifacts: &Artifacts, lease: &Lease, ending: Ending) -> Result<JobState, LeaseError> {
    if let Ending::Succeeded(product) = &ending
        && let Some((folder, key)) = publish::destination(conn, lease, product).await?
    {
        artifacts.persist(folder, &key).await?;
    }
    ending::finish(conn, artifacts, lease, ending).await
}

fn publishing_failed(error: &ArtifactError) -> Failure {
    match error.is_disk_full() {
        true => failure::retryable(
            FailureCode::DiskFull,
            "The disk has no room for the result. Free some space, then resume or repeat the job.",
        ),
        false => failure::retryable(FailureCode::Internal, "The result could not be published; the log of the runner says why."),
    }
}

/// Prepares the task and sees its worker through; `None`: the lease is lost.
async fn work(attempt: &Arc<Attempt>, claimed: &Claimed, devices: &[Device], staging: &Path) -> Option<Ending> {
    let mut control = attempt.control.subscribe();
    let begun = SystemTime::now();
    let prepared = tokio::select! {
        prepared = prepare(attempt, claimed, &devices[0], staging) => prepared,
        () = lost(&mut control) => return None,
        () = attempt.context.must_go() => return Some(Ending::Interrupted),
    };
    let mut prepared = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => return Some(Ending::Failed(failure)),
    };
    attempt.trace.prepared(begun);
    attempt.keep_checkpoints.store(prepared.keep_checkpoints, Ordering::Relaxed);
    if let Some(step) = prepared.resumed_step {
        let message = format!("Goes on from the checkpoint of step {step}.");
        attempt.steps.iter().for_each(|rank| rank.store(step, Ordering::Relaxed));
        attempt.outbox.gather(true, |batch| {
            batch.events.push(Event::new(Level::Info, "checkpoint.resumed", &message, json!({ "step": step })))
        });
    }
    for step in &prepared.unreadable {
        let message = format!("The checkpoint of step {step} is damaged; an earlier one is used.");
        attempt.outbox.gather(true, |batch| {
            batch.events.push(Event::new(Level::Warn, "checkpoint.unreadable", &message, json!({ "step": step })))
        });
    }
    let log = attempt.context.artifacts.log(&attempt.lease.job_id, attempt.lease.attempt);
    let bounds = prepared.bounds;
    let start = |worker: &WorkerSpec| Start {
        program: attempt.context.config.program.clone(),
        arguments: vec!["worker".into()],
        environment: environment(worker.threads),
        log: log.clone(),
        bounds,
    };
    let members = match Members::start(attempt, &mut prepared.worker, devices, start).await {
        Ok(members) => members,
        Err(error) => return Some(not_started(attempt, &error)),
    };
    match Child::start(start(&prepared.worker)).await {
        Ok(child) => converse(attempt, child, members, &prepared, &mut control, &log).await,
        Err(error) => Some(not_started(attempt, &error.to_string())),
    }
}

fn not_started(attempt: &Attempt, error: &str) -> Ending {
    tracing::error!(job.id = attempt.lease.job_id, error, "a worker could not be started");
    let message = "The worker could not be started; the log of the runner says why.";
    Ending::Failed(failure::retryable(FailureCode::WorkerCrashed, message))
}

/// Resolves when the lease is lost.
async fn lost(control: &mut watch::Receiver<Control>) {
    let _ = control.wait_for(|asked| *asked == Control::LeaseLost).await;
}

/// Asks until the database answers.
async fn prepare(attempt: &Attempt, claimed: &Claimed, device: &Device, staging: &Path) -> Result<Prepared, Failure> {
    loop {
        match answered(run::prepare(&attempt.context, claimed, device, staging)).await {
            Ok(prepared) => return Ok(prepared),
            Err(run::PrepareError::Failure(failure)) => return Err(failure),
            Err(run::PrepareError::Database(error)) => {
                tracing::warn!(job.id = attempt.lease.job_id, %error, "a job waits for the database");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// What bits depend on is set before the child's first tensor. Threads that wait for one another sleep
/// after some microseconds: where other programs need the cores too, waiting on one that is not
/// scheduled would cost a step many times its work.
fn environment(threads: usize) -> Vec<(Cow<'static, str>, String)> {
    let variables = [
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8".into()),
        ("MKL_CBWR", "AUTO".into()),
        ("OMP_NUM_THREADS", threads.to_string()),
        ("GOMP_SPINCOUNT", "1000".into()),
        ("MKL_NUM_THREADS", threads.to_string()),
        ("RAYON_NUM_THREADS", threads.to_string()),
        ("TOKENIZERS_PARALLELISM", "true".into()),
    ];
    variables.map(|(name, value)| (name.into(), value)).into()
}
