//! Token shards: a dataset under a tokenizer (and a template), as numbers on disk.
//!
//! A shard folder is named by the SHA-256 of what it was made from, so it is found again by every
//! later job with the same inputs. It holds `tokens.bin` (little-endian u16, or u32 where the
//! vocabulary needs it), `documents.bin` (u64 token offsets of every document and of the end),
//! `hashes.bin` (a u64 of each document's content), for tuning `supervised.bin` (one byte a token),
//! and `manifest.json`. The folder appears by one rename and never changes afterwards.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    config::Method,
    data::rows::{Dataset, Row},
    failure,
    protocol::{Failure, FailureCode},
    pulse, template,
    tokenizer::Tokenizer,
};

const FORMAT: u32 = 1;
const ROWS_AT_ONCE: u64 = 4096;

/// What a shard is made from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub dataset: &'a Path,
    pub dataset_sha256: &'a str,
    pub tokenizer: &'a Tokenizer,
    pub tokenizer_sha256: &'a str,
    pub method: &'a Method,
    pub context: u64,
    pub threads: usize,
}

impl Source<'_> {
    /// The name of the shard's folder.
    pub fn sha256(&self) -> String {
        let method = match self.method {
            Method::Pretrain { .. } => "documents".to_owned(),
            // Whether a conversation fits is checked while the shard is made.
            Method::Instruction { template } => format!("{}/{}", template.sha256(), self.context),
        };
        let text = format!("{FORMAT}\n{}\n{}\n{method}", self.dataset_sha256, self.tokenizer_sha256);
        hex::encode(Sha256::digest(text))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub documents: u64,
    pub tokens: u64,
    /// Tokens that are targets.
    pub supervised: u64,
    /// 2 or 4.
    pub bytes_per_token: usize,
}

/// A mapped shard.
#[derive(Debug)]
pub struct Shard {
    pub manifest: Manifest,
    tokens: Mmap,
    documents: Mmap,
    hashes: Mmap,
    /// Absent where every token after the first of its document is a target.
    supervised: Option<Mmap>,
}

impl Shard {
    /// Finds the shard under `cache` or makes it. Two makers at once both succeed. Whoever keeps the cache
    /// small removes whole folders, and first those that were changed longest ago.
    ///
    /// # Errors
    /// `context_too_short` names the first conversation that does not fit.
    pub fn prepare(cache: &Path, source: Source) -> Result<Shard, Failure> {
        let folder = cache.join(source.sha256());
        Shard::make_if_missing(cache, &folder, source)?;
        match Shard::open(&folder) {
            // Removed between the two.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Shard::make_if_missing(cache, &folder, source)?;
                Shard::open(&folder).map_err(failure::io)
            }
            opened => opened.map_err(failure::io),
        }
    }

    fn make_if_missing(cache: &Path, folder: &Path, source: Source) -> Result<(), Failure> {
        if folder.join("manifest.json").exists() {
            // Used again. Where it cannot be said, the shard is made again one day.
            let _ = File::open(folder).and_then(|folder| folder.set_modified(std::time::SystemTime::now()));
            return Ok(());
        }
        std::fs::create_dir_all(cache).map_err(failure::io)?;
        remove_abandoned(cache);
        let staged = cache.join(format!("{}.{}.tmp", source.sha256(), std::process::id()));
        let made = stage(&staged, source);
        if made.is_ok() && !folder.exists() {
            // Losing a race leaves the winner's equal folder in place.
            let renamed = std::fs::rename(&staged, folder);
            if !folder.join("manifest.json").exists() {
                renamed.map_err(failure::io)?;
            }
        }
        let _ = std::fs::remove_dir_all(&staged);
        made
    }

    fn open(folder: &Path) -> io::Result<Shard> {
        let map = |name: &str| {
            let file = File::open(folder.join(name))?;
            // SAFETY: shards are immutable once their folder has its name, and no process truncates them.
            unsafe { Mmap::map(&file) }
        };
        let manifest: Manifest = serde_json::from_slice(&std::fs::read(folder.join("manifest.json"))?)?;
        let supervised = folder.join("supervised.bin").exists().then(|| map("supervised.bin")).transpose()?;
        Ok(Shard {
            manifest,
            tokens: map("tokens.bin")?,
            documents: map("documents.bin")?,
            hashes: map("hashes.bin")?,
            supervised,
        })
    }

    pub fn token(&self, index: u64) -> i64 {
        let index = index as usize;
        match self.manifest.bytes_per_token {
            2 => i64::from(u16::from_le_bytes([self.tokens[index * 2], self.tokens[index * 2 + 1]])),
            _ => i64::from(u32::from_le_bytes(std::array::from_fn(|byte| self.tokens[index * 4 + byte]))),
        }
    }

    pub fn is_supervised(&self, index: u64) -> bool {
        self.supervised.as_ref().is_none_or(|mask| mask[index as usize] != 0)
    }

    /// The tokens of a document.
    pub fn document(&self, index: u64) -> Range<u64> {
        u64_at(&self.documents, index)..u64_at(&self.documents, index + 1)
    }

    /// Equal for equal content.
    pub fn content_hash(&self, document: u64) -> u64 {
        u64_at(&self.hashes, document)
    }
}

/// A folder that is being made is locked by its maker, so that one whose maker died can be told.
fn stage(folder: &Path, source: Source) -> Result<(), Failure> {
    std::fs::create_dir_all(folder).map_err(failure::io)?;
    let lock = File::open(folder).map_err(failure::io)?;
    lock.lock().map_err(failure::io)?;
    make(folder, source)
}

/// A maker takes its lock at once; within this time a folder is nobody's business.
const YOUNG: Duration = Duration::from_secs(60);

/// Removes what makers left that were killed. Nothing depends on it: what cannot be removed stays.
fn remove_abandoned(cache: &Path) {
    let Ok(entries) = std::fs::read_dir(cache) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "tmp")) {
        let modified = path.metadata().and_then(|metadata| metadata.modified());
        let is_old = modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > YOUNG));
        if is_old && File::open(&path).is_ok_and(|folder| folder.try_lock().is_ok()) {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}

fn u64_at(map: &Mmap, index: u64) -> u64 {
    let start = index as usize * 8;
    u64::from_le_bytes(std::array::from_fn(|byte| map[start + byte]))
}

/// A row's tokens and, for tuning, which of them are targets.
struct Encoded {
    ids: Vec<u32>,
    supervised: Vec<Range<usize>>,
    hash: u64,
}

fn make(folder: &Path, source: Source) -> Result<(), Failure> {
    let mut dataset = Dataset::open(source.dataset).map_err(failure::io)?;
    let tuning = matches!(source.method, Method::Instruction { .. });
    let mut writer = Writer::create(folder, source.tokenizer.vocabulary(), tuning).map_err(failure::io)?;
    let mut first = 0;
    loop {
        pulse::beat();
        let rows = dataset.slice(first, ROWS_AT_ONCE).map_err(failure::io)?;
        if rows.is_empty() {
            return writer.finish().map_err(failure::io);
        }
        for (offset, encoded) in encode(source, &rows).into_iter().enumerate() {
            let inputs = encoded.ids.len().saturating_sub(1) as u64;
            if tuning && inputs > source.context {
                return Err(too_long(first + offset as u64, inputs, source.context));
            }
            writer.push(&encoded).map_err(failure::io)?;
        }
        first += rows.len() as u64;
    }
}

fn too_long(row: u64, length: u64, context: u64) -> Failure {
    let message = format!(
        "row {} of the dataset is {length} tokens long in the template, but the model's context is {context}: shorten the row, or train a model with a context of at least {length}",
        row + 1
    );
    Failure { param: Some("model.context".into()), ..failure::new(FailureCode::ContextTooShort, message) }
}

/// Rows encoded over threads, in their order.
fn encode(source: Source, rows: &[Row]) -> Vec<Encoded> {
    let share = rows.len().div_ceil(source.threads.max(1)).max(1);
    let run = |rows: &[Row]| rows.iter().map(|row| encode_row(source, row)).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        let workers: Vec<_> = rows.chunks(share).map(|rows| scope.spawn(move || run(rows))).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("encoding does not panic")).collect()
    })
}

fn encode_row(source: Source, row: &Row) -> Encoded {
    let content = serde_json::to_vec(row).expect("rows serialise");
    let digest = Sha256::digest(content);
    let hash = u64::from_le_bytes(std::array::from_fn(|byte| digest[byte]));
    match source.method {
        Method::Pretrain { .. } => {
            let mut ids = source.tokenizer.encode(&row.document());
            ids.push(source.tokenizer.roles().eos);
            Encoded { ids, supervised: Vec::new(), hash }
        }
        Method::Instruction { .. } => {
            let rendered = template::render(source.tokenizer, row);
            Encoded { ids: rendered.ids, supervised: rendered.supervised, hash }
        }
    }
}

struct Writer {
    folder: PathBuf,
    tokens: BufWriter<File>,
    documents: BufWriter<File>,
    hashes: BufWriter<File>,
    supervised: Option<BufWriter<File>>,
    manifest: Manifest,
}

impl Writer {
    fn create(folder: &Path, vocabulary: i64, tuning: bool) -> io::Result<Writer> {
        let create = |name: &str| File::create(folder.join(name)).map(|file| BufWriter::with_capacity(1 << 18, file));
        let bytes_per_token = if vocabulary <= 1 << 16 { 2 } else { 4 };
        Ok(Writer {
            folder: folder.to_owned(),
            tokens: create("tokens.bin")?,
            documents: create("documents.bin")?,
            hashes: create("hashes.bin")?,
            supervised: tuning.then(|| create("supervised.bin")).transpose()?,
            manifest: Manifest { format: FORMAT, documents: 0, tokens: 0, supervised: 0, bytes_per_token },
        })
    }

    fn push(&mut self, encoded: &Encoded) -> io::Result<()> {
        self.documents.write_all(&self.manifest.tokens.to_le_bytes())?;
        self.hashes.write_all(&encoded.hash.to_le_bytes())?;
        for id in &encoded.ids {
            self.tokens.write_all(&id.to_le_bytes()[..self.manifest.bytes_per_token])?;
        }
        self.manifest.documents += 1;
        self.manifest.tokens += encoded.ids.len() as u64;
        let Some(supervised) = &mut self.supervised else {
            self.manifest.supervised += encoded.ids.len().saturating_sub(1) as u64;
            return Ok(());
        };
        let mut mask = vec![0u8; encoded.ids.len()];
        encoded.supervised.iter().for_each(|span| mask[span.clone()].fill(1));
        self.manifest.supervised += mask.iter().map(|&bit| u64::from(bit)).sum::<u64>();
        supervised.write_all(&mask)
    }

    fn finish(mut self) -> io::Result<()> {
        self.documents.write_all(&self.manifest.tokens.to_le_bytes())?;
        let files = [&mut self.tokens, &mut self.documents, &mut self.hashes];
        for file in files.into_iter().chain(self.supervised.as_mut()) {
            file.flush()?;
            file.get_ref().sync_all()?;
        }
        let mut file = File::create(self.folder.join("manifest.json"))?;
        serde_json::to_writer_pretty(&mut file, &self.manifest)?;
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_maker_left_is_removed() {
        let cache = tempfile::tempdir().unwrap();
        let folder = |name: &str, age: Duration| {
            let path = cache.path().join(name);
            std::fs::create_dir(&path).unwrap();
            let folder = File::open(path).unwrap();
            folder.set_modified(std::time::SystemTime::now() - age).unwrap();
            folder
        };
        folder("dead.1.tmp", YOUNG * 2);
        folder("young.2.tmp", Duration::ZERO);
        folder("whole", YOUNG * 2);
        let held = folder("made.3.tmp", YOUNG * 2);
        held.lock().unwrap();
        remove_abandoned(cache.path());
        let mut left: Vec<_> = std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["made.3.tmp", "whole", "young.2.tmp"]);
    }
}
