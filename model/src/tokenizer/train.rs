//! Byte-level BPE, trained on a dataset.
//!
//! Ids: the eight roles, eight spare ids, the 256 bytes, then merges by falling frequency (Sennrich
//! et al., arXiv 1508.07909, over bytes as in GPT-2). Digits stand apart, one token each, so that
//! numbers are spelled the same wherever they occur. No normaliser and no prefix space: what is
//! decoded is what was encoded, to the byte. The same rows give the same file.

use std::{collections::HashMap, io, path::Path};

use tokenizers::{
    AddedToken, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer as Inner, Trainer,
    models::bpe::{BPE, BpeTrainer},
    pre_tokenizers::{PreTokenizerWrapper, byte_level::ByteLevel, digits::Digits, sequence::Sequence},
};

use super::{Alphabet, CONFIG_VERSION, Config, Error, Role, Roles, Tokenizer, write};
use crate::{data::rows::Dataset, pulse};

/// Ids reserved without a role, for what a later template may need.
pub const SPARES: usize = 8;

/// The smallest vocabulary: reserved ids and the bytes.
pub const MIN_VOCABULARY: i64 = (Role::ALL.len() + SPARES + 256) as i64;

/// Merges are learned from at most this many bytes of text, taken evenly from the whole dataset.
const TRAINING_BYTES: u64 = 1 << 30;

/// Words longer than this teach no merges: their cost grows with the square of their length.
const MAX_WORD_CHARACTERS: usize = 256;

/// A pair that stands only once is no repetition.
const MIN_FREQUENCY: u64 = 2;

/// Trains on the rows of the dataset's folder and writes the tokenizer's folder.
pub fn train(dataset: &Path, vocabulary: i64, output: &Path) -> Result<Tokenizer, Error> {
    if vocabulary < MIN_VOCABULARY {
        return Err(Error::VocabularyTooSmall { asked: vocabulary });
    }
    let reserved: Vec<AddedToken> = Role::ALL
        .iter()
        .map(|role| role.token().to_owned())
        .chain((0..SPARES).map(|index| format!("[SPARE{index}]")))
        .map(|name| AddedToken::from(name, true))
        .collect();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(usize::try_from(vocabulary).unwrap_or(usize::MAX))
        .min_frequency(MIN_FREQUENCY)
        .special_tokens(reserved.clone())
        .initial_alphabet(byte_level_characters().into_keys().collect())
        .show_progress(false)
        .build();
    let pre_tokenizer = pre_tokenizer();
    feed(&mut trainer, dataset, &pre_tokenizer)?;
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(|error| Error::Invalid(format!("the tokenizer could not be trained: {error}")))?;

    let mut inner = Inner::new(model);
    inner.with_pre_tokenizer(Some(pre_tokenizer));
    inner.with_decoder(Some(ByteLevel::new(false, false, true)));
    inner.add_special_tokens(reserved.clone()).map_err(|error| Error::Invalid(error.to_string()))?;
    let possible = inner.get_vocab_size(true) as i64;
    if possible < vocabulary {
        return Err(Error::VocabularyTooLarge { asked: vocabulary, possible });
    }
    let config = Config {
        version: CONFIG_VERSION,
        alphabet: Alphabet::ByteLevel,
        vocabulary: possible as u32,
        roles: Roles::from_ids(|role| role as u32),
        reserved: (0..reserved.len() as u32).collect(),
        added_roles: Vec::new(),
    };
    let json = inner.to_string(false).map_err(|error| Error::Invalid(error.to_string()))?;
    write(output, json.as_bytes(), &config)
}

/// Digits apart, then GPT-2's words and its spelling of bytes.
fn pre_tokenizer() -> PreTokenizerWrapper {
    let digits = PreTokenizerWrapper::Digits(Digits::new(true));
    let bytes = PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true));
    PreTokenizerWrapper::Sequence(Sequence::new(vec![digits, bytes]))
}

/// Counts the words of the rows.
fn feed(trainer: &mut BpeTrainer, dataset: &Path, pre_tokenizer: &PreTokenizerWrapper) -> Result<(), Error> {
    let mut dataset = Dataset::open(dataset)?;
    let stride = dataset.manifest.bytes / TRAINING_BYTES + 1;
    let failed: std::sync::Mutex<Option<io::Error>> = Default::default();
    let documents = dataset.iter()?.step_by(stride as usize).map_while(|row| match row {
        Ok(row) => Some(row.document()),
        Err(error) => {
            *failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
            None
        }
    });
    let fed = trainer.feed(documents, |document| {
        pulse::beat();
        let mut text = PreTokenizedString::from(NormalizedString::from(document));
        pre_tokenizer.pre_tokenize(&mut text)?;
        let words = text.get_splits(OffsetReferential::Normalized, OffsetType::Byte).into_iter().map(|(word, _, _)| word);
        Ok(words.filter(|word| word.len() <= MAX_WORD_CHARACTERS * 2).map(str::to_owned).collect())
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        return Err(Error::Io(error));
    }
    fed.map_err(|error| Error::Invalid(format!("the tokenizer could not be trained: {error}")))
}

/// GPT-2's printable character of every byte: printable Latin-1 stands for itself, the other bytes
/// for the characters from U+0100 on.
pub(super) fn byte_level_characters() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=255u8)
        .filter_map(|byte| {
            let code = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
                _ => {
                    next += 1;
                    next - 1
                }
            };
            char::from_u32(code).map(|character| (character, byte))
        })
        .collect()
}
