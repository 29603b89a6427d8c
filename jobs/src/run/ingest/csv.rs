//! CSV with a header line; commas, semicolons or tabs, whichever the header has most of.

use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

use lathe_model::protocol::{Failure, FailureCode};
use serde_json::{Map, Value};

use super::{
    columns,
    errors::{RowCode, RowError, shown},
    sink::Sink,
    source::{carry, fail, read_failure},
    spec::Columns,
};

/// What the parser may have read ahead of the record it gives.
const BUFFER_BYTES: usize = 64 << 10;

pub fn read(reader: impl Read, head: &[u8], columns: &Columns, sink: &mut Sink<'_>) -> Result<(), Failure> {
    let since_record = Rc::new(Cell::new(0));
    let guard = Guard {
        reader,
        since_record: since_record.clone(),
        max: sink.max_line_bytes() + BUFFER_BYTES,
        name: sink.name().to_owned(),
    };
    let mut parser =
        csv::ReaderBuilder::new().delimiter(delimiter(head)).flexible(true).buffer_capacity(BUFFER_BYTES).from_reader(guard);
    let header = header(parser.byte_headers().map_err(parse_failure)?, sink.name())?;
    let mut record = csv::ByteRecord::new();
    loop {
        since_record.set(0);
        if !parser.read_byte_record(&mut record).map_err(parse_failure)? {
            return Ok(());
        }
        let line = record.position().map_or(0, csv::Position::line);
        let row = cells(&header, &record).and_then(|record| columns::row(columns, &record));
        sink.push(line, row)?;
    }
}

/// The delimiter that the first line, quoted parts aside, has most of.
pub fn delimiter(head: &[u8]) -> u8 {
    let mut counts = [(b',', 0), (b';', 0), (b'\t', 0)];
    let mut quoted = false;
    for byte in head {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' if !quoted => break,
            _ if quoted => {}
            _ => counts.iter_mut().filter(|(delimiter, _)| delimiter == byte).for_each(|(_, count)| *count += 1),
        }
    }
    // The first of equals, so that a comma is what a single column gets.
    counts.iter().rev().max_by_key(|(_, count)| *count).map_or(b',', |(delimiter, _)| *delimiter)
}

fn header(record: &csv::ByteRecord, name: &str) -> Result<Vec<String>, Failure> {
    let mut names: Vec<String> = Vec::new();
    for cell in record {
        let cell = std::str::from_utf8(cell).map_err(|_| {
            fail(FailureCode::InvalidEncoding, format!("line 1 of {name}, the header, is not UTF-8; save the file as UTF-8"))
        })?;
        if names.iter().any(|other| other == cell) {
            return Err(fail(
                FailureCode::UnsupportedFormat,
                format!("the header of {name} names `{}` twice; rename one column", shown(cell)),
            ));
        }
        names.push(cell.to_owned());
    }
    Ok(names)
}

fn cells(header: &[String], record: &csv::ByteRecord) -> Result<Map<String, Value>, RowError> {
    let keys = || header.iter().map(String::as_str);
    if record.len() != header.len() {
        let message = format!("the record has {} cells, and the header {}", record.len(), header.len());
        return Err(RowError::new(RowCode::InvalidRecord, None, message).with_keys(keys()));
    }
    let mut object = Map::new();
    for (key, cell) in header.iter().zip(record) {
        let text = std::str::from_utf8(cell).map_err(|error| {
            let message =
                format!("invalid UTF-8 at byte {} of `{}`; save the file as UTF-8", error.valid_up_to() + 1, shown(key));
            RowError::new(RowCode::InvalidEncoding, Some(key), message).with_keys(keys())
        })?;
        object.insert(key.clone(), Value::String(text.to_owned()));
    }
    Ok(object)
}

fn parse_failure(error: csv::Error) -> Failure {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => read_failure(error),
        other => fail(FailureCode::BadRows, format!("the CSV cannot be read: {other:?}")),
    }
}

/// Bounds a record, which an unclosed quote would stretch to the end of the file.
struct Guard<R> {
    reader: R,
    since_record: Rc<Cell<usize>>,
    max: usize,
    name: String,
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.since_record.set(self.since_record.get() + read);
        if self.since_record.get() > self.max {
            let message =
                format!("a record of {} is longer than {} bytes, or a quote is never closed", self.name, self.max - BUFFER_BYTES);
            return Err(carry(fail(FailureCode::LineTooLong, message)));
        }
        Ok(read)
    }
}
