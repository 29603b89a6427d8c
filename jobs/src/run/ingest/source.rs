//! From a file to its bytes: compression layers are recognised by their magic numbers and unfolded
//! within bounds, a byte order mark is dropped, and what is plainly no text is refused.

use std::{
    cell::Cell,
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read},
    rc::Rc,
};

use lathe_model::protocol::{Failure, FailureCode};

use super::{errors::shown, spec::InputFile};

/// How much of a file is looked at to recognise its format.
pub const HEAD_BYTES: usize = 64 << 10;

/// Compression within compression, at most so deep.
const MAX_LAYERS: usize = 3;

/// A small file may unfold to this much whatever its ratio.
const RATIO_FLOOR_BYTES: u64 = 1 << 20;

/// The most memory that a zstd frame may ask for: 2^27 bytes, what `zstd -19` and `--long` use.
const ZSTD_WINDOW_LOG: u32 = 27;

pub fn fail(code: FailureCode, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into(), param: None, retryable: false }
}

/// A [`Failure`] on its way through [`io::Read`].
#[derive(Debug)]
struct Carried(Failure);

impl fmt::Display for Carried {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.message)
    }
}

impl std::error::Error for Carried {}

pub fn carry(failure: Failure) -> io::Error {
    io::Error::other(Carried(failure))
}

/// The failure that a read of a file met.
pub fn read_failure(error: io::Error) -> Failure {
    match error.downcast::<Carried>() {
        Ok(carried) => carried.0,
        Err(error) => Failure { retryable: true, ..fail(FailureCode::Internal, format!("reading failed: {error}")) },
    }
}

/// The failure that a write of the dataset met.
pub fn write_failure(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            fail(FailureCode::DiskFull, "the disk is full; free some space and create the dataset again")
        }
        _ => Failure { retryable: true, ..fail(FailureCode::Internal, format!("writing the dataset failed: {error}")) },
    }
}

/// What all files of one ingestion share.
pub struct Bounds {
    pub max_bytes: u64,
    pub max_ratio: u64,
    /// Bytes unfolded so far.
    pub unfolded: Rc<Cell<u64>>,
    /// Bytes read from the files as they lie on the disk.
    pub position: Rc<Cell<u64>>,
}

/// A file without its compression and byte order mark.
pub struct Opened {
    pub reader: BufReader<Box<dyn Read>>,
    /// The first [`HEAD_BYTES`], which `reader` gives again.
    pub head: Vec<u8>,
    pub compressed: bool,
    /// Size on the disk.
    pub bytes: u64,
}

pub fn open(file: &InputFile, bounds: &Bounds) -> Result<Opened, Failure> {
    let name = shown(&file.name);
    let raw = File::open(&file.path).map_err(read_failure)?;
    let bytes = raw.metadata().map_err(read_failure)?.len();
    let mut reader: Box<dyn Read> = Box::new(Raw { file: raw, position: bounds.position.clone() });
    let mut depth = 0;
    loop {
        let mut head = read_head(&mut reader).map_err(read_failure)?;
        let magic = recognise(&head);
        if let Some(refusal) = magic.refusal(&name) {
            return Err(refusal);
        }
        if head.starts_with(b"\xef\xbb\xbf") {
            head.drain(..3);
        }
        let again = Cursor::new(head.clone()).chain(reader);
        let unfold: Box<dyn Read> = match magic {
            Magic::Gzip => Box::new(flate2::read::MultiGzDecoder::new(again)),
            Magic::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(again).map_err(read_failure)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(read_failure)?;
                Box::new(decoder)
            }
            _ => {
                let reader: Box<dyn Read> = Box::new(again);
                return Ok(Opened {
                    reader: BufReader::with_capacity(HEAD_BYTES * 4, reader),
                    head,
                    compressed: depth > 0,
                    bytes,
                });
            }
        };
        if depth == MAX_LAYERS {
            return Err(fail(FailureCode::UnsupportedFormat, format!("{name} is compressed more than {MAX_LAYERS} times over")));
        }
        reader = Box::new(Layer {
            inner: unfold,
            name: name.clone(),
            left: bounds.max_ratio.saturating_mul(bytes).max(RATIO_FLOOR_BYTES),
            max_ratio: bounds.max_ratio,
            max_bytes: bounds.max_bytes,
            unfolded: bounds.unfolded.clone(),
        });
        depth += 1;
    }
}

/// The bytes on the disk. Its errors are the disk's, so that those of the layers above are not.
struct Raw {
    file: File,
    position: Rc<Cell<u64>>,
}

impl Read for Raw {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer).map_err(|error| carry(read_failure(error)))?;
        self.position.set(self.position.get() + read as u64);
        Ok(read)
    }
}

/// An unfolding layer: bounds its output and says what is wrong with its input.
struct Layer {
    inner: Box<dyn Read>,
    name: String,
    left: u64,
    max_ratio: u64,
    max_bytes: u64,
    unfolded: Rc<Cell<u64>>,
}

impl Read for Layer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer).map_err(|error| self.explain(error))? as u64;
        if read > self.left {
            let message = format!(
                "{} unfolds to more than {} times its size; give it uncompressed if it is meant to",
                self.name, self.max_ratio
            );
            return Err(carry(fail(FailureCode::DecompressionLimit, message)));
        }
        self.left -= read;
        self.unfolded.set(self.unfolded.get() + read);
        if self.unfolded.get() > self.max_bytes {
            let message = format!(
                "{} does not fit into the {} bytes reserved for this dataset once unfolded; split the set or free some space",
                self.name, self.max_bytes
            );
            return Err(carry(fail(FailureCode::DecompressionLimit, message)));
        }
        Ok(read as usize)
    }
}

impl Layer {
    fn explain(&self, error: io::Error) -> io::Error {
        if error.get_ref().is_some_and(|inner| inner.is::<Carried>()) || error.kind() == io::ErrorKind::Interrupted {
            return error;
        }
        let what = if error.kind() == io::ErrorKind::UnexpectedEof { "ends too early" } else { "is damaged" };
        let message = format!("the compressed file {} {what}; upload it again", self.name);
        carry(fail(FailureCode::TruncatedFile, message))
    }
}

fn read_head(reader: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    reader.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    Ok(head)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Magic {
    Gzip,
    Zstd,
    Utf16,
    /// A known format that is not read, with the advice.
    Refused(&'static str),
    Other,
}

fn recognise(head: &[u8]) -> Magic {
    let refused: [(&[u8], &str); 7] = [
        (b"PK\x03\x04", "is a ZIP archive; unpack it first"),
        (b"\xfd7zXZ\0", "is compressed with xz; use gzip or zstd"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
        (b"Rar!\x1a\x07", "is a RAR archive; unpack it first"),
        (b"\x89PNG", "is a picture"),
        (b"%PDF-", "is a PDF document; extract its text first"),
        (b"ARROW1\0\0", "is an Arrow file; save it as Parquet"),
    ];
    if head.starts_with(b"\x1f\x8b") {
        Magic::Gzip
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
        Magic::Zstd
    } else if let Some((_, advice)) = refused.iter().find(|(magic, _)| head.starts_with(magic)) {
        Magic::Refused(advice)
    } else if head.starts_with(b"BZh") && head.get(4..10) == Some(b"1AY&SY") {
        Magic::Refused("is compressed with bzip2; use gzip or zstd")
    } else if head.get(257..262) == Some(b"ustar") {
        Magic::Refused("is a tar archive; unpack it first")
    } else if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        Magic::Utf16
    } else {
        Magic::Other
    }
}

impl Magic {
    fn refusal(self, name: &str) -> Option<Failure> {
        match self {
            Magic::Refused(advice) => Some(fail(FailureCode::UnsupportedFormat, format!("{name} {advice}"))),
            Magic::Utf16 => {
                Some(fail(FailureCode::InvalidEncoding, format!("{name} is UTF-16, from byte 0 on; save it as UTF-8")))
            }
            Magic::Gzip | Magic::Zstd | Magic::Other => None,
        }
    }
}

/// The lines of a text, numbered from 1 and bounded: of a line that is too long nothing is kept.
pub struct Lines<R> {
    reader: R,
    max_line_bytes: usize,
    number: u64,
    line: Vec<u8>,
}

pub struct Line<'a> {
    pub number: u64,
    /// Without its end; a carriage return before a line feed belongs to the end.
    pub bytes: &'a [u8],
    /// Whether a line feed followed.
    pub ended: bool,
    pub too_long: bool,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R, max_line_bytes: usize) -> Lines<R> {
        Lines { reader, max_line_bytes, number: 0, line: Vec::new() }
    }

    pub fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        self.line.clear();
        let (mut any, mut too_long, mut ended) = (false, false, false);
        while !ended {
            let buffer = match self.reader.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if buffer.is_empty() {
                break;
            }
            any = true;
            let end = memchr(buffer);
            let part = &buffer[..end.unwrap_or(buffer.len())];
            if self.line.len() + part.len() > self.max_line_bytes {
                too_long = true;
                self.line.clear();
            } else if !too_long {
                self.line.extend_from_slice(part);
            }
            let used = part.len() + usize::from(end.is_some());
            ended = end.is_some();
            self.reader.consume(used);
        }
        if !any {
            return Ok(None);
        }
        self.number += 1;
        if ended && self.line.last() == Some(&b'\r') {
            self.line.pop();
        }
        Ok(Some(Line { number: self.number, bytes: &self.line, ended, too_long }))
    }
}

fn memchr(buffer: &[u8]) -> Option<usize> {
    buffer.iter().position(|&byte| byte == b'\n')
}
