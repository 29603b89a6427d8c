//! Rows in JSON: one a line, or the elements of an array of any size.
//!
//! An array is cut into its elements by looking at brackets and quotes alone, so that memory holds
//! one element; each element is then parsed like a line. Duplicate keys and nesting past serde's
//! 128 levels make a row bad: which of two values was meant is not for us to choose.

use std::{cell::RefCell, fmt, io, io::BufRead};

use lathe_model::{
    data::rows::Row,
    protocol::{Failure, FailureCode},
};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{
    columns,
    errors::{RowCode, RowError, shown},
    sink::{Sink, too_long},
    source::{Lines, fail, read_failure},
    spec::Columns,
};

/// Reads one row a line; blank lines count but hold nothing.
pub fn read_lines(reader: impl BufRead, columns: &Columns, sink: &mut Sink<'_>) -> Result<(), Failure> {
    let max = sink.max_line_bytes();
    let mut lines = Lines::new(reader, max);
    while let Some(line) = lines.next().map_err(read_failure)? {
        if line.too_long {
            sink.bad(line.number, too_long("line", max))?;
        } else if !line.bytes.trim_ascii().is_empty() {
            sink.push(line.number, parse(line.bytes, columns))?;
        }
    }
    Ok(())
}

/// Reads an array of rows, or rows one after another on any number of lines. What is not such a
/// sequence fails the file: after a break nobody knows where the next row begins.
pub fn read_stream(reader: impl BufRead, columns: &Columns, sink: &mut Sink<'_>) -> Result<(), Failure> {
    let max = sink.max_line_bytes();
    let mut elements = Elements { reader, array: None, closed: false, comma: None, max, bytes: Vec::new() };
    let mut number = 0;
    loop {
        match elements.next().map_err(read_failure)? {
            Element::End => return Ok(()),
            Element::Broken(what) => {
                let message = format!("{} is not valid JSON after row {number}: {what}", sink.name());
                return Err(fail(FailureCode::BadRows, message));
            }
            Element::TooLong => {
                number += 1;
                sink.bad(number, too_long("row", max))?;
            }
            Element::Value => {
                number += 1;
                sink.push(number, parse(&elements.bytes, columns))?;
            }
        }
    }
}

/// One row from the text of one object.
pub fn parse(bytes: &[u8], columns: &Columns) -> Result<Row, RowError> {
    let text = std::str::from_utf8(bytes).map_err(|error| invalid_encoding(&error))?;
    let repeated = RefCell::new(None);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value =
        Strict { repeated: &repeated }.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    match value {
        Ok(Value::Object(record)) => columns::row(columns, &record),
        Ok(other) => {
            Err(RowError::new(RowCode::WrongType, None, format!("the row is {}, and must be an object", columns::kind(&other))))
        }
        Err(error) => Err(match repeated.take() {
            Some(key) => {
                RowError::new(RowCode::DuplicateKey, Some(&key), format!("the key `{}` stands twice in one object", shown(&key)))
            }
            None => RowError::new(RowCode::InvalidJson, None, format!("not valid JSON: {error}")),
        }),
    }
}

pub fn invalid_encoding(error: &std::str::Utf8Error) -> RowError {
    let message = format!("invalid UTF-8 at byte {} of the line; save the file as UTF-8", error.valid_up_to() + 1);
    RowError::new(RowCode::InvalidEncoding, None, message)
}

/// Builds a [`Value`] and refuses an object that has a key twice.
#[derive(Clone, Copy)]
struct Strict<'a> {
    repeated: &'a RefCell<Option<String>>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = access.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if object.contains_key(&key) {
                *self.repeated.borrow_mut() = Some(key);
                return Err(A::Error::custom("duplicate key"));
            }
            let value = access.next_value_seed(self)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// Cuts a stream into the texts of its values.
struct Elements<R> {
    reader: R,
    /// Whether an array encloses the values; unknown before the first byte.
    array: Option<bool>,
    closed: bool,
    /// The last thing seen between values: `Some(true)` a comma, `Some(false)` a value.
    comma: Option<bool>,
    max: usize,
    bytes: Vec<u8>,
}

enum Element {
    /// Its text is in `bytes`.
    Value,
    TooLong,
    End,
    Broken(&'static str),
}

impl<R: BufRead> Elements<R> {
    fn next(&mut self) -> io::Result<Element> {
        loop {
            let Some(byte) = self.peek()? else {
                let open = self.array == Some(true) && !self.closed;
                return Ok(if open { Element::Broken("the file ends inside the array") } else { Element::End });
            };
            let in_array = self.array == Some(true);
            match byte {
                b' ' | b'\t' | b'\r' | b'\n' => {}
                b'[' if self.array.is_none() => self.array = Some(true),
                _ if self.closed => return Ok(Element::Broken("something follows the array")),
                b',' if in_array && self.comma == Some(false) => self.comma = Some(true),
                b']' if in_array && self.comma != Some(true) => self.closed = true,
                b',' | b']' | b'}' | b':' => return Ok(Element::Broken("a row is expected, not punctuation")),
                _ if in_array && self.comma == Some(false) => return Ok(Element::Broken("no comma before the next row")),
                _ => {
                    self.array.get_or_insert(false);
                    self.comma = Some(false);
                    return self.value();
                }
            }
            self.reader.consume(1);
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            match self.reader.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return Ok(other?.first().copied()),
            }
        }
    }

    /// Collects one value from its first byte on.
    fn value(&mut self) -> io::Result<Element> {
        self.bytes.clear();
        let (mut scan, mut long) = (Scan::default(), false);
        loop {
            if self.peek()?.is_none() {
                let whole = scan.scalar && !long;
                return Ok(if whole { Element::Value } else { Element::Broken("the file ends inside a row") });
            }
            let buffer = self.reader.fill_buf()?;
            let end =
                buffer.iter().enumerate().find_map(|(index, byte)| scan.step(*byte).map(|takes| index + usize::from(takes)));
            let part = &buffer[..end.unwrap_or(buffer.len())];
            if self.bytes.len() + part.len() > self.max {
                long = true;
                self.bytes.clear();
            } else if !long {
                self.bytes.extend_from_slice(part);
            }
            let used = part.len();
            self.reader.consume(used);
            if end.is_some() {
                return Ok(if long { Element::TooLong } else { Element::Value });
            }
        }
    }
}

/// Where in a value the scan stands.
#[derive(Default)]
struct Scan {
    begun: bool,
    depth: u64,
    in_string: bool,
    escaped: bool,
    /// A number or a word, which ends before the next punctuation or space.
    scalar: bool,
}

impl Scan {
    /// Some where the value ends: after this byte (`true`) or before it.
    fn step(&mut self, byte: u8) -> Option<bool> {
        let first = !std::mem::replace(&mut self.begun, true);
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return (!self.in_string && self.depth == 0).then_some(true);
        }
        if self.scalar {
            return matches!(byte, b',' | b']' | b'}' | b'{' | b'[' | b' ' | b'\t' | b'\r' | b'\n').then_some(false);
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth -= 1;
                return (self.depth == 0).then_some(true);
            }
            _ => self.scalar = first,
        }
        None
    }
}
