//! An attempt's spans, below the request that made its job: what its worker says becomes spans here, since no
//! worker knows of traces.
//!
//! An attempt of a job that waited for hours is still a child of its request's span, not a trace of its own with
//! a link to it: the attempts of a job stand together under the one id that the client may know, and whether
//! they are recorded was decided there. A long attempt does not grow its trace without end. Steps are told an
//! interval at a time, of a second and later of a hundredth of the attempt's time, so that a week has about a
//! thousand; of phases and checkpoints the first [`MOST`] are told.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use lathe_model::protocol::{MetricRow, Report};
use tokio::time::Instant;

use crate::{
    ending::Ending,
    lease::Claimed,
    metrics::phase_name,
    state::JobState,
    trace::{self, KeyValue, Span, SpanKind},
};

/// Phases and checkpoints of one attempt that are told.
const MOST: u32 = 1000;

/// How long steps gather at the least.
const INTERVAL: Duration = Duration::from_secs(1);
/// How much of the attempt's time so far they gather for.
const SHARE: u32 = 100;

/// The attempt's own span, from the claim to its end.
#[derive(Debug)]
pub struct AttemptTrace {
    span: Span,
    begun: Instant,
    told: AtomicU32,
}

impl AttemptTrace {
    pub fn begin(claimed: &Claimed) -> AttemptTrace {
        let parent = trace::read(claimed.traceparent.as_deref());
        let span = Span::begin(SpanKind::Consumer, format!("run {}", claimed.kind), &parent, || {
            vec![
                KeyValue::new("messaging.system", "lathe"),
                KeyValue::new("messaging.operation.type", "process"),
                KeyValue::new("messaging.operation.name", "run"),
                KeyValue::new("messaging.destination.name", claimed.kind.as_str()),
                KeyValue::new("messaging.message.id", claimed.lease.job_id.clone()),
                KeyValue::new("lathe.job.attempt", i64::from(claimed.lease.attempt)),
            ]
        });
        AttemptTrace { span, begun: Instant::now(), told: AtomicU32::new(0) }
    }

    /// The worker's task was made, its inputs and checkpoints found and verified.
    pub fn prepared(&self, since: SystemTime) {
        self.span.passed("prepare task", since, Vec::new);
    }

    /// A checkpoint has gone from the worker's folder to the artifacts.
    pub fn published(&self, step: i64, since: SystemTime) {
        if self.may_tell() {
            self.span.passed("publish checkpoint", since, || vec![KeyValue::new("lathe.step", step)]);
        }
    }

    /// How the attempt ended, and where the job stands after it.
    pub fn settled(&self, state: JobState, ending: &Ending) {
        self.span.set("lathe.job.state", state.as_str());
        if let Ending::Failed(failure) = ending
            && let Ok(serde_json::Value::String(code)) = serde_json::to_value(failure.code)
        {
            self.span.fail(code);
        }
    }

    pub fn end(&self) {
        self.span.end();
    }

    fn may_tell(&self) -> bool {
        self.span.is_recording() && self.told.fetch_add(1, Ordering::Relaxed) < MOST
    }
}

/// Steps that are not told yet.
#[derive(Debug)]
struct Steps {
    begun: Instant,
    since: SystemTime,
    first: u64,
    last: u64,
    count: u32,
    /// Sum over the steps.
    loss: f64,
    tokens: u64,
    tokens_per_second: f64,
}

impl Steps {
    /// None yet, after step `last`.
    fn after(last: u64) -> Steps {
        Steps {
            begun: Instant::now(),
            since: SystemTime::now(),
            first: 0,
            last,
            count: 0,
            loss: 0.0,
            tokens: 0,
            tokens_per_second: 0.0,
        }
    }

    fn add(&mut self, row: &MetricRow) {
        // The newest step is said again with its validation loss.
        if row.step <= self.last {
            return;
        }
        if self.count == 0 {
            self.first = row.step;
        }
        self.last = row.step;
        self.count += 1;
        self.loss += row.loss;
        self.tokens = self.tokens.saturating_add(row.tokens);
        self.tokens_per_second = row.tokens_per_second;
    }

    fn attributes(&self) -> Vec<KeyValue> {
        vec![
            KeyValue::new("lathe.step.first", signed(self.first)),
            KeyValue::new("lathe.step.last", signed(self.last)),
            KeyValue::new("lathe.loss", self.loss / f64::from(self.count.max(1))),
            KeyValue::new("lathe.tokens", signed(self.tokens)),
            KeyValue::new("lathe.tokens_per_second", self.tokens_per_second),
        ]
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// How long steps gather in an attempt of this age.
fn interval(age: Duration) -> Duration {
    INTERVAL.max(age / SHARE)
}

/// What a worker does, from its reports: its phases, and within them steps and checkpoints.
#[derive(Debug)]
pub struct WorkerSpans {
    /// Nothing before the first phase, and when no more are told.
    phase: Span,
    steps: Steps,
}

impl WorkerSpans {
    /// Of a worker that starts now.
    pub fn begin() -> WorkerSpans {
        WorkerSpans { phase: Span::default(), steps: Steps::after(0) }
    }

    pub fn hear(&mut self, attempt: &AttemptTrace, report: &Report) {
        if !attempt.span.is_recording() {
            return;
        }
        match report {
            Report::Phase { phase } => {
                self.end(attempt);
                if attempt.may_tell() {
                    self.phase = Span::begin(SpanKind::Internal, phase_name(*phase), &attempt.span.context(), Vec::new);
                }
                self.steps = Steps::after(self.steps.last);
            }
            Report::Metric { row } => {
                self.steps.add(row);
                if self.steps.begun.elapsed() >= interval(attempt.begun.elapsed()) {
                    self.tell_steps(attempt);
                }
            }
            Report::Checkpoint { step, best, seconds, .. } if attempt.may_tell() => {
                let attributes =
                    || vec![KeyValue::new("lathe.step", signed(*step)), KeyValue::new("lathe.checkpoint.best", *best)];
                let took = Duration::try_from_secs_f64(*seconds).unwrap_or_default();
                let since = SystemTime::now().checked_sub(took).unwrap_or(self.steps.since);
                self.parent(attempt).passed("save checkpoint", since, attributes);
            }
            _ => {}
        }
    }

    /// Nothing more is heard of this phase.
    pub fn end(&mut self, attempt: &AttemptTrace) {
        self.tell_steps(attempt);
        self.phase = Span::default();
    }

    fn tell_steps(&mut self, attempt: &AttemptTrace) {
        if self.steps.count > 0 {
            self.parent(attempt).passed("steps", self.steps.since, || self.steps.attributes());
        }
        self.steps = Steps::after(self.steps.last);
    }

    fn parent<'a>(&'a self, attempt: &'a AttemptTrace) -> &'a Span {
        if self.phase.is_recording() { &self.phase } else { &attempt.span }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_a_week_are_about_a_thousand_spans() {
        let (mut age, mut spans) = (Duration::ZERO, 0);
        while age < Duration::from_secs(7 * 24 * 3600) {
            age += interval(age);
            spans += 1;
        }
        assert!((900..1100).contains(&spans), "{spans}");
    }
}
