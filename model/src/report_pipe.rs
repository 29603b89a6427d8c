//! The way of a worker's reports to its runner: a line each, in order.
//!
//! Rows of metrics wait a moment for one another. A row a step would wake the runner at every step, on a core that
//! this worker computes with, and whoever waits for the thread on that core waits along. Any other report takes the
//! rows before it along at once; [`crate::pulse`] has one every second.

use std::{
    io::Write,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::protocol::Report;

/// How long rows of metrics gather.
const GATHER: Duration = Duration::from_millis(250);

pub struct ReportPipe<W>(Mutex<State<W>>);

struct State<W> {
    pipe: W,
    waiting: Vec<u8>,
    written: Instant,
}

impl<W: Write> ReportPipe<W> {
    pub fn new(pipe: W) -> ReportPipe<W> {
        ReportPipe(Mutex::new(State { pipe, waiting: Vec::new(), written: Instant::now() }))
    }

    pub fn send(&self, report: &Report) {
        let Ok(line) = serde_json::to_vec(report) else { return };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.extend(line);
        state.waiting.push(b'\n');
        if !matches!(report, Report::Metric { .. }) || state.written.elapsed() >= GATHER {
            state.write();
        }
    }

    /// Nothing more is coming.
    pub fn finish(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write();
    }
}

impl<W: Write> State<W> {
    fn write(&mut self) {
        // A runner that is gone closes standard input too, and that is what stops the task.
        let _ = self.pipe.write_all(&self.waiting);
        self.waiting.clear();
        self.written = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::MetricRow;

    #[test]
    fn rows_go_together_in_order_and_none_is_left() {
        let pipe = ReportPipe::new(Vec::new());
        let send = |step| {
            let row = MetricRow {
                step,
                loss: 1.0,
                learning_rate: 1.0,
                grad_norm: 1.0,
                tokens: 1,
                tokens_per_second: 1.0,
                validation_loss: None,
            };
            pipe.send(&Report::Metric { row });
        };
        let written = || {
            let state = pipe.0.lock().unwrap();
            let lines = state.pipe.split_inclusive(|&byte| byte == b'\n').map(|line| serde_json::from_slice(line).unwrap());
            lines.collect::<Vec<Report>>()
        };
        let alive = Report::Alive { progress: true };
        pipe.send(&alive);
        send(1);
        send(2);
        assert_eq!(written().len(), 1);
        pipe.send(&alive);
        assert_eq!(written().len(), 4);
        assert_eq!(written()[3], alive);
        std::thread::sleep(GATHER);
        send(3);
        send(4);
        pipe.finish();
        let steps =
            written().into_iter().filter_map(|report| if let Report::Metric { row } = report { Some(row.step) } else { None });
        assert_eq!(steps.collect::<Vec<_>>(), [1, 2, 3, 4]);
    }
}
