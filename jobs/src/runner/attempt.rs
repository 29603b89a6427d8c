//! One attempt, as the tasks that work on it share it.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use tokio::sync::watch;

use super::{outbox::Outbox, spans::AttemptTrace};
use crate::{context::Context, lease::Lease};

/// What is asked of the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    Run,
    Pause,
    Cancel,
    LeaseLost,
}

/// What the tasks of one attempt share.
pub struct Attempt {
    pub context: Arc<Context>,
    pub lease: Lease,
    pub outbox: Outbox,
    pub trace: AttemptTrace,
    pub control: watch::Sender<Control>,
    /// The newest step of each rank.
    pub steps: Vec<AtomicI64>,
    /// How many checkpoints the job keeps, once that is known.
    pub keep_checkpoints: AtomicI64,
}

impl Attempt {
    /// Notes the first rank's newest step; whether it is the attempt's first.
    pub fn advance(&self, step: u64) -> bool {
        self.steps[0].swap(i64::try_from(step).unwrap_or(i64::MAX), Ordering::Relaxed) == 0
    }

    /// The newest step of the first rank, which speaks for the others.
    pub fn step(&self) -> i64 {
        self.steps[0].load(Ordering::Relaxed)
    }
}
