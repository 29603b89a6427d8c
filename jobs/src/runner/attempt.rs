//! One attempt from the claim to its end: a worker is started, heard, told, and its ending settled.
//!
//! Three tasks share it. One renews the lease and learns where the job stands; one writes what waits
//! in the [`Outbox`]; this one talks with the worker and never waits for the database. Whichever
//! finds the lease lost says so, and the worker is killed.

use std::{
    fs, io,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::ExitStatus,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use lathe_model::protocol::{Command, Exit, Failure, FailureCode, Level, Report, Task, TaskResult};
use serde_json::json;
use tokio::{sync::watch, time::Instant};

use super::{
    Context,
    child::{Child, Start},
    devices::Device,
    outbox::{Outbox, Write},
};
use crate::{
    artifacts, checkpoints,
    lease::{self, Claimed, Ending, Lease, LeaseError},
    metrics::{self, Event},
    run::{self, Prepared},
    state::JobState,
};

/// How long a worker may take to stop once it is told to, before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(8);
/// The same where a client pauses: nothing else waits.
const PAUSE_GRACE: Duration = Duration::from_secs(60);
/// How long a worker may live on after its last report.
const EXIT_GRACE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(1);

/// What is asked of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Control {
    Run,
    Pause,
    Cancel,
    LeaseLost,
}

/// What the tasks of one attempt share.
struct Attempt {
    context: Arc<Context>,
    lease: Lease,
    outbox: Outbox,
    control: watch::Sender<Control>,
    step: AtomicI64,
}

/// Does what was claimed. Returns when the attempt has ended, here or for others.
pub async fn run(context: Arc<Context>, claimed: Claimed, device: Device) {
    let lease = claimed.lease.clone();
    let staging = context.artifacts.staging(&lease.job_id, lease.attempt);
    tracing::info!(job.id = lease.job_id, job.attempt = lease.attempt, job.kind = %claimed.kind, "claimed a job");
    let attempt = Arc::new(Attempt {
        outbox: Outbox::new(&staging),
        control: watch::Sender::new(Control::Run),
        step: AtomicI64::new(0),
        context,
        lease,
    });
    let beating = tokio::spawn(beat(attempt.clone()));
    let writing = tokio::spawn(write_all(attempt.clone()));
    let ending = work(&attempt, &claimed, &device, &staging).await;
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
    beating.abort();
    let _ = tokio::task::spawn_blocking(move || fs::remove_dir_all(staging)).await;
}

/// Writes out what waits, then ends the attempt, as long as it takes; gives up only when the runner
/// itself has to go, and then the lease runs out.
async fn settle(attempt: &Attempt, mut writing: tokio::task::JoinHandle<()>, claimed: &Claimed, ending: Ending, staging: &Path) {
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
    if let Ending::Succeeded(product) = &ending
        && let Some(folder) = product.folder().map(Path::to_owned)
    {
        // Written through to disk before the attempt is held, which is then only for a rename.
        let _ = tokio::task::spawn_blocking(move || artifacts::sync_tree(&folder)).await;
    }
    let (lease, context) = (&attempt.lease, &attempt.context);
    loop {
        let finished = match context.db.acquire().await {
            Ok(mut conn) => lease::finish(&mut conn, &context.artifacts, lease, ending.clone()).await,
            Err(error) => Err(error.into()),
        };
        match finished {
            Ok(state) => {
                return tracing::info!(job.id = lease.job_id, job.attempt = lease.attempt, job.state = %state, "ended an attempt");
            }
            Err(LeaseError::Lost) => {
                return tracing::warn!(job.id = lease.job_id, job.attempt = lease.attempt, "the attempt had ended already");
            }
            Err(LeaseError::Artifact(error)) => {
                tracing::error!(job.id = lease.job_id, %error, "the result could not be published");
                ending = Ending::Failed(publishing_failed(&error));
            }
            Err(LeaseError::Database(error)) if is_permanent(&error) => {
                tracing::error!(job.id = lease.job_id, %error, "the end of an attempt was refused");
                ending = Ending::Failed(failure(
                    FailureCode::Internal,
                    "The result could not be recorded; the log of the runner says why.",
                    true,
                ));
                tokio::time::sleep(RETRY).await;
            }
            Err(LeaseError::Database(error)) => {
                tracing::warn!(job.id = lease.job_id, %error, "the end of an attempt waits for the database");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

fn publishing_failed(error: &artifacts::ArtifactError) -> Failure {
    match error.is_disk_full() {
        true => failure(
            FailureCode::DiskFull,
            "The disk has no room for the result. Free some space, then resume or repeat the job.",
            true,
        ),
        false => failure(FailureCode::Internal, "The result could not be published; the log of the runner says why.", true),
    }
}

pub fn failure(code: FailureCode, message: impl Into<String>, retryable: bool) -> Failure {
    Failure { code, message: message.into(), param: None, retryable }
}

/// Renews the lease three times in its length, at once when the job is spoken of, and every second
/// while the database is away.
async fn beat(attempt: Arc<Attempt>) {
    let seconds = attempt.context.config.lease_seconds;
    let (period, mut spoken) = (Duration::from_secs_f64(seconds / 3.0), attempt.context.spoken_of.subscribe());
    loop {
        let step = attempt.step.load(Ordering::Relaxed);
        let renewed = match attempt.context.db.acquire().await {
            Ok(mut conn) => {
                let beat = lease::heartbeat(&mut conn, &attempt.lease, seconds, step);
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
async fn write_all(attempt: Arc<Attempt>) {
    while let Some(write) = attempt.outbox.next().await {
        match write_one(&attempt, &write).await {
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
            let id = checkpoints::register(&mut conn, artifacts, lease, staged).await?;
            let data =
                json!({ "checkpoint": id, "step": staged.step, "validation_loss": staged.validation_loss, "best": staged.best });
            attempt.outbox.gather(true, |batch| {
                batch.events.push(event(Level::Info, "checkpoint.saved", &format!("Saved step {}.", staged.step), data))
            });
            checkpoints::prune(&mut conn, artifacts, lease, attempt.context.keep(lease)).await
        }
    }
}

/// An error that the same statement would meet again.
fn is_permanent(error: &sqlx::Error) -> bool {
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

/// Prepares the task and sees its worker through; `None`: the lease is lost.
async fn work(attempt: &Attempt, claimed: &Claimed, device: &Device, staging: &Path) -> Option<Ending> {
    let mut control = attempt.control.subscribe();
    let prepared = tokio::select! {
        prepared = prepare(attempt, claimed, device, staging) => prepared,
        () = lost(&mut control) => return None,
        () = attempt.context.must_go() => return Some(Ending::Interrupted),
    };
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => return Some(Ending::Failed(failure)),
    };
    attempt.context.remember_keep(&attempt.lease, prepared.keep_checkpoints);
    if let Some(step) = prepared.resumed_step {
        let message = format!("Goes on from the checkpoint of step {step}.");
        attempt.step.store(step, Ordering::Relaxed);
        attempt
            .outbox
            .gather(true, |batch| batch.events.push(event(Level::Info, "checkpoint.resumed", &message, json!({ "step": step }))));
    }
    for step in &prepared.unreadable {
        let message = format!("The checkpoint of step {step} is damaged; an earlier one is used.");
        attempt.outbox.gather(true, |batch| {
            batch.events.push(event(Level::Warn, "checkpoint.unreadable", &message, json!({ "step": step })))
        });
    }
    let log = attempt.context.artifacts.log(&attempt.lease.job_id, attempt.lease.attempt);
    let start = Start {
        program: attempt.context.config.program.clone(),
        arguments: vec!["worker".into()],
        environment: environment(prepared.worker.threads),
        log: log.clone(),
        bounds: prepared.bounds,
    };
    match Child::start(start).await {
        Ok(child) => converse(attempt, child, &prepared, &mut control, &log).await,
        Err(error) => {
            tracing::error!(job.id = attempt.lease.job_id, %error, "a worker could not be started");
            Some(Ending::Failed(failure(
                FailureCode::WorkerCrashed,
                "The worker could not be started; the log of the runner says why.",
                true,
            )))
        }
    }
}

/// Resolves when the lease is lost.
async fn lost(control: &mut watch::Receiver<Control>) {
    let _ = control.wait_for(|asked| *asked == Control::LeaseLost).await;
}

/// Asks until the database answers.
async fn prepare(attempt: &Attempt, claimed: &Claimed, device: &Device, staging: &Path) -> Result<Prepared, Failure> {
    loop {
        match run::prepare(&attempt.context, claimed, device, staging).await {
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
fn environment(threads: usize) -> Vec<(&'static str, String)> {
    vec![
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8".into()),
        ("MKL_CBWR", "AUTO".into()),
        ("OMP_NUM_THREADS", threads.to_string()),
        ("GOMP_SPINCOUNT", "1000".into()),
        ("MKL_NUM_THREADS", threads.to_string()),
        ("RAYON_NUM_THREADS", threads.to_string()),
        ("TOKENIZERS_PARALLELISM", "true".into()),
    ]
}

/// Hears a worker until it ends.
async fn converse(
    attempt: &Attempt,
    mut child: Child,
    prepared: &Prepared,
    control: &mut watch::Receiver<Control>,
    log: &Path,
) -> Option<Ending> {
    match serde_json::to_string(&prepared.worker) {
        Ok(spec) => child.tell(&spec).await,
        Err(error) => {
            return Some(Ending::Failed(failure(FailureCode::Internal, format!("The task cannot be written: {error}"), false)));
        }
    }
    let deadline = prepared.wall.map(|wall| Instant::now() + wall);
    let mut talk = Talk { told: None, deadline, overdue: false, disk_low: false, last: None };
    // Others would begin anew, so they are left to end.
    let saves = matches!(prepared.worker.task, Task::Train(_));
    let mut line = Vec::new();
    // What was asked while the task was prepared is heard as well.
    control.mark_changed();
    loop {
        let told = talk.told;
        tokio::select! {
            more = child.report(&mut line) => match more {
                Ok(true) => talk.hear(attempt, std::mem::take(&mut line)),
                Ok(false) => break,
                Err(error) => {
                    tracing::error!(job.id = attempt.lease.job_id, %error, "a worker's reports cannot be read");
                    child.kill();
                    break;
                }
            },
            _ = control.changed() => {
                let asked = *control.borrow_and_update();
                match asked {
                    Control::LeaseLost => {
                        child.kill();
                        let _ = child.wait().await;
                        return None;
                    }
                    Control::Run => {}
                    Control::Pause => talk.tell(&mut child, Command::Pause, PAUSE_GRACE).await,
                    Control::Cancel => talk.tell(&mut child, Command::Cancel, STOP_GRACE).await,
                }
            }
            () = attempt.context.must_stop(), if told.is_none() => talk.tell(&mut child, Command::Pause, STOP_GRACE).await,
            () = attempt.context.disk_is_low(), if told.is_none() && saves => {
                talk.disk_low = true;
                talk.tell(&mut child, Command::Pause, PAUSE_GRACE).await;
            }
            () = until(talk.deadline) => {
                talk.overdue = true;
                talk.deadline = None;
                child.kill();
            }
        }
    }
    let status = match tokio::time::timeout(EXIT_GRACE, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.kill();
            child.wait().await
        }
    };
    Some(talk.ending(attempt, status, log))
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Where the conversation with a worker stands.
struct Talk {
    told: Option<Command>,
    deadline: Option<Instant>,
    /// It was killed for taking too long.
    overdue: bool,
    /// It was told to stop because the disk is nearly full.
    disk_low: bool,
    last: Option<Result<TaskResult, Failure>>,
}

impl Talk {
    async fn tell(&mut self, child: &mut Child, command: Command, grace: Duration) {
        if self.told == Some(command) || self.told == Some(Command::Cancel) {
            return;
        }
        self.told = Some(command);
        let deadline = Instant::now() + grace;
        self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
        if let Ok(line) = serde_json::to_string(&command) {
            child.tell(&line).await;
        }
    }

    fn hear(&mut self, attempt: &Attempt, line: Vec<u8>) {
        let report = match serde_json::from_slice::<Report>(&line) {
            Ok(report) => report,
            Err(error) => {
                let excerpt: String = String::from_utf8_lossy(&line).chars().take(200).collect();
                return tracing::warn!(job.id = attempt.lease.job_id, %error, excerpt, "a report of a worker is not understood");
            }
        };
        let outbox = &attempt.outbox;
        match report {
            Report::Started { numerics, numerics_changed } => {
                outbox.push(Write::Started(numerics));
                if numerics_changed {
                    let message =
                        "This device or library differs from the first attempt's: bits may differ from an uninterrupted run.";
                    outbox.gather(true, |batch| batch.events.push(event(Level::Warn, "numerics_changed", message, json!({}))));
                }
            }
            Report::Phase { phase } => outbox.gather(true, |batch| batch.phase = Some(phase)),
            Report::Resolved { spec, .. } => outbox.push(Write::Resolved(spec)),
            Report::Metric { row } => {
                let first = attempt.advance(row.step);
                outbox.gather(first, |batch| batch.metric(row));
            }
            Report::Progress { step, seconds_per_step } => {
                let first = attempt.advance(step);
                outbox.gather(first, |batch| {
                    batch.step = Some(step);
                    batch.seconds_per_step = seconds_per_step.or(batch.seconds_per_step);
                });
            }
            Report::Event { level, code, message, data } => {
                outbox.gather(true, |batch| batch.events.push(event(level, &code, &message, data)));
            }
            Report::Checkpoint { step, folder, loss, validation_loss, best } => {
                let step = i64::try_from(step).unwrap_or(i64::MAX);
                outbox.push(Write::Checkpoint(checkpoints::Staged { step, folder, loss, validation_loss, best }));
            }
            Report::Done { result } => self.last = Some(Ok(result)),
            Report::Failed { failure } => self.last = Some(Err(Failure { message: clean(&failure.message), ..failure })),
        }
    }

    fn ending(self, attempt: &Attempt, status: io::Result<ExitStatus>, log: &Path) -> Ending {
        let code = status.as_ref().ok().and_then(ExitStatus::code);
        match self.last {
            Some(Ok(result)) if code == Some(Exit::Done as i32) => {
                match run::product(&attempt.lease, result, &attempt.context.artifacts) {
                    Ok(product) => return Ending::Succeeded(product),
                    Err(failure) => return Ending::Failed(failure),
                }
            }
            // A worker that was told to stop may well fail for that.
            Some(Err(failure)) if self.told.is_none() || !failure.retryable => return Ending::Failed(failure),
            _ => {}
        }
        if self.told.is_some() && (self.overdue || self.last.is_some() || code == Some(Exit::Stopped as i32)) {
            return match (attempt.context.is_stopping(), self.disk_low) {
                (true, _) => Ending::Interrupted,
                (false, true) => Ending::DiskLow,
                (false, false) => Ending::Stopped,
            };
        }
        // Something else than this runner asked it to stop, and it has saved what it did.
        if code == Some(Exit::Stopped as i32) {
            return Ending::Interrupted;
        }
        if self.overdue {
            return Ending::Failed(failure(
                FailureCode::WorkerCrashed,
                "The worker took longer than a job of this kind may take, and was killed.",
                false,
            ));
        }
        if code == Some(Exit::BadSpec as i32) {
            return Ending::Failed(failure(
                FailureCode::Internal,
                "The worker does not read this task; the runner and the worker are of different versions.",
                false,
            ));
        }
        Ending::Failed(failure(FailureCode::WorkerCrashed, crash_message("worker", status, log), true))
    }
}

impl Attempt {
    /// Notes the newest step; whether it is the attempt's first.
    fn advance(&self, step: u64) -> bool {
        self.step.swap(i64::try_from(step).unwrap_or(i64::MAX), Ordering::Relaxed) == 0
    }
}

fn event(level: Level, code: &str, message: &str, data: serde_json::Value) -> Event {
    // Neither text nor jsonb of the database takes a NUL.
    let data = match data.to_string() {
        text if text.contains("\\u0000") => serde_json::from_str(&text.replace("\\u0000", "\\ufffd")).unwrap_or_default(),
        _ => data,
    };
    Event { level, code: clean(code), message: clean(message), data }
}

fn clean(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// How a child came to its end, in a sentence, with the last line of its log.
pub fn crash_message(what: &str, status: io::Result<ExitStatus>, log: &Path) -> String {
    let how = match status {
        Ok(status) => match (status.code(), status.signal()) {
            (_, Some(libc::SIGKILL)) => "was killed by signal 9, which is what happens when memory runs out".to_owned(),
            (_, Some(libc::SIGXCPU)) => "used more processor time than a job of this kind may".to_owned(),
            (_, Some(signal)) => format!("was ended by signal {signal}"),
            (Some(code), None) => format!("ended with status {code} and no result"),
            (None, None) => "ended".to_owned(),
        },
        Err(error) => format!("cannot be waited for ({error})"),
    };
    match last_line(log) {
        Some(line) => format!("The {what} {how}. Its log ends with: {line}"),
        None => format!("The {what} {how}."),
    }
}

/// The end of a log, short enough for a message.
fn last_line(log: &Path) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(4096))).ok()?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail);
    let line = tail.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(clean(&line.chars().take(300).collect::<String>()))
}
