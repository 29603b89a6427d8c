//! Text to token ids and back.
//!
//! A tokenizer is a folder: `tokenizer.json` in the format of the crate `tokenizers`, and
//! `tokenizer_config.json`, which says which ids play which [`Role`]. Two promises hold for every
//! tokenizer that [`Tokenizer::load`] accepts:
//!
//! - Text never becomes a reserved id. "[INS]" in a user's text is five characters of text; only
//!   templates put reserved ids into a sequence, and they splice ids, never strings.
//! - Every other id has exact bytes ([`Tokenizer::token_bytes`]), so a stream of ids is a stream of
//!   bytes and can be decoded piece by piece ([`Detokenizer`]).

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
};

use bpe::Bpe;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    data::rows::Dataset,
    protocol::{Failure, FailureCode},
    pulse,
};

mod bpe;
mod detokenizer;
mod import;
mod train;
mod words;

pub use detokenizer::Detokenizer;
pub use import::{MAX_FILE_BYTES, MAX_VOCABULARY, import};
pub use train::{MIN_VOCABULARY, SPARES, train};

const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
/// Version of [`CONFIG_FILE`].
const CONFIG_VERSION: u32 = 1;

/// What a reserved token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Fills a batch; never attended to, never a target.
    Pad,
    /// Ends a document and an answer.
    Eos,
    /// Begins a document.
    Bos,
    /// Frames an instruction.
    Ins,
    /// Stands for a hidden token (masked objectives).
    Mask,
    /// Begins a pair to be classified.
    Cls,
    /// Separates the parts of a pair.
    Sep,
    /// Stands for what the vocabulary cannot express.
    Unk,
}

impl Role {
    pub const ALL: [Role; 8] = [Role::Pad, Role::Eos, Role::Bos, Role::Ins, Role::Mask, Role::Cls, Role::Sep, Role::Unk];

    /// The token's name where this crate chooses it.
    pub fn token(self) -> &'static str {
        match self {
            Role::Pad => "[PAD]",
            Role::Eos => "[EOS]",
            Role::Bos => "[BOS]",
            Role::Ins => "[INS]",
            Role::Mask => "[MASK]",
            Role::Cls => "[CLS]",
            Role::Sep => "[SEP]",
            Role::Unk => "[UNK]",
        }
    }
}

/// The id of each role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roles {
    pub pad: u32,
    pub eos: u32,
    pub bos: u32,
    pub ins: u32,
    pub mask: u32,
    pub cls: u32,
    pub sep: u32,
    pub unk: u32,
}

impl Roles {
    fn from_ids(id: impl Fn(Role) -> u32) -> Roles {
        Roles {
            pad: id(Role::Pad),
            eos: id(Role::Eos),
            bos: id(Role::Bos),
            ins: id(Role::Ins),
            mask: id(Role::Mask),
            cls: id(Role::Cls),
            sep: id(Role::Sep),
            unk: id(Role::Unk),
        }
    }

    pub fn id(&self, role: Role) -> u32 {
        match role {
            Role::Pad => self.pad,
            Role::Eos => self.eos,
            Role::Bos => self.bos,
            Role::Ins => self.ins,
            Role::Mask => self.mask,
            Role::Cls => self.cls,
            Role::Sep => self.sep,
            Role::Unk => self.unk,
        }
    }
}

/// How the vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Alphabet {
    /// Every byte is one printable character (GPT-2).
    ByteLevel,
    /// Text is spelled as it is with `▁` for a space; other bytes are `<0xNN>` (SentencePiece).
    ByteFallback,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    version: u32,
    alphabet: Alphabet,
    /// Ids are 0 .. this.
    vocabulary: u32,
    roles: Roles,
    /// Every id that text never becomes: the roles, the spare ones and an upload's other special tokens.
    reserved: Vec<u32>,
    /// Roles that an uploaded tokenizer lacked.
    added_roles: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the tokenizer's folder cannot be read or written: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Invalid(String),
    #[error(
        "a vocabulary of {asked} was asked for, but this dataset has only enough repeated text for {possible}: ask for at most {possible}, or add text"
    )]
    VocabularyTooLarge { asked: i64, possible: i64 },
    #[error("a vocabulary of {asked} was asked for, but {MIN_VOCABULARY} is the least: 256 bytes and the reserved tokens")]
    VocabularyTooSmall { asked: i64 },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let (code, param, retryable) = match &error {
            Error::Io(io) if io.kind() == io::ErrorKind::StorageFull => (FailureCode::DiskFull, None, true),
            Error::Io(_) => (FailureCode::Internal, None, true),
            Error::Invalid(_) => (FailureCode::InvalidTokenizer, Some("file"), false),
            Error::VocabularyTooLarge { .. } => (FailureCode::VocabularyTooLarge, Some("vocab_size"), false),
            Error::VocabularyTooSmall { .. } => (FailureCode::InvalidTokenizer, Some("vocab_size"), false),
        };
        Failure { code, message: error.to_string(), param: param.map(str::to_owned), retryable }
    }
}

/// A loaded tokenizer. Immutable and shareable between threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Encodes in the library's place, where it can.
    bpe: Option<Bpe>,
    config: Config,
    sha256: String,
    /// Exact bytes by id; empty for reserved ids.
    bytes: Vec<Box<[u8]>>,
    /// By id.
    reserved: Vec<bool>,
    /// The id of each single byte, where the vocabulary has one.
    byte_ids: [Option<u32>; 256],
}

impl Tokenizer {
    /// What a tokenizer's folder holds, and a model's beside its weights.
    pub const FILES: [&str; 2] = [TOKENIZER_FILE, CONFIG_FILE];

    /// Reads a folder that [`train`] or [`import`] wrote.
    pub fn load(folder: &Path) -> Result<Tokenizer, Error> {
        let json = std::fs::read(folder.join(TOKENIZER_FILE))?;
        let config = std::fs::read(folder.join(CONFIG_FILE))?;
        let parsed: Config =
            serde_json::from_slice(&config).map_err(|error| Error::Invalid(format!("{CONFIG_FILE} cannot be read: {error}")))?;
        if parsed.version != CONFIG_VERSION {
            return Err(Error::Invalid(format!(
                "{CONFIG_FILE} has version {}, this program reads {CONFIG_VERSION}",
                parsed.version
            )));
        }
        let mut digest = Sha256::new();
        digest.update(&json);
        digest.update(&config);
        let mut inner = tokenizers::Tokenizer::from_bytes(&json)
            .map_err(|error| Error::Invalid(format!("{TOKENIZER_FILE} cannot be read: {error}")))?;
        // Special tokens in a text are text.
        inner.set_encode_special_tokens(true);
        Tokenizer::assemble(inner, Bpe::of(&json), parsed, hex::encode(digest.finalize()))
    }

    fn assemble(inner: tokenizers::Tokenizer, bpe: Option<Bpe>, config: Config, sha256: String) -> Result<Tokenizer, Error> {
        let size = config.vocabulary as usize;
        let mut reserved = vec![false; size];
        for id in config.reserved.iter().copied().chain(Role::ALL.map(|role| config.roles.id(role))) {
            *reserved
                .get_mut(id as usize)
                .ok_or_else(|| Error::Invalid(format!("the reserved id {id} is beyond the vocabulary of {size}")))? = true;
        }
        let added = inner.get_added_tokens_decoder();
        let characters = train::byte_level_characters();
        let mut bytes = vec![Box::<[u8]>::default(); size];
        let mut byte_ids = [None; 256];
        for (token, id) in inner.get_vocab(true) {
            let slot = bytes
                .get_mut(id as usize)
                .ok_or_else(|| Error::Invalid(format!("token {id} is beyond the vocabulary of {size}")))?;
            if reserved[id as usize] {
                continue;
            }
            *slot = match added.get(&id) {
                Some(added) => added.content.as_bytes().into(),
                None => exact_bytes(&token, config.alphabet, &characters).into(),
            };
            if let [byte] = slot[..] {
                byte_ids[byte as usize] = Some(id);
            }
        }
        Ok(Tokenizer { inner, bpe, config, sha256, bytes, reserved, byte_ids })
    }

    /// The ids of a text, without any reserved id (but UNK, where the vocabulary lacks a character).
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match &self.bpe {
            Some(bpe) => bpe.encode(text, |ids| self.only_text(&ids)),
            None => self.encode_by_library(text),
        }
    }

    fn encode_by_library(&self, text: &str) -> Vec<u32> {
        match self.inner.encode_fast(text, false) {
            Ok(encoding) => self.only_text(encoding.get_ids()),
            Err(error) => {
                tracing::warn!(%error, "the tokenizer failed on a text; its bytes are encoded one by one");
                self.encode_bytes(text.as_bytes())
            }
        }
    }

    /// [`Tokenizer::encode`] of many texts, in parallel.
    pub fn encode_batch(&self, texts: &[String]) -> Vec<Vec<u32>> {
        if self.bpe.is_some() {
            return texts.par_iter().map(|text| self.encode(text)).collect();
        }
        match self.inner.encode_batch_fast(texts.iter().map(String::as_str).collect(), false) {
            Ok(encodings) => encodings.iter().map(|encoding| self.only_text(encoding.get_ids())).collect(),
            Err(_) => texts.iter().map(|text| self.encode_by_library(text)).collect(),
        }
    }

    /// The second line of defence against reserved ids in a text: an uploaded vocabulary may reach
    /// one by merging. Such an id is replaced by the bytes of its name.
    fn only_text(&self, ids: &[u32]) -> Vec<u32> {
        let allowed = |id: u32| id == self.config.roles.unk || self.reserved.get(id as usize) == Some(&false);
        if ids.iter().all(|&id| allowed(id)) {
            return ids.to_vec();
        }
        let mut text = Vec::with_capacity(ids.len() + 8);
        for &id in ids {
            match allowed(id) {
                true => text.push(id),
                false => text.extend(self.encode_bytes(self.token_name(id).as_bytes())),
            }
        }
        text
    }

    fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        bytes.iter().map(|&byte| self.byte_ids[byte as usize].unwrap_or(self.config.roles.unk)).collect()
    }

    /// The text of ids. Reserved ids have none; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The exact bytes of one token; empty for reserved ids and ids beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |bytes| bytes)
    }

    /// How a token is shown by itself: its text, or a reserved token's name.
    pub fn token_name(&self, id: u32) -> String {
        match self.reserved.get(id as usize) {
            Some(false) => String::from_utf8_lossy(self.token_bytes(id)).into_owned(),
            _ => self.inner.id_to_token(id).unwrap_or_default(),
        }
    }

    /// Whether an id is one that text never becomes.
    pub fn is_reserved(&self, id: u32) -> bool {
        self.reserved.get(id as usize) == Some(&true)
    }

    /// Every reserved id, ascending.
    pub fn reserved(&self) -> Vec<u32> {
        (0..self.config.vocabulary).filter(|&id| self.is_reserved(id)).collect()
    }

    /// Ids are 0 .. this.
    pub fn vocabulary(&self) -> i64 {
        i64::from(self.config.vocabulary)
    }

    pub fn roles(&self) -> &Roles {
        &self.config.roles
    }

    /// Names of the roles that an uploaded tokenizer lacked and that were appended to it.
    pub fn added_roles(&self) -> &[String] {
        &self.config.added_roles
    }

    /// Whether every id of `base` is the same token here, so that weights over `base` mean the same.
    ///
    /// # Errors
    /// With the first id that is not.
    pub fn extends(&self, base: &Tokenizer) -> Result<(), String> {
        if self.sha256 == base.sha256 {
            return Ok(());
        }
        if self.vocabulary() < base.vocabulary() {
            return Err(format!("it has {} tokens, the base's has {}", self.vocabulary(), base.vocabulary()));
        }
        let differs = |id: &u32| {
            self.is_reserved(*id) != base.is_reserved(*id)
                || self.token_name(*id) != base.token_name(*id)
                || self.token_bytes(*id) != base.token_bytes(*id)
        };
        if let Some(id) = (0..base.config.vocabulary).find(differs) {
            return Err(format!("its token {id} is {:?}, the base's is {:?}", self.token_name(id), base.token_name(id)));
        }
        match Role::ALL.into_iter().find(|&role| self.config.roles.id(role) != base.config.roles.id(role)) {
            Some(role) => Err(format!("its {} is not the base's", role.token())),
            None => Ok(()),
        }
    }

    /// Over both files of the folder.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// The bytes that a token of the model's vocabulary stands for.
fn exact_bytes(token: &str, alphabet: Alphabet, characters: &HashMap<char, u8>) -> Vec<u8> {
    match alphabet {
        Alphabet::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(|character| characters.get(&character).copied()).collect();
            bytes.unwrap_or_else(|| token.as_bytes().to_vec())
        }
        Alphabet::ByteFallback => {
            let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|digits| digits.len() == 2);
            match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            }
        }
    }
}

/// Writes the two files of a tokenizer's folder, the configuration last, and loads it back.
fn write(folder: &Path, json: &[u8], config: &Config) -> Result<Tokenizer, Error> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join(TOKENIZER_FILE), json)?;
    let config = serde_json::to_vec_pretty(config).map_err(io::Error::from)?;
    std::fs::write(folder.join(CONFIG_FILE), config)?;
    Tokenizer::load(folder)
}

/// Rows are encoded this many at a time.
const BATCH_ROWS: u64 = 1024;

/// Tokens of a dataset's documents (see [`crate::data::rows::Row::document`]) and the percentiles of
/// their lengths: `{"tokens", "length": {"p50", "p90", "p99", "max"}}`.
pub fn statistics(dataset: &Path, tokenizer: &Tokenizer) -> Result<serde_json::Value, Error> {
    let mut dataset = Dataset::open(dataset)?;
    let mut lengths: BTreeMap<u64, u64> = BTreeMap::new();
    let (mut first, rows) = (0, dataset.manifest.rows);
    while first < rows {
        pulse::beat();
        let documents: Vec<String> = dataset.slice(first, BATCH_ROWS)?.iter().map(|row| row.document()).collect();
        for ids in tokenizer.encode_batch(&documents) {
            *lengths.entry(ids.len() as u64).or_default() += 1;
        }
        first += BATCH_ROWS;
    }
    let percentile = |share: f64| {
        let rank = ((rows as f64 * share).ceil() as u64).max(1);
        let mut below = 0;
        let found = lengths.iter().find(|&(_, count)| {
            below += count;
            below >= rank
        });
        found.map_or(0, |(&length, _)| length)
    };
    let tokens: u64 = lengths.iter().map(|(length, count)| length * count).sum();
    Ok(serde_json::json!({
        "tokens": tokens,
        "length": { "p50": percentile(0.5), "p90": percentile(0.9), "p99": percentile(0.99), "max": percentile(1.0) },
    }))
}

#[cfg(test)]
mod tests;
