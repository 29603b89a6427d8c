//! What passes between a task and whoever runs it: what it is asked for, and what it tells.
//!
//! A task never waits for either.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{
    protocol::{Command, Level, Report},
    pulse,
};

/// What the runner asks for while a task runs; set by the thread that reads commands, looked at
/// between micro-batches.
#[derive(Debug, Default)]
pub struct Control {
    pause: AtomicBool,
    cancel: AtomicBool,
    checkpoint: AtomicBool,
    orphaned: AtomicBool,
    /// Any of pause, cancel and orphaned.
    stopping: AtomicBool,
}

impl Control {
    pub fn command(&self, command: Command) {
        let flag = match command {
            Command::Pause => &self.pause,
            Command::Cancel => &self.cancel,
            Command::Checkpoint => &self.checkpoint,
        };
        flag.store(true, Ordering::Relaxed);
        self.stopping.fetch_or(command != Command::Checkpoint, Ordering::Relaxed);
    }

    /// The runner is gone: stop at once and write nothing more.
    pub fn orphan(&self) {
        self.orphaned.store(true, Ordering::Relaxed);
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// For work that takes a flag: true once it is to stop, whatever the reason.
    pub fn stop_flag(&self) -> &AtomicBool {
        &self.stopping
    }

    pub fn is_orphaned(&self) -> bool {
        self.orphaned.load(Ordering::Relaxed)
    }

    /// Stop at the next micro-batch, whatever the reason. Who looks is alive.
    pub fn is_stopping(&self) -> bool {
        pulse::beat();
        self.stopping.load(Ordering::Relaxed)
    }

    /// The last finished step is to be saved before stopping.
    pub fn is_pausing(&self) -> bool {
        !self.is_orphaned() && !self.cancel.load(Ordering::Relaxed) && self.pause.load(Ordering::Relaxed)
    }

    /// Whether a checkpoint was asked for since the last call.
    pub fn takes_checkpoint(&self) -> bool {
        self.checkpoint.swap(false, Ordering::Relaxed)
    }
}

/// Where reports go.
pub struct Reporter<'a>(Box<dyn FnMut(Report) + 'a>);

impl<'a> Reporter<'a> {
    pub fn new(sink: impl FnMut(Report) + 'a) -> Reporter<'a> {
        Reporter(Box::new(sink))
    }

    /// What a rank says: the first speaks for its job, the others for themselves alone.
    pub fn of_rank(&mut self, rank: usize) -> Reporter<'_> {
        Reporter::new(move |report| {
            if rank == 0 || matches!(report, Report::Started { .. } | Report::Progress { .. }) {
                self.send(report);
            }
        })
    }

    pub fn send(&mut self, report: Report) {
        (self.0)(report);
    }

    pub fn event(&mut self, level: Level, code: &str, message: &str, data: serde_json::Value) {
        self.send(Report::Event { level, code: code.into(), message: message.into(), data });
    }
}
