//! A tokenizer that someone else trained: a `tokenizer.json`, checked and completed.
//!
//! Accepted are tokenizers that keep every byte of a text: byte-level ones (GPT-2, Llama 3, Qwen) and
//! those with byte fallback (Llama 2, Gemma). Roles are found by the usual names; the others are
//! appended to the vocabulary, and reported. Truncation, padding and post-processing are removed:
//! templates place special tokens here. Reads hostile input, so it is meant to run in a child.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
    path::Path,
};

use serde_json::{Value, json};
use tokenizers::Tokenizer as Inner;

use super::{Alphabet, CONFIG_VERSION, Config, Error, Role, Roles, Tokenizer, train::byte_level_characters, write};

/// The largest `tokenizer.json` that is read.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// The largest vocabulary that is accepted, and so the largest id.
pub const MAX_VOCABULARY: u32 = 1 << 20;

/// The names under which tokenizers in use have a role, the likeliest first.
fn usual_names(role: Role) -> &'static [&'static str] {
    match role {
        Role::Pad => &["[PAD]", "<pad>", "<|pad|>", "<|finetune_right_pad_id|>"],
        Role::Eos => &["[EOS]", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"],
        Role::Bos => &["[BOS]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"],
        Role::Ins => &["[INS]"],
        Role::Mask => &["[MASK]", "<mask>"],
        Role::Cls => &["[CLS]", "<cls>"],
        Role::Sep => &["[SEP]", "<sep>"],
        Role::Unk => &["[UNK]", "<unk>"],
    }
}

/// Checks an uploaded `tokenizer.json` and writes the tokenizer's folder.
pub fn import(file: &Path, output: &Path) -> Result<Tokenizer, Error> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(invalid(format!("the file is larger than {} MiB, the most that is read", MAX_FILE_BYTES >> 20)));
    }
    // The library panics on some of what it cannot read.
    std::panic::catch_unwind(|| checked(&bytes, output))
        .unwrap_or_else(|_| Err(invalid("the file is not a tokenizer.json that can be read".to_owned())))
}

fn checked(bytes: &[u8], output: &Path) -> Result<Tokenizer, Error> {
    let mut document: Value = serde_json::from_slice(bytes)
        .map_err(|error| invalid(format!("the file is not JSON: {error}; upload a tokenizer.json")))?;
    let alphabet = alphabet(&document)?;
    for key in ["truncation", "padding", "post_processor"] {
        document[key] = Value::Null;
    }
    let before = load(&document)?;
    check_bytes(&before, alphabet)?;
    let ids = ids_of(&before)?;
    let size = ids.len() as u32;
    let names: BTreeMap<Role, (String, u32, bool)> = roles(&ids, size);
    complete(&mut document, &names)?;

    let inner = load(&document)?;
    let vocabulary = ids_of(&inner)?.len() as u32;
    if let Some((name, id, _)) = names.values().find(|(name, id, _)| inner.token_to_id(name) != Some(*id)) {
        return Err(invalid(format!("the role {name:?} could not be added as {id}")));
    }
    let special = inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).map(|(id, _)| id);
    let config = Config {
        version: CONFIG_VERSION,
        alphabet,
        vocabulary,
        roles: Roles::from_ids(|role| names[&role].1),
        reserved: special.collect::<BTreeSet<u32>>().into_iter().collect(),
        added_roles: names.values().filter(|(_, _, added)| *added).map(|(name, _, _)| name.clone()).collect(),
    };
    let json = serde_json::to_vec(&document).map_err(|error| invalid(error.to_string()))?;
    let tokenizer = write(output, &json, &config)?;
    check_texts(&tokenizer)?;
    Ok(tokenizer)
}

fn invalid(message: String) -> Error {
    Error::Invalid(message)
}

fn load(document: &Value) -> Result<Inner, Error> {
    let bytes = serde_json::to_vec(document).map_err(|error| invalid(error.to_string()))?;
    Inner::from_bytes(bytes).map_err(|error| invalid(format!("the file is not a tokenizer.json that can be read: {error}")))
}

/// How the vocabulary spells bytes, from the decoder that undoes it.
fn alphabet(document: &Value) -> Result<Alphabet, Error> {
    fn mentions(value: &Value, kind: &str) -> bool {
        value["type"] == kind || value["decoders"].as_array().is_some_and(|parts| parts.iter().any(|part| mentions(part, kind)))
    }
    let decoder = &document["decoder"];
    if mentions(decoder, "ByteLevel") {
        Ok(Alphabet::ByteLevel)
    } else if mentions(decoder, "ByteFallback") {
        Ok(Alphabet::ByteFallback)
    } else {
        Err(invalid(format!(
            "the decoder is {}, which does not keep every byte of a text; upload a tokenizer whose decoder is ByteLevel or has ByteFallback",
            decoder["type"].as_str().map_or("absent".to_owned(), |kind| format!("{kind:?}"))
        )))
    }
}

/// Every token and its id: 0 .. the number of tokens, each id once.
fn ids_of(inner: &Inner) -> Result<BTreeMap<String, u32>, Error> {
    let ids: BTreeMap<String, u32> = inner.get_vocab(true).into_iter().collect();
    if ids.is_empty() {
        return Err(invalid("the vocabulary is empty".to_owned()));
    }
    if let Some((token, id)) = ids.iter().find(|&(_, &id)| id >= MAX_VOCABULARY) {
        return Err(invalid(format!("the token {token:?} has the id {id}; ids may go to {}", MAX_VOCABULARY - 1)));
    }
    let mut seen = BTreeSet::new();
    if let Some((token, id)) = ids.iter().find(|&(_, &id)| !seen.insert(id)) {
        return Err(invalid(format!("the id {id} belongs to {token:?} and to another token")));
    }
    if let Some(gap) = (0..).zip(&seen).find_map(|(expected, &id)| (expected != id).then_some(expected)) {
        return Err(invalid(format!(
            "no token has the id {gap}, though higher ids are used; number the tokens from 0 without a gap"
        )));
    }
    Ok(ids)
}

/// Name and id of each role, and whether it is new.
fn roles(ids: &BTreeMap<String, u32>, size: u32) -> BTreeMap<Role, (String, u32, bool)> {
    let mut next = size;
    let mut names = BTreeMap::new();
    for role in Role::ALL {
        let found = usual_names(role).iter().find_map(|&name| ids.get(name).map(|&id| (name.to_owned(), id, false)));
        let entry = found.unwrap_or_else(|| {
            next += 1;
            (role.token().to_owned(), next - 1, true)
        });
        names.insert(role, entry);
    }
    names
}

/// Makes every role a special token of the document, whatever it was before.
fn complete(document: &mut Value, names: &BTreeMap<Role, (String, u32, bool)>) -> Result<(), Error> {
    if document["added_tokens"].is_null() {
        document["added_tokens"] = json!([]);
    }
    let added = document["added_tokens"].as_array_mut().ok_or_else(|| invalid("added_tokens is not a list".to_owned()))?;
    for (name, id, _) in names.values() {
        added.retain(|token| token["content"] != name.as_str());
        added.push(json!({
            "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
        }));
    }
    added.sort_by_key(|token| token["id"].as_u64());
    Ok(())
}

/// Every byte that occurs in UTF-8 can be spelled, or something stands for what cannot.
fn check_bytes(inner: &Inner, alphabet: Alphabet) -> Result<(), Error> {
    let occurs = |byte: &u8| !matches!(byte, 0xC0 | 0xC1 | 0xF5..);
    let missing = match alphabet {
        Alphabet::ByteLevel => {
            let characters = byte_level_characters().into_iter().filter(|(_, byte)| occurs(byte));
            characters.filter(|(character, _)| inner.token_to_id(&character.to_string()).is_none()).count()
        }
        Alphabet::ByteFallback => {
            (0..=255u8).filter(occurs).filter(|byte| inner.token_to_id(&format!("<0x{byte:02X}>")).is_none()).count()
        }
    };
    if missing > 0 {
        return Err(invalid(format!(
            "{missing} of the bytes that occur in UTF-8 have no token, so text would be lost; train it with the whole byte alphabet"
        )));
    }
    Ok(())
}

/// Text of all kinds comes back from its tokens, but for a space that some put before it.
fn check_texts(tokenizer: &Tokenizer) -> Result<(), Error> {
    for text in ["Hello, World: a1b22  c\n\n\tend.", "wörld ÄÖ 你好 🙂", "[INS] <|endoftext|> </s>"] {
        let decoded = tokenizer.decode(&tokenizer.encode(text));
        if decoded.trim_start() != text {
            return Err(invalid(format!(
                "the text {text:?} comes back from its tokens as {decoded:?}: its normalizer and its pre_tokenizer must keep every character, as ByteLevel does"
            )));
        }
    }
    Ok(())
}
