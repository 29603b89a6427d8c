//! Where readers put what they find: good rows into the dataset, bad ones into the record of
//! errors, progress to the runner. Every reader passes here once a row, so stopping and the
//! reserved space are looked at here too.

use std::{
    cell::Cell,
    rc::Rc,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use lathe_model::{
    data::rows::{Row, Writer},
    protocol::{Failure, FailureCode},
};

use super::{
    IngestProgress,
    errors::{BadRow, Errors, RowCode, RowError, shown},
    source::{fail, write_failure},
};

const PROGRESS_EVERY: Duration = Duration::from_millis(250);

pub struct Sink<'a> {
    pub writer: Writer,
    pub errors: Errors,
    pub progress: &'a mut dyn FnMut(IngestProgress),
    pub stop: &'a AtomicBool,
    pub max_bytes: u64,
    pub max_line_bytes: usize,
    /// Bytes read of all files, moved on by the readers.
    pub position: Rc<Cell<u64>>,
    pub total: u64,
    /// The file being read: its id and, as messages may show it, its name.
    pub file: (String, String),
    pub reported: Instant,
}

impl Sink<'_> {
    pub fn max_line_bytes(&self) -> usize {
        self.max_line_bytes
    }

    pub fn name(&self) -> &str {
        &self.file.1
    }

    /// A row, or what is wrong with it.
    pub fn push(&mut self, line: u64, row: Result<Row, RowError>) -> Result<(), Failure> {
        match row {
            Ok(row) => self.row(&row),
            Err(error) => self.bad(line, error),
        }
    }

    pub fn row(&mut self, row: &Row) -> Result<(), Failure> {
        self.writer.push(row).map_err(write_failure)?;
        if self.writer.bytes_written() > self.max_bytes {
            let message = format!(
                "the rows need more than the {} bytes reserved for this dataset; split the set or free some space",
                self.max_bytes
            );
            return Err(fail(FailureCode::DiskFull, message));
        }
        self.tick()
    }

    pub fn bad(&mut self, line: u64, error: RowError) -> Result<(), Failure> {
        let RowError { code, field, message, keys } = error;
        let bad =
            BadRow { file: self.file.0.clone(), name: self.file.1.clone(), line, code, field, message: clean(&message), keys };
        self.errors.push(bad).map_err(write_failure)?;
        self.tick()
    }

    fn tick(&mut self) -> Result<(), Failure> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Failure { retryable: true, ..fail(FailureCode::Internal, "stopped before the end, as asked") });
        }
        // The clock is read once in 64 rows.
        if (self.writer.rows() + self.errors.total()) & 63 == 0 && self.reported.elapsed() >= PROGRESS_EVERY {
            self.report();
        }
        Ok(())
    }

    pub fn report(&mut self) {
        self.reported = Instant::now();
        let (rows, bad_rows) = (self.writer.rows(), self.errors.total());
        (self.progress)(IngestProgress { done: self.position.get(), total: self.total, rows, bad_rows });
    }

    pub fn begin(&mut self, id: &str, name: &str) {
        self.file = (id.to_owned(), shown(name));
    }
}

pub fn too_long(what: &str, max: usize) -> RowError {
    RowError::new(RowCode::LineTooLong, None, format!("the {what} is longer than {max} bytes; cut it into several"))
}

/// Messages of parsers may repeat what they read.
fn clean(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(1_000).collect()
}
