//! Byte-level BPE, faster than the library's: for tokenizers such as [`super::train`] makes and GPT-2's.
//!
//! Words are cut by hand ([`Words`]) and merged over ids of bytes (Sennrich et al., arXiv 1508.07909): the pair that was learned first is
//! merged first, of equals the leftmost. Text repeats its words, so their ids are remembered, in a bounded cache for each thread. What a
//! tokenizer does otherwise is left to the library, and a test compares the two on all kinds of text.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    sync::{Mutex, PoisonError},
};

use ahash::RandomState;
use serde::Deserialize;
use serde_json::Value;

use super::{train::byte_level_characters, words::Words};

/// Words of more bytes are not remembered.
const REMEMBERED_BYTES: usize = 64;
/// Words that a cache holds; a full one begins anew.
const REMEMBERED_WORDS: usize = 1 << 16;
/// Up to so many symbols the best pair is looked for in all of them; beyond, in a heap.
const SHORT: usize = 48;

/// What is read of `tokenizer.json`.
#[derive(Deserialize)]
struct Document {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    truncation: Value,
    padding: Value,
    added_tokens: Vec<AddedToken>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    r#type: Option<String>,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    unk_token: Value,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// Separated by a blank.
    Line(String),
}

/// Two neighbours and what becomes of them.
#[derive(Clone, Copy)]
struct Merged {
    rank: u32,
    id: u32,
}

pub struct Bpe {
    /// The id of each byte that occurs in UTF-8.
    bytes: [u32; 256],
    merges: HashMap<(u32, u32), Merged, RandomState>,
    digits_apart: bool,
    caches: Mutex<Vec<Cache>>,
}

impl Bpe {
    /// `None`: the tokenizer does something that only the library does.
    pub fn of(json: &[u8]) -> Option<Bpe> {
        let document: Document = serde_json::from_slice(json).ok()?;
        let model = document.model;
        let plain = [&document.normalizer, &document.post_processor, &document.truncation, &document.padding, &model.dropout]
            .iter()
            .all(|value| value.is_null());
        let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if !plain
            || model.r#type.is_some_and(|kind| kind != "BPE")
            || !model.unk_token.is_null()
            || affixes.iter().any(|affix| affix.as_ref().is_some_and(|affix| !affix.is_empty()))
            || model.byte_fallback
            || model.ignore_merges
            // Others are found in the text before it is cut.
            || document.added_tokens.iter().any(|token| !token.special)
        {
            return None;
        }
        let digits_apart = digits_apart(&document.pre_tokenizer)?;
        let mut bytes = [u32::MAX; 256];
        for (character, byte) in byte_level_characters() {
            match model.vocab.get(character.encode_utf8(&mut [0; 4]) as &str) {
                Some(&id) => bytes[usize::from(byte)] = id,
                None if matches!(byte, 0xC0 | 0xC1 | 0xF5..) => {}
                None => return None,
            }
        }
        let mut merges = HashMap::with_capacity_and_hasher(model.merges.len(), RandomState::new());
        for (rank, merge) in (0..).zip(&model.merges) {
            let (left, right) = match merge {
                Merge::Pair(left, right) => (left.as_str(), right.as_str()),
                Merge::Line(line) => line.split_once(' ')?,
            };
            let id = |token: &str| model.vocab.get(token).copied();
            let merged = Merged { rank, id: id(&[left, right].concat())? };
            merges.insert((id(left)?, id(right)?), merged);
        }
        Some(Bpe { bytes, merges, digits_apart, caches: Mutex::default() })
    }

    /// The ids of a text; `each` sees those of every word that is met for the first time, and may change them.
    pub fn encode(&self, text: &str, each: impl Fn(Vec<u32>) -> Vec<u32>) -> Vec<u32> {
        let mut cache = self.caches.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        for word in Words::of(text, self.digits_apart) {
            cache.extend(&mut ids, word, || each(self.merged(word.as_bytes())));
        }
        self.caches.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
        ids
    }

    fn merged(&self, word: &[u8]) -> Vec<u32> {
        let mut symbols: Vec<u32> = word.iter().map(|&byte| self.bytes[usize::from(byte)]).collect();
        if symbols.len() > SHORT {
            return self.merged_by_heap(&symbols);
        }
        while let Some((at, merged)) = self.best(&symbols) {
            symbols[at] = merged.id;
            symbols.remove(at + 1);
        }
        symbols
    }

    fn best(&self, symbols: &[u32]) -> Option<(usize, Merged)> {
        let pairs = symbols.windows(2).enumerate();
        let found = pairs.filter_map(|(at, pair)| Some((at, *self.merges.get(&(pair[0], pair[1]))?)));
        // The first of equals.
        found.min_by_key(|(_, merged)| merged.rank)
    }

    /// The same in time that grows little faster than the word.
    fn merged_by_heap(&self, word: &[u32]) -> Vec<u32> {
        const GONE: u32 = u32::MAX;
        let mut symbols = word.to_vec();
        let mut next: Vec<usize> = (1..=word.len()).collect();
        let mut before: Vec<Option<usize>> = (0..word.len()).map(|at| at.checked_sub(1)).collect();
        let pair = |symbols: &[u32], left: usize, right: usize| {
            let merged = self.merges.get(&(*symbols.get(left)?, *symbols.get(right)?))?;
            Some(Reverse((merged.rank, left, symbols[left], symbols[right])))
        };
        let mut waiting: BinaryHeap<_> = (0..word.len()).filter_map(|left| pair(&symbols, left, left + 1)).collect();
        while let Some(Reverse((_, left, was_left, was_right))) = waiting.pop() {
            let right = next[left];
            // One of the two has been merged since.
            if symbols[left] != was_left || symbols.get(right) != Some(&was_right) {
                continue;
            }
            let Some(merged) = self.merges.get(&(was_left, was_right)) else { continue };
            symbols[left] = merged.id;
            symbols[right] = GONE;
            next[left] = next[right];
            if let Some(follower) = before.get_mut(next[left]) {
                *follower = Some(left);
            }
            waiting.extend(pair(&symbols, left, next[left]));
            waiting.extend(before[left].and_then(|earlier| pair(&symbols, earlier, left)));
        }
        symbols.retain(|&symbol| symbol != GONE);
        symbols
    }
}

/// Whether numbers are cut off before GPT-2's pattern; `None` for any other way to cut.
fn digits_apart(pre_tokenizer: &Value) -> Option<bool> {
    let is_byte_level = |value: &Value| {
        value["type"] == "ByteLevel" && value["add_prefix_space"] == false && value["use_regex"].as_bool().unwrap_or(true)
    };
    let is_digits = |value: &Value| value["type"] == "Digits" && value["individual_digits"] == true;
    match pre_tokenizer["type"].as_str()? {
        "ByteLevel" => is_byte_level(pre_tokenizer).then_some(false),
        "Sequence" => match pre_tokenizer["pretokenizers"].as_array()?.as_slice() {
            [digits, bytes] if is_digits(digits) && is_byte_level(bytes) => Some(true),
            [bytes] if is_byte_level(bytes) => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// Words and their ids, which lie one after the other.
#[derive(Default)]
struct Cache {
    words: HashMap<Box<[u8]>, (u32, u32), RandomState>,
    ids: Vec<u32>,
}

impl Cache {
    fn extend(&mut self, into: &mut Vec<u32>, word: &str, compute: impl FnOnce() -> Vec<u32>) {
        if let Some(&(first, last)) = self.words.get(word.as_bytes()) {
            into.extend_from_slice(&self.ids[first as usize..last as usize]);
            return;
        }
        let ids = compute();
        into.extend_from_slice(&ids);
        if word.len() > REMEMBERED_BYTES {
            return;
        }
        if self.words.len() == REMEMBERED_WORDS {
            self.words.clear();
            self.ids.clear();
        }
        let first = self.ids.len() as u32;
        self.ids.extend(ids);
        self.words.insert(word.as_bytes().into(), (first, self.ids.len() as u32));
    }
}

#[cfg(test)]
mod tests;
