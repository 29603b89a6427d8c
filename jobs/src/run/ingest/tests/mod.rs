//! Whole ingestions of small real files, good and bad; each theme in a file of its own.

mod bad_rows;
mod bounds;
mod formats;
mod parquet_files;
mod templates;

use std::{
    io::Write,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use lathe_model::{
    data::rows::{Dataset, Row, Turn},
    protocol::{Failure, FailureCode},
};
use serde_json::json;

use super::*;

struct Case {
    folder: tempfile::TempDir,
    source: FilesSource,
    max_bytes: u64,
    max_line_bytes: usize,
}

impl Case {
    fn new(files: &[(&str, &[u8])]) -> Case {
        let folder = tempfile::tempdir().unwrap();
        let files = files.iter().enumerate().map(|(index, (name, bytes))| {
            let path = folder.path().join(format!("input-{index}"));
            std::fs::write(&path, bytes).unwrap();
            InputFile { id: format!("file-{index}"), name: (*name).to_owned(), path }
        });
        let source = FilesSource {
            files: files.collect(),
            format: Format::Auto,
            columns: Columns::new(),
            documents: Documents::File,
            on_bad_row: OnBadRow::Reject,
        };
        Case { folder, source, max_bytes: 1 << 30, max_line_bytes: 8 << 20 }
    }

    fn skip(mut self) -> Case {
        self.source.on_bad_row = OnBadRow::Skip;
        self
    }

    fn format(mut self, format: Format) -> Case {
        self.source.format = format;
        self
    }

    fn documents(mut self, documents: Documents) -> Case {
        self.source.documents = documents;
        self
    }

    fn columns(mut self, columns: &[(Role, &str)]) -> Case {
        self.source.columns = columns.iter().map(|(role, key)| (*role, (*key).to_owned())).collect();
        self
    }

    fn output(&self) -> std::path::PathBuf {
        self.folder.path().join("dataset")
    }

    fn run(&self) -> Result<Ingested, Failure> {
        let spec = IngestSpec {
            source: Source::Files(self.source.clone()),
            output: self.output(),
            max_bytes: self.max_bytes,
            max_ratio: 100,
            max_line_bytes: self.max_line_bytes,
        };
        run(spec, &mut |_| {}, &AtomicBool::new(false))
    }

    fn rows(&self) -> Vec<Row> {
        self.run().unwrap();
        rows(&self.output())
    }

    fn failure(&self) -> Failure {
        let failure = self.run().expect_err("the ingestion must fail");
        assert!(!self.output().join("manifest.json").exists());
        failure
    }

    fn bad_rows(&self) -> Vec<BadRow> {
        let text = std::fs::read_to_string(self.output().join("errors.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The only bad row of a set that otherwise reads.
    fn bad_row(self) -> BadRow {
        let case = self.skip();
        let _ = case.run();
        let mut bad = case.bad_rows();
        assert_eq!(bad.len(), 1, "{bad:?}");
        bad.remove(0)
    }
}

fn rows(folder: &Path) -> Vec<Row> {
    Dataset::open(folder).unwrap().iter().unwrap().map(Result::unwrap).collect()
}

fn text(text: &str) -> Row {
    Row::Text { text: text.to_owned() }
}

fn pair(instruction: &str, input: &str, output: &str) -> Row {
    let turn = Turn { instruction: instruction.into(), input: input.into(), output: output.into() };
    Row::Conversation { system: None, turns: vec![turn] }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Text that hardly compresses.
fn noise(bytes: usize) -> String {
    let mut state = 1u64;
    let mut letter = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        char::from(b' ' + ((state >> 33) % 94) as u8)
    };
    (0..bytes).map(|_| letter()).collect()
}
