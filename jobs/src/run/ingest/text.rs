//! Plain text, cut into documents at line ends.
//!
//! Line ends become `\n`; blank documents are nobody's error and are left out. A document longer
//! than the bound is cut at the last line end before it and goes on as the next row.

use std::io::BufRead;

use lathe_model::{data::rows::Row, protocol::Failure};

use super::{
    errors::RowError,
    json::invalid_encoding,
    sink::{Sink, too_long},
    source::{Line, Lines, read_failure},
    spec::Documents,
};

pub fn read(reader: impl BufRead, documents: Documents, sink: &mut Sink<'_>) -> Result<(), Failure> {
    let max = sink.max_line_bytes();
    let mut lines = Lines::new(reader, max);
    let mut document = Document::default();
    while let Some(line) = lines.next().map_err(read_failure)? {
        let blank = !line.too_long && line.bytes.trim_ascii().is_empty();
        if blank && documents != Documents::File {
            document.finish(documents, sink)?;
            continue;
        }
        if document.text.len() + line.bytes.len() > max {
            document.finish(documents, sink)?;
        }
        document.add(&line, max);
        if documents == Documents::Line {
            document.finish(documents, sink)?;
        }
    }
    document.finish(documents, sink)
}

/// The document being read; once a line of it is bad, the rest of it is passed over.
#[derive(Default)]
struct Document {
    text: String,
    bad: Option<(u64, RowError)>,
}

impl Document {
    fn add(&mut self, line: &Line<'_>, max: usize) {
        if self.bad.is_some() {
            return;
        }
        let checked = if line.too_long {
            Err(too_long("line", max))
        } else {
            std::str::from_utf8(line.bytes).map_err(|error| invalid_encoding(&error))
        };
        match checked {
            Ok(text) => {
                self.text.push_str(text);
                if line.ended {
                    self.text.push('\n');
                }
            }
            Err(error) => {
                self.text.clear();
                self.bad = Some((line.number, error));
            }
        }
    }

    fn finish(&mut self, documents: Documents, sink: &mut Sink<'_>) -> Result<(), Failure> {
        let mut text = std::mem::take(&mut self.text);
        if let Some((line, error)) = self.bad.take() {
            return sink.bad(line, error);
        }
        if text.trim().is_empty() {
            return Ok(());
        }
        if documents != Documents::File {
            text.truncate(text.trim_end_matches('\n').len());
        }
        sink.push(0, Ok(Row::Text { text }))
    }
}
