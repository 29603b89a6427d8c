//! Ingestion: files or rules become a dataset folder (see [`lathe_model::data::rows`]).
//!
//! It runs in a child process without database or network, because files are hostile until they
//! are read. Memory stays constant: rows are streamed, and no line, record, document or unfolded
//! layer passes the bounds of the [`IngestSpec`]. Every bad row is written to `errors.jsonl` with
//! its line, field and keys; no row is changed, cut or dropped without being counted there.

mod columns;
mod csv;
mod errors;
mod format;
mod json;
mod pages;
mod parquet;
mod sink;
mod source;
mod space;
mod spec;
mod template;
mod text;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::{cell::Cell, fs, rc::Rc, sync::atomic::AtomicBool, time::Instant};

use lathe_model::{
    data::rows::{Manifest, Writer},
    protocol::{Failure, FailureCode},
};

pub use columns::check as check_columns;
pub use errors::{BadRow, MAX_KEPT_ERRORS, RowCode};
pub use spec::{
    Columns, Documents, FilesSource, Format, IngestSpec, InputFile, OnBadRow, Role, Sample, Source, TemplateSource, TemplateSpec,
    Variable, Wordings,
};
pub use template::check as check_templates;

use errors::Errors;
use format::Reader;
use sink::Sink;
use source::{Bounds, fail, write_failure};

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

/// Makes the dataset of `spec.output`, or says why not; `errors.jsonl` is there either way.
///
/// When `stop` is raised it ends within a row, with a retryable failure that means nothing: whoever
/// raised it knows. An attempt after another begins anew.
pub fn run(spec: IngestSpec, progress: &mut dyn FnMut(IngestProgress), stop: &AtomicBool) -> Result<Ingested, Failure> {
    fs::create_dir_all(&spec.output).map_err(write_failure)?;
    let mut sink = Sink {
        writer: Writer::create(&spec.output).map_err(write_failure)?,
        errors: Errors::create(&spec.output).map_err(write_failure)?,
        progress,
        stop,
        max_bytes: spec.max_bytes,
        max_line_bytes: spec.max_line_bytes,
        position: Rc::new(Cell::new(0)),
        total: 0,
        file: Default::default(),
        reported: Instant::now(),
    };
    let outcome = match &spec.source {
        Source::Files(source) => read_files(source, &spec, &mut sink),
        Source::Template(source) => template::make(source, &spec.output, &mut sink),
    };
    sink.report();
    let Sink { writer, errors, .. } = sink;
    let (bad_rows, rows) = (errors.total(), writer.rows());
    let verdict = outcome.and_then(|()| judge(&spec.source, &errors, rows));
    errors.finish().map_err(write_failure)?;
    verdict?;
    Ok(Ingested { manifest: writer.finish().map_err(write_failure)?, bad_rows })
}

fn read_files(source: &FilesSource, spec: &IngestSpec, sink: &mut Sink<'_>) -> Result<(), Failure> {
    let bounds = Bounds {
        max_bytes: spec.max_bytes,
        max_ratio: spec.max_ratio,
        unfolded: Rc::new(Cell::new(0)),
        position: sink.position.clone(),
    };
    let sizes = source.files.iter().map(|file| fs::metadata(&file.path).map(|metadata| metadata.len()));
    sink.total = sizes.sum::<std::io::Result<u64>>().map_err(source::read_failure)?;
    for file in &source.files {
        sink.begin(&file.id, &file.name);
        let before = sink.position.get();
        let opened = source::open(file, &bounds)?;
        let bytes = opened.bytes;
        match format::choose(source.format, file, &opened.head, &source.columns)? {
            Reader::Text => text::read(opened.reader, source.documents, sink)?,
            Reader::JsonLines => json::read_lines(opened.reader, &source.columns, sink)?,
            Reader::JsonStream => json::read_stream(opened.reader, &source.columns, sink)?,
            Reader::Csv => csv::read(opened.reader, &opened.head, &source.columns, sink)?,
            Reader::Parquet => {
                let file = parquet::seekable(opened, &file.path, &spec.output)?;
                parquet::read(file, spec.max_ratio, &source.columns, sink)?;
            }
        }
        // What a reader had no need to read is done as well.
        sink.position.set(before + bytes);
    }
    Ok(())
}

/// Whether what was read makes a dataset.
fn judge(source: &Source, errors: &Errors, rows: u64) -> Result<(), Failure> {
    let Source::Files(files) = source else { return Ok(()) };
    let bad = errors.sentence();
    match bad {
        Some(bad) if files.on_bad_row == OnBadRow::Reject => {
            let advice = "correct them, or create the dataset with `on_bad_row` set to `skip`";
            Err(fail(errors.failure_code(), format!("{bad}; {advice}")))
        }
        Some(bad) if rows == 0 => Err(fail(FailureCode::NoValidRows, format!("the files hold no valid row: {bad}"))),
        None if rows == 0 => Err(fail(FailureCode::NoValidRows, "the files are empty: there is no row in them")),
        _ => Ok(()),
    }
}
