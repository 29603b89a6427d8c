//! An attempt's conversation with its worker: reports are heard, commands told, silence is measured.
//!
//! Nothing here waits for the database. A worker that hangs, in a deadlock or a step without an end, would
//! keep its lease for ever by its runner's heartbeats; so it must show progress, or at least that it works.

use std::{io, path::Path, process::ExitStatus, time::Duration};

use lathe_model::{
    failure,
    protocol::{Command, Exit, Failure, FailureCode, Level, Report, Task, TaskResult},
};
use serde_json::json;
use tokio::{sync::watch, time::Instant};

use super::{
    attempt::{Attempt, Control},
    gang::Members,
    outbox::Write,
    spans::WorkerSpans,
};
use crate::{
    checkpoints,
    child::{Child, crash_message},
    ending::Ending,
    events,
    metrics::Event,
    run::{self, Prepared},
};

/// How long a worker may take to stop once it is told to, before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(8);
/// The same where a client pauses: nothing else waits.
const PAUSE_GRACE: Duration = Duration::from_secs(60);
/// How long a worker may live on after its last report.
const EXIT_GRACE: Duration = Duration::from_secs(10);

/// A worker that computes without showing progress may do so this many times as long as one that does
/// nothing at all: one micro-batch of a large model can take hours on a few cores.
const BUSY_PATIENCE: u32 = 24;

/// When a worker was last heard of.
struct Pulse {
    stall: Duration,
    heard: Instant,
    progressed: Instant,
}

impl Pulse {
    fn new(stall: Duration) -> Pulse {
        let now = Instant::now();
        Pulse { stall, heard: now, progressed: now }
    }

    fn heard(&mut self, progress: bool) {
        self.heard = Instant::now();
        if progress {
            self.progressed = self.heard;
        }
    }

    fn deadline(&self) -> Instant {
        (self.heard + self.stall).min(self.progressed + self.stall * BUSY_PATIENCE)
    }

    fn diagnosis(&self) -> String {
        match self.heard.elapsed() >= self.stall {
            true => format!("showed no sign of life for {} seconds", self.stall.as_secs()),
            false => format!("computed for {} seconds without showing progress", (self.stall * BUSY_PATIENCE).as_secs()),
        }
    }
}

/// Hears a worker until it ends.
pub async fn converse(
    attempt: &Attempt,
    mut child: Child,
    mut members: Members,
    prepared: &Prepared,
    control: &mut watch::Receiver<Control>,
    log: &Path,
) -> Option<Ending> {
    match serde_json::to_string(&prepared.worker) {
        Ok(spec) => child.tell(&spec).await,
        Err(error) => {
            return Some(Ending::Failed(failure::new(FailureCode::Internal, format!("The task cannot be written: {error}"))));
        }
    }
    let deadline = prepared.wall.map(|wall| Instant::now() + wall);
    let pulse = Pulse::new(attempt.context.config.stall);
    let mut talk = Talk {
        told: None,
        deadline,
        overdue: false,
        stalled: None,
        lost: None,
        disk_low: false,
        last: None,
        pulse,
        spans: WorkerSpans::begin(),
    };
    // Others would begin anew, so they are left to end.
    let saves = matches!(prepared.worker.task, Task::Train(_));
    let mut line = Vec::new();
    // What was asked while the task was prepared is heard as well.
    control.mark_changed();
    loop {
        let told = talk.told;
        tokio::select! {
            biased;
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
            // What was said is heard before its absence is looked at: this process may have stood still.
            more = child.report(&mut line) => match more {
                Ok(true) => talk.hear(attempt, std::mem::take(&mut line)),
                Ok(false) => break,
                Err(error) => {
                    tracing::error!(job.id = attempt.lease.job_id, %error, "a worker's reports cannot be read");
                    child.kill();
                    break;
                }
            },
            () = tokio::time::sleep_until(talk.pulse.deadline()), if talk.stalled.is_none() => {
                talk.stall(attempt);
                child.kill();
            }
            lost = members.lost(), if talk.lost.is_none() => {
                tracing::error!(job.id = attempt.lease.job_id, job.attempt = attempt.lease.attempt, "{lost}");
                talk.lost = Some(lost);
                child.kill();
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
    talk.spans.end(&attempt.trace);
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
    /// It was killed for showing no progress; what is said of that.
    stalled: Option<String>,
    /// Another rank ended before its time; what is said of that.
    lost: Option<String>,
    /// It was told to stop because the disk is nearly full.
    disk_low: bool,
    pulse: Pulse,
    last: Option<Result<TaskResult, Failure>>,
    spans: WorkerSpans,
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
        self.pulse.heard(!matches!(report, Report::Alive { progress: false }));
        self.spans.hear(&attempt.trace, &report);
        match report {
            Report::Alive { .. } => {}
            Report::Started { numerics, numerics_changed } => {
                outbox.push(Write::Started(numerics));
                if numerics_changed {
                    let message =
                        "This device or library differs from the first attempt's: bits may differ from an uninterrupted run.";
                    outbox
                        .gather(true, |batch| batch.events.push(Event::new(Level::Warn, "numerics_changed", message, json!({}))));
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
                outbox.gather(true, |batch| batch.events.push(Event::new(level, &code, &message, data)));
            }
            Report::Checkpoint { step, folder, loss, validation_loss, best, .. } => {
                let step = i64::try_from(step).unwrap_or(i64::MAX);
                outbox.push(Write::Checkpoint(checkpoints::Staged { step, folder, loss, validation_loss, best }));
            }
            Report::Done { result } => self.last = Some(Ok(result)),
            Report::Failed { failure } => self.last = Some(Err(Failure { message: events::clean(&failure.message), ..failure })),
        }
    }

    fn stall(&mut self, attempt: &Attempt) {
        let message = format!("The worker {}, and was killed.", self.pulse.diagnosis());
        let step = attempt.step();
        tracing::error!(job.id = attempt.lease.job_id, job.attempt = attempt.lease.attempt, step, "{message}");
        attempt.outbox.gather(true, |batch| {
            batch.events.push(Event::new(Level::Error, "worker.stalled", &message, json!({ "step": step })))
        });
        self.stalled = Some(message);
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
            let message = "The worker took longer than a job of this kind may take, and was killed.";
            return Ending::Failed(failure::new(FailureCode::WorkerCrashed, message));
        }
        if let Some(message) = self.stalled {
            let advice = "If the job is merely slow, start the runner with more `--stall-seconds`.";
            return Ending::Failed(failure::retryable(FailureCode::WorkerStalled, format!("{message} {advice}")));
        }
        if let Some(message) = self.lost {
            return Ending::Failed(failure::retryable(FailureCode::WorkerCrashed, message));
        }
        if code == Some(Exit::BadSpec as i32) {
            let message = "The worker does not read this task; the runner and the worker are of different versions.";
            return Ending::Failed(failure::new(FailureCode::Internal, message));
        }
        Ending::Failed(failure::retryable(FailureCode::WorkerCrashed, crash_message("worker", status, log)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_computes_is_given_more_time_than_one_that_does_nothing() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let mut pulse = Pulse { stall: 10 * second, heard: now, progressed: now };
        assert_eq!(pulse.deadline(), now + 10 * second);
        pulse.heard = now + 100 * second;
        assert_eq!(pulse.deadline(), now + 110 * second);
        pulse.heard = now + 239 * second;
        assert_eq!(pulse.deadline(), now + 240 * second);
        pulse.progressed = now + 239 * second;
        assert_eq!(pulse.deadline(), now + 249 * second);
    }
}
