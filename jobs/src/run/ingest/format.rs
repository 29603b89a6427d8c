//! Which reader a file gets.

use lathe_model::protocol::{Failure, FailureCode};
use serde_json::Value;

use super::{
    columns,
    csv::delimiter,
    errors::shown,
    parquet,
    source::{HEAD_BYTES, fail},
    spec::{Columns, Format, InputFile},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    Text,
    JsonLines,
    JsonStream,
    Csv,
    Parquet,
}

/// The reader for a file that begins with `head`. A named format is what the user says it is;
/// `auto` goes by the content where that is unmistakable, then by the name.
pub fn choose(format: Format, file: &InputFile, head: &[u8], columns: &Columns) -> Result<Reader, Failure> {
    let name = shown(&file.name);
    let is_parquet = head.starts_with(parquet::MAGIC);
    if is_parquet && matches!(format, Format::Auto | Format::Parquet) {
        return Ok(Reader::Parquet);
    }
    let ending = ending(&file.name);
    if format == Format::Parquet || (format == Format::Auto && ending == "parquet" && !head.is_empty()) {
        return Err(fail(FailureCode::UnsupportedFormat, format!("{name} is not a Parquet file: it does not begin with PAR1")));
    }
    if head.contains(&0) {
        return Err(fail(FailureCode::UnsupportedFormat, format!("{name} is binary; give text, JSON, CSV or Parquet")));
    }
    Ok(match format {
        Format::Text => Reader::Text,
        Format::Json => Reader::JsonStream,
        Format::Jsonl => json_reader(head),
        Format::Csv => Reader::Csv,
        Format::Auto | Format::Parquet => match ending.as_str() {
            "txt" | "text" | "md" => Reader::Text,
            "jsonl" | "ndjson" | "json" => json_reader(head),
            "csv" | "tsv" => Reader::Csv,
            _ => by_content(head, columns),
        },
    })
}

/// The name's ending in small letters, below any ending of a compression.
fn ending(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    let name = [".gz", ".zst", ".gzip", ".zstd"].iter().find_map(|layer| name.strip_suffix(layer)).unwrap_or(&name);
    name.rsplit_once('.').map_or(String::new(), |(_, ending)| ending.to_owned())
}

/// JSON whose first line is a whole object is a row a line; so is a first line that never ends
/// within what was looked at. The rest is an array, or objects over many lines.
fn json_reader(head: &[u8]) -> Reader {
    let body = head.trim_ascii_start();
    if body.starts_with(b"[") {
        return Reader::JsonStream;
    }
    let line = body.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let unfinished = line.len() == body.len() && head.len() >= HEAD_BYTES - 3;
    if unfinished {
        return Reader::JsonLines;
    }
    // A first line that is damaged is a bad row; one that merely goes on is an object over lines.
    match serde_json::Deserializer::from_slice(line).into_iter::<Value>().next() {
        Some(Err(error)) if error.is_eof() && line.trim_ascii().starts_with(b"{") && goes_on(body) => Reader::JsonStream,
        _ => Reader::JsonLines,
    }
}

/// Whether the text after the first line continues its object: a new row would begin with `{`.
fn goes_on(body: &[u8]) -> bool {
    let rest = body.iter().position(|byte| *byte == b'\n').map_or(&[][..], |end| body[end..].trim_ascii_start());
    rest.first().is_some_and(|byte| *byte != b'{')
}

fn by_content(head: &[u8], columns: &Columns) -> Reader {
    let body = head.trim_ascii_start();
    let first = |bytes: &[u8]| bytes.trim_ascii_start().first().copied();
    if body.starts_with(b"{") && matches!(first(&body[1..]), Some(b'"' | b'}')) {
        return json_reader(head);
    }
    if body.starts_with(b"[") && first(&body[1..]) == Some(b'{') {
        return Reader::JsonStream;
    }
    // A header of CSV names at least two columns, one of them known.
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let delimiter = delimiter(head);
    let known = columns::keys(columns);
    let cells: Vec<&[u8]> = line.split(|byte| *byte == delimiter).map(unquoted).collect();
    if cells.len() > 1 && cells.iter().any(|cell| known.iter().any(|key| key.as_bytes() == *cell)) {
        return Reader::Csv;
    }
    Reader::Text
}

fn unquoted(cell: &[u8]) -> &[u8] {
    let cell = cell.trim_ascii();
    cell.strip_prefix(b"\"").and_then(|inner| inner.strip_suffix(b"\"")).unwrap_or(cell)
}
