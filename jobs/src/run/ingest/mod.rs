//! Ingestion: files or rules become a dataset folder (see [`lathe_model::data::rows`]).
//!
//! It runs in a child process without database or network, because files are hostile until they
//! are read. Memory stays constant: rows are streamed, and no line, record, document or unfolded
//! layer passes the bounds of the [`IngestSpec`]. Every bad row is written to `errors.jsonl` with
//! its line, field and keys; no row is changed, cut or dropped without being counted there.

mod errors;
mod spec;

pub use errors::{BadRow, Errors, MAX_KEPT_ERRORS, RowCode};
pub use spec::{
    Columns, Documents, FilesSource, Format, IngestSpec, InputFile, OnBadRow, Role, Sample, Source, TemplateSource, TemplateSpec, Variable,
    Wordings,
};

use lathe_model::data::rows::Manifest;

/// How far an ingestion has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IngestProgress {
    /// Of the input files as they lie on the disk; for rules, rows made and wanted.
    pub done: u64,
    pub total: u64,
    pub rows: u64,
    pub bad_rows: u64,
}

/// What an ingestion has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingested {
    pub manifest: Manifest,
    /// Rows that were skipped.
    pub bad_rows: u64,
}

impl Ingested {
    /// What `/statistics` of the dataset shows.
    pub fn statistics(&self) -> serde_json::Value {
        serde_json::json!({
            "rows": self.manifest.rows,
            "conversations": self.manifest.conversations,
            "duplicates": self.manifest.duplicates,
            "bytes": self.manifest.bytes,
            "characters": self.manifest.characters,
            "bad_rows": self.bad_rows,
        })
    }
}
