//! A Parquet file whose page headers are read before its pages.
//!
//! The decoder reserves what a header says that its page unfolds to, and room for as many values as a
//! dictionary's says that it has, up to many gigabytes, before it has seen a byte of either. Here each
//! header is read first (Thrift's compact protocol, of which only these two numbers count), and one that
//! asks for too much ends the file.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use parquet::{
    errors::{ParquetError, Result},
    file::reader::{ChunkReader, Length},
};

/// What a page may unfold to in any file; writers make pages of about a megabyte.
const PAGE_BYTES: u64 = 256 << 20;

/// What a value of a dictionary takes in memory besides its bytes.
const VALUE_BYTES: u64 = 32;

/// Longer headers, statistics included, are nobody's.
const HEADER_BYTES: u64 = 32 << 20;
const MAX_DEPTH: u32 = 16;

/// A header that asks for more than a page may take.
#[derive(Debug, thiserror::Error)]
#[error("a page of it asks for {bytes} bytes of memory, and may take {limit}")]
pub struct PageTooLarge {
    pub bytes: u64,
    pub limit: u64,
}

/// A file that the decoder reads. What is read at a position, once the metadata is known, is a page's header.
pub struct Pages {
    file: File,
    limit: u64,
    has_metadata: Arc<AtomicBool>,
}

impl Pages {
    /// No page may take more than `limit`, nor than [`PAGE_BYTES`]. The flag is to be raised once the file's
    /// metadata has been read.
    pub fn new(file: File, limit: u64) -> (Pages, Arc<AtomicBool>) {
        let has_metadata = Arc::<AtomicBool>::default();
        (Pages { file, limit: limit.min(PAGE_BYTES), has_metadata: has_metadata.clone() }, has_metadata)
    }
}

impl Length for Pages {
    fn len(&self) -> u64 {
        Length::len(&self.file)
    }
}

impl ChunkReader for Pages {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> Result<BufReader<File>> {
        if self.has_metadata.load(Ordering::Relaxed) {
            let header = Header::read(&mut self.file.get_read(start)?.take(HEADER_BYTES))
                .map_err(|error| ParquetError::General(format!("a page's header cannot be read: {error}")))?;
            let bytes = header.unfolded.max(header.values.saturating_mul(VALUE_BYTES));
            if bytes > self.limit {
                return Err(ParquetError::External(Box::new(PageTooLarge { bytes, limit: self.limit })));
            }
        }
        self.file.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        if length as u64 > Length::len(self) {
            return Err(ParquetError::EOF(format!("a page of {length} bytes is longer than the file")));
        }
        self.file.get_bytes(start, length)
    }
}

/// The numbers of a page's header; of one that is given twice, the larger.
#[derive(Debug, Default, PartialEq)]
struct Header {
    unfolded: u64,
    /// Of a dictionary.
    values: u64,
}

/// Fields by their ids in Parquet's `PageHeader` and `DictionaryPageHeader`.
const UNFOLDED: i64 = 2;
const DICTIONARY: i64 = 7;
const DICTIONARY_VALUES: i64 = 1;

/// Types of Thrift's compact protocol.
const STOP: u8 = 0;
const STRUCT: u8 = 12;

impl Header {
    fn read(from: &mut impl Read) -> io::Result<Header> {
        let mut header = Header::default();
        let mut id = 0;
        while let Some(kind) = next_field(from, &mut id)? {
            match (id, kind) {
                (UNFOLDED, 4..=6) => header.unfolded = header.unfolded.max(unsigned(zigzag(from)?)),
                (DICTIONARY, STRUCT) => {
                    let mut inner = 0;
                    while let Some(kind) = next_field(from, &mut inner)? {
                        match (inner, kind) {
                            (DICTIONARY_VALUES, 4..=6) => header.values = header.values.max(unsigned(zigzag(from)?)),
                            _ => skip(from, kind, MAX_DEPTH)?,
                        }
                    }
                }
                _ => skip(from, kind, MAX_DEPTH)?,
            }
        }
        Ok(header)
    }
}

/// A size below zero is the decoder's to refuse.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn byte(from: &mut impl Read) -> io::Result<u8> {
    let mut byte = [0];
    from.read_exact(&mut byte).map(|()| byte[0])
}

fn varint(from: &mut impl Read) -> io::Result<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let next = byte(from)?;
        value |= u64::from(next & 0x7f) << shift;
        if next < 0x80 {
            return Ok(value);
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

fn zigzag(from: &mut impl Read) -> io::Result<i64> {
    varint(from).map(|value| (value >> 1) as i64 ^ -((value & 1) as i64))
}

/// The type of a struct's next field, whose id becomes `id`; `None` at its end.
fn next_field(from: &mut impl Read, id: &mut i64) -> io::Result<Option<u8>> {
    let head = byte(from)?;
    if head == STOP {
        return Ok(None);
    }
    *id = match head >> 4 {
        0 => zigzag(from)?,
        delta => id.wrapping_add(i64::from(delta)),
    };
    Ok(Some(head & 15))
}

fn skip(from: &mut impl Read, kind: u8, depth: u32) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or(io::ErrorKind::InvalidData)?;
    match kind {
        // A field's truth is in its type.
        1 | 2 => Ok(()),
        3 => pass(from, 1),
        4..=6 => varint(from).map(drop),
        7 => pass(from, 8),
        8 => {
            let bytes = varint(from)?;
            pass(from, bytes)
        }
        9 | 10 => {
            let head = byte(from)?;
            let count = if head >> 4 == 15 { varint(from)? } else { u64::from(head >> 4) };
            (0..count).try_for_each(|_| skip_element(from, head & 15, depth))
        }
        11 => {
            let count = varint(from)?;
            let kinds = if count > 0 { byte(from)? } else { 0 };
            (0..count).try_for_each(|_| {
                skip_element(from, kinds >> 4, depth)?;
                skip_element(from, kinds & 15, depth)
            })
        }
        STRUCT => {
            let mut id = 0;
            while let Some(kind) = next_field(from, &mut id)? {
                skip(from, kind, depth)?;
            }
            Ok(())
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn pass(from: &mut impl Read, bytes: u64) -> io::Result<()> {
    match io::copy(&mut from.by_ref().take(bytes), &mut io::sink())? == bytes {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Within lists and maps a truth takes a byte.
fn skip_element(from: &mut impl Read, kind: u8, depth: u32) -> io::Result<()> {
    match kind {
        1 | 2 => byte(from).map(drop),
        _ => skip(from, kind, depth),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_found_among_all_else() {
        // Type 2 (a dictionary), unfolds to 300, takes 5; a checksum; then the dictionary: 40 values, PLAIN.
        let header = [0x15, 4, 0x15, 0xd8, 4, 0x15, 10, 0x15, 1, 0x3c, 0x15, 80, 0x15, 0, 0, 0];
        assert_eq!(Header::read(&mut &header[..]).unwrap(), Header { unfolded: 300, values: 40 });
        // A data page with statistics: two texts and a list.
        let header = [0x15, 0, 0x15, 8, 0x15, 8, 0x2c, 0x15, 2, 0x4c, 0x18, 2, b'a', b'b', 0x18, 0, 0x19, 0x25, 1, 3, 0, 0, 0];
        assert_eq!(Header::read(&mut &header[..]).unwrap(), Header { unfolded: 4, values: 0 });
        for end in 0..header.len() {
            assert!(Header::read(&mut &header[..end]).is_err(), "{end}");
        }
        let deep = [&[0x1c; 40][..], &[0; 41]].concat();
        assert!(Header::read(&mut &deep[..]).is_err());
    }
}
