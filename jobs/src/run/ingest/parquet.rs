//! Parquet, record by record. Only the columns that a row may be made of are decoded.
//!
//! The decoder was not written for hostile files: a panic of it is caught and becomes the file's
//! failure, pages are looked at before they are read ([`Pages`]), and rows are counted against the same
//! bounds as a compression layer's output, since a dictionary can unfold without end.

use std::{
    fs::File,
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
};

use lathe_model::protocol::{Failure, FailureCode};
use parquet::{
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
    schema::types::Type,
};
use serde_json::{Map, Value};

use super::{
    columns,
    errors::{RowCode, RowError, shown},
    pages::{PageTooLarge, Pages},
    sink::{Sink, too_long},
    source::{Opened, fail, read_failure, write_failure},
    spec::Columns,
};

pub const MAGIC: &[u8] = b"PAR1";

/// A dictionary may well unfold a small file a hundredfold; below this nobody minds.
const RATIO_FLOOR_BYTES: u64 = 64 << 20;

/// A Parquet file is read from its end, so one that came compressed is unfolded beside the dataset.
pub fn seekable(opened: Opened, path: &std::path::Path, folder: &std::path::Path) -> Result<File, Failure> {
    if !opened.compressed {
        return File::open(path).map_err(read_failure);
    }
    let mut file = tempfile::tempfile_in(folder).map_err(write_failure)?;
    let mut reader = opened.reader;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match reader.read(&mut buffer).map_err(read_failure)? {
            0 => return Ok(file),
            read => std::io::Write::write_all(&mut file, &buffer[..read]).map_err(write_failure)?,
        }
    }
}

pub fn read(file: File, max_ratio: u64, columns: &Columns, sink: &mut Sink<'_>) -> Result<(), Failure> {
    let bytes = file.metadata().map_err(read_failure)?.len();
    let left = max_ratio.saturating_mul(bytes).max(RATIO_FLOOR_BYTES);
    let name = sink.name().to_owned();
    let damaged = |error: ParquetError| unreadable(&name, error);
    catch_unwind(AssertUnwindSafe(|| records(file, left, columns, sink, &damaged)))
        .unwrap_or_else(|_| Err(damaged(ParquetError::General("its content is damaged".into()))))
}

fn unreadable(name: &str, error: ParquetError) -> Failure {
    match error {
        ParquetError::External(cause) if cause.is::<PageTooLarge>() => {
            fail(FailureCode::DecompressionLimit, format!("{name} cannot be read: {cause}; save it with smaller pages"))
        }
        error => fail(FailureCode::TruncatedFile, format!("{name} cannot be read as Parquet: {}", shown(&error.to_string()))),
    }
}

fn records(
    file: File,
    mut left: u64,
    columns: &Columns,
    sink: &mut Sink<'_>,
    damaged: &dyn Fn(ParquetError) -> Failure,
) -> Result<(), Failure> {
    let (pages, has_metadata) = Pages::new(file, left);
    let reader = SerializedFileReader::new(pages).map_err(damaged)?;
    has_metadata.store(true, Ordering::Relaxed);
    let schema = reader.metadata().file_metadata().schema();
    let keys: Vec<String> = schema.get_fields().iter().map(|field| field.name().to_owned()).collect();
    let wanted = columns::keys(columns);
    let fields: Vec<Arc<Type>> = schema.get_fields().iter().filter(|field| wanted.contains(&field.name())).cloned().collect();
    if fields.is_empty() {
        let error =
            columns::row(columns, &Map::new()).expect_err("an empty record is no row").with_keys(keys.iter().map(String::as_str));
        return sink.bad(1, error);
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(damaged)?;
    let max = sink.max_line_bytes();
    let rows = reader.get_row_iter(Some(projection)).map_err(damaged)?;
    for (number, row) in (1..).zip(rows) {
        let record = object(row.map_err(damaged)?);
        let size = size(&record);
        left = left.checked_sub(size as u64).ok_or_else(|| {
            fail(
                FailureCode::DecompressionLimit,
                format!("{} unfolds to far more than its size; save it without dictionaries", sink.name()),
            )
        })?;
        let row = match record {
            _ if size > max => Err(too_long("row", max)),
            Ok(record) => columns::row(columns, &record),
            Err(error) => Err(error),
        };
        sink.push(number, row.map_err(|error| error.with_keys(keys.iter().map(String::as_str))))?;
    }
    Ok(())
}

fn object(row: Row) -> Result<Map<String, Value>, RowError> {
    row.into_columns().into_iter().map(|(key, field)| value(field, &key).map(|value| (key, value))).collect()
}

/// Texts, lists and groups; of anything else only its kind matters, for the message.
fn value(field: Field, key: &str) -> Result<Value, RowError> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Str(text) => Value::String(text),
        Field::Bytes(bytes) => match String::from_utf8(bytes.data().to_vec()) {
            Ok(text) => Value::String(text),
            Err(error) => {
                let at = error.utf8_error().valid_up_to() + 1;
                let message = format!("invalid UTF-8 at byte {at} of `{}`", shown(key));
                return Err(RowError::new(RowCode::InvalidEncoding, Some(key), message));
            }
        },
        Field::Bool(value) => Value::Bool(value),
        Field::Float(value) => Value::from(value),
        Field::Double(value) => Value::from(value),
        Field::Group(row) => Value::Object(object(row)?),
        Field::ListInternal(list) => {
            list.elements().iter().map(|element| value(element.clone(), key)).collect::<Result<_, _>>()?
        }
        Field::MapInternal(_) => Value::Object(Map::new()),
        // A number, date or time: no part of a row may be one, so only its kind is ever said.
        _ => Value::from(0),
    })
}

/// Bytes of text in a record, with a little for every value.
fn size(record: &Result<Map<String, Value>, RowError>) -> usize {
    fn of(value: &Value) -> usize {
        16 + match value {
            Value::String(text) => text.len(),
            Value::Array(values) => values.iter().map(of).sum(),
            Value::Object(object) => object.values().map(of).sum(),
            _ => 0,
        }
    }
    record.as_ref().map_or(16, |record| record.values().map(of).sum())
}
