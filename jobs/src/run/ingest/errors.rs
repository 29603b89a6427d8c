//! Bad rows: what is wrong with each, where it stands, and the file that keeps them.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use lathe_model::protocol::FailureCode;
use serde::{Deserialize, Serialize};

/// `errors.jsonl` holds the first so many; all are counted.
pub const MAX_KEPT_ERRORS: u64 = 10_000;

/// Longest key or excerpt that a message repeats, in characters, and most keys that it lists.
const MAX_SHOWN: usize = 64;
const MAX_KEYS: usize = 32;

/// The closed list of what can be wrong with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowCode {
    InvalidEncoding,
    LineTooLong,
    InvalidJson,
    DuplicateKey,
    InvalidRecord,
    MissingField,
    WrongType,
    Empty,
    BadMessages,
}

impl RowCode {
    pub const ALL: [RowCode; 9] = [
        RowCode::InvalidEncoding,
        RowCode::LineTooLong,
        RowCode::InvalidJson,
        RowCode::DuplicateKey,
        RowCode::InvalidRecord,
        RowCode::MissingField,
        RowCode::WrongType,
        RowCode::Empty,
        RowCode::BadMessages,
    ];

    /// As JSON has it.
    pub fn as_str(self) -> &'static str {
        match self {
            RowCode::InvalidEncoding => "invalid_encoding",
            RowCode::LineTooLong => "line_too_long",
            RowCode::InvalidJson => "invalid_json",
            RowCode::DuplicateKey => "duplicate_key",
            RowCode::InvalidRecord => "invalid_record",
            RowCode::MissingField => "missing_field",
            RowCode::WrongType => "wrong_type",
            RowCode::Empty => "empty",
            RowCode::BadMessages => "bad_messages",
        }
    }
}

/// One line of `errors.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRow {
    /// The input file's id.
    pub file: String,
    pub name: String,
    /// From 1; in JSON arrays and Parquet files the number of the row.
    pub line: u64,
    pub code: RowCode,
    pub field: Option<String>,
    pub message: String,
    /// The keys that the row has, at most 32.
    pub keys: Vec<String>,
}

/// What is wrong with a row, before it is known where the row stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowError {
    pub code: RowCode,
    pub field: Option<String>,
    pub message: String,
    pub keys: Vec<String>,
}

impl RowError {
    pub fn new(code: RowCode, field: Option<&str>, message: impl Into<String>) -> RowError {
        RowError { code, field: field.map(shown), message: message.into(), keys: Vec::new() }
    }

    pub fn with_keys<'a>(mut self, keys: impl Iterator<Item = &'a str>) -> RowError {
        self.keys = keys.take(MAX_KEYS).map(shown).collect();
        self
    }
}

/// Text from a file as a message may repeat it: short and without control characters, which a
/// terminal would obey and a database would refuse.
pub fn shown(text: &str) -> String {
    let mut short: String = text.chars().take(MAX_SHOWN).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        short.push('…');
    }
    short
}

/// Counts the bad rows and keeps the first of them in a file.
pub struct Errors {
    file: BufWriter<File>,
    total: u64,
    first: Option<BadRow>,
    /// The code that all bad rows so far share.
    shared: Option<RowCode>,
}

impl Errors {
    pub fn create(folder: &Path) -> io::Result<Errors> {
        std::fs::create_dir_all(folder)?;
        Ok(Errors { file: BufWriter::new(File::create(folder.join("errors.jsonl"))?), total: 0, first: None, shared: None })
    }

    pub fn push(&mut self, bad: BadRow) -> io::Result<()> {
        if self.total < MAX_KEPT_ERRORS {
            serde_json::to_writer(&mut self.file, &bad)?;
            self.file.write_all(b"\n")?;
        }
        self.total += 1;
        match self.first {
            None => {
                self.shared = Some(bad.code);
                self.first = Some(bad);
            }
            Some(_) if self.shared != Some(bad.code) => self.shared = None,
            Some(_) => {}
        }
        Ok(())
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// The code of a dataset that fails for its bad rows: the particular one where they share it.
    pub fn failure_code(&self) -> FailureCode {
        match self.shared {
            Some(RowCode::InvalidEncoding) => FailureCode::InvalidEncoding,
            Some(RowCode::LineTooLong) => FailureCode::LineTooLong,
            _ => FailureCode::BadRows,
        }
    }

    /// `3 bad rows; the first is line 7 of a.jsonl: …`, or nothing.
    pub fn sentence(&self) -> Option<String> {
        let first = self.first.as_ref()?;
        let count = if self.total == 1 { "1 row is bad".to_owned() } else { format!("{} rows are bad", self.total) };
        let keys = if first.keys.is_empty() { String::new() } else { format!(" (keys found: {})", first.keys.join(", ")) };
        Some(format!("{count}; the first is line {} of {}: {}{keys}", first.line, first.name, first.message))
    }

    pub fn finish(mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()
    }
}
