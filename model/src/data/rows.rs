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
    seen: std::collections::HashSet<[u8; 16]>,
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
            seen: Default::default(),
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
        let hash: [u8; 16] = Sha256::digest(&line)[..16].try_into().expect("a digest has 32 bytes");
        if !self.seen.insert(hash) {
            self.manifest.duplicates += 1;
        }
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
        let staged = self.folder.join("manifest.json.tmp");
        let mut file = File::create(&staged)?;
        serde_json::to_writer_pretty(&mut file, &self.manifest)?;
        file.sync_all()?;
        std::fs::rename(staged, self.folder.join("manifest.json"))?;
        Ok(self.manifest)
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
