//! A dataset on disk: what ingestion writes and everything else reads.
//!
//! A folder with `rows.jsonl` (one [`Row`] a line), `rows.idx` (little-endian u64 byte offsets of
//! every row and of the end) and `manifest.json`, written last. The folder is immutable once its
//! manifest is there.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// One document or one conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Row {
    Conversation {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        system: Option<String>,
        turns: Vec<Turn>,
    },
    Text {
        text: String,
    },
}

/// An instruction (with an input, if there is one) and its output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    pub instruction: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub input: String,
    pub output: String,
}

impl Row {
    /// The row as a document, which is what pretraining and tokenizer training read: the parts of a
    /// conversation in their order, one a line.
    pub fn document(&self) -> String {
        match self {
            Row::Text { text } => text.clone(),
            Row::Conversation { system, turns } => {
                let parts = system.iter().chain(turns.iter().flat_map(|turn| [&turn.instruction, &turn.input, &turn.output]));
                parts.filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join("\n")
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    pub rows: u64,
    /// Rows that are conversations; the others are texts.
    pub conversations: u64,
    /// Rows that repeat an earlier one to the letter.
    pub duplicates: u64,
    pub bytes: u64,
    pub characters: u64,
    /// Of `rows.jsonl`.
    pub sha256: String,
}

/// Writes a dataset folder; nothing is a dataset before [`Writer::finish`].
pub struct Writer {
    folder: PathBuf,
    rows: BufWriter<File>,
    index: BufWriter<File>,
    digest: Sha256,
    hashes: Hashes,
    manifest: Manifest,
    offset: u64,
}

impl Writer {
    pub fn create(folder: &Path) -> io::Result<Writer> {
        std::fs::create_dir_all(folder)?;
        let manifest =
            Manifest { version: 1, rows: 0, conversations: 0, duplicates: 0, bytes: 0, characters: 0, sha256: String::new() };
        Ok(Writer {
            folder: folder.to_owned(),
            rows: BufWriter::with_capacity(1 << 20, File::create(folder.join("rows.jsonl"))?),
            index: BufWriter::new(File::create(folder.join("rows.idx"))?),
            digest: Sha256::new(),
            hashes: Hashes::create(folder)?,
            manifest,
            offset: 0,
        })
    }

    pub fn rows(&self) -> u64 {
        self.manifest.rows
    }

    /// Bytes of `rows.jsonl` so far.
    pub fn bytes_written(&self) -> u64 {
        self.offset
    }

    pub fn push(&mut self, row: &Row) -> io::Result<()> {
        let mut line = serde_json::to_vec(row)?;
        self.hashes.push(&line)?;
        line.push(b'\n');
        self.index.write_all(&self.offset.to_le_bytes())?;
        self.rows.write_all(&line)?;
        self.digest.update(&line);
        self.offset += line.len() as u64;
        self.manifest.rows += 1;
        match row {
            Row::Conversation { system, turns } => {
                self.manifest.conversations += 1;
                let parts = system.iter().chain(turns.iter().flat_map(|turn| [&turn.instruction, &turn.input, &turn.output]));
                for part in parts {
                    self.count(part);
                }
            }
            Row::Text { text } => self.count(text),
        }
        Ok(())
    }

    fn count(&mut self, text: &str) {
        self.manifest.bytes += text.len() as u64;
        self.manifest.characters += text.chars().count() as u64;
    }

    pub fn finish(mut self) -> io::Result<Manifest> {
        self.index.write_all(&self.offset.to_le_bytes())?;
        for file in [&mut self.rows, &mut self.index] {
            file.flush()?;
            file.get_ref().sync_all()?;
        }
        self.manifest.sha256 = hex::encode(self.digest.finalize());
        self.manifest.duplicates = self.hashes.duplicates()?;
        let staged = self.folder.join("manifest.json.tmp");
        let mut file = File::create(&staged)?;
        serde_json::to_writer_pretty(&mut file, &self.manifest)?;
        file.sync_all()?;
        std::fs::rename(staged, self.folder.join("manifest.json"))?;
        Ok(self.manifest)
    }
}

const HASH_BYTES: usize = 16;

/// Hashes that are held in memory at once to find the repeated ones.
const HASHES_AT_ONCE: u64 = 4 << 20;

/// The rows' hashes, in a file without a name, so that memory does not grow with the rows.
struct Hashes {
    file: BufWriter<File>,
    count: u64,
}

impl Hashes {
    fn create(folder: &Path) -> io::Result<Hashes> {
        let path = folder.join("hashes.tmp");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        std::fs::remove_file(path)?;
        Ok(Hashes { file: BufWriter::with_capacity(1 << 16, file), count: 0 })
    }

    fn push(&mut self, line: &[u8]) -> io::Result<()> {
        self.count += 1;
        self.file.write_all(&Sha256::digest(line)[..HASH_BYTES])
    }

    /// Hashes that stood there before. Reads the file once for every few million rows and looks at
    /// another part of all possible hashes each time.
    fn duplicates(self) -> io::Result<u64> {
        self.count_duplicates(HASHES_AT_ONCE)
    }

    fn count_duplicates(self, at_once: u64) -> io::Result<u64> {
        let parts = self.count.div_ceil(at_once.max(1));
        let mut file = self.file.into_inner()?;
        let mut duplicates = 0;
        for part in 0..parts {
            file.seek(SeekFrom::Start(0))?;
            let mut reader = BufReader::with_capacity(1 << 18, &mut file);
            let mut seen = std::collections::HashSet::new();
            for _ in 0..self.count {
                let mut hash = [0; HASH_BYTES];
                reader.read_exact(&mut hash)?;
                let hash = u128::from_le_bytes(hash);
                if (hash % u128::from(parts)) as u64 == part && !seen.insert(hash) {
                    duplicates += 1;
                }
            }
        }
        Ok(duplicates)
    }
}

/// Reads a dataset folder, in order or at any row.
pub struct Dataset {
    pub manifest: Manifest,
    rows: BufReader<File>,
    index: File,
}

impl Dataset {
    pub fn open(folder: &Path) -> io::Result<Dataset> {
        Ok(Dataset {
            manifest: serde_json::from_slice(&std::fs::read(folder.join("manifest.json"))?)?,
            rows: BufReader::with_capacity(1 << 18, File::open(folder.join("rows.jsonl"))?),
            index: File::open(folder.join("rows.idx"))?,
        })
    }

    /// Rows `first .. first + limit`, fewer at the end.
    pub fn slice(&mut self, first: u64, limit: u64) -> io::Result<Vec<Row>> {
        let last = (first + limit).min(self.manifest.rows);
        if first >= last {
            return Ok(Vec::new());
        }
        let mut offsets = [0u8; 8];
        self.index.seek(SeekFrom::Start(first * 8))?;
        self.index.read_exact(&mut offsets)?;
        self.rows.seek(SeekFrom::Start(u64::from_le_bytes(offsets)))?;
        (first..last).map(|_| self.next_row()).collect()
    }

    /// Every row in order.
    pub fn iter(&mut self) -> io::Result<impl Iterator<Item = io::Result<Row>> + '_> {
        self.rows.seek(SeekFrom::Start(0))?;
        Ok((0..self.manifest.rows).map(move |_| self.next_row()))
    }

    fn next_row(&mut self) -> io::Result<Row> {
        let mut line = Vec::new();
        io::BufRead::read_until(&mut self.rows, b'\n', &mut line)?;
        Ok(serde_json::from_slice(&line)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_counted_the_same_in_parts_of_any_size() {
        for at_once in [1, 3, 7, 1000] {
            let folder = tempfile::tempdir().unwrap();
            let mut hashes = Hashes::create(folder.path()).unwrap();
            // 0 to 9, then 0 to 4, then 0: six stood there before.
            (0..10).chain(0..5).chain(0..1).for_each(|row: u8| hashes.push(&[row]).unwrap());
            assert_eq!(hashes.count_duplicates(at_once).unwrap(), 6);
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Hashes::create(folder.path()).unwrap().duplicates().unwrap(), 0);
    }
}
