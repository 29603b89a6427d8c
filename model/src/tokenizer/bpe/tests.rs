//! The encoder beside the library's, which it must equal.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::json;

use crate::{
    data::rows::{Row, Writer},
    tokenizer::{Tokenizer, import, train, train::byte_level_characters},
};

/// Words with something to merge in every script, and what stands between them.
const PIECES: [&str; 56] = [
    "the",
    " the",
    "The",
    "quick",
    " quick",
    "naïve",
    "straße",
    "Ärger",
    "слово",
    " слово",
    "λέξη",
    "語",
    "日本語",
    " 日本語",
    "한국어",
    "שלום",
    "سلام",
    "नमस्ते",
    "क्षि",
    "e\u{301}",
    "\u{301}",
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'",
    "''",
    "’s",
    " 's",
    "1",
    "12",
    " 2026",
    "½",
    "Ⅷ",
    "٣",
    "𑷠",
    "𝟗",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\u{a0}",
    "\u{3000}",
    "\u{85}",
    "\u{200b}",
    "!",
    "...",
    "🙂",
    "👩‍👩‍👧",
];

fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => prop::sample::select(PIECES.to_vec()).prop_map(str::to_owned),
        2 => any::<char>().prop_map(String::from),
        1 => (prop::sample::select(PIECES.to_vec()), 1usize..80).prop_map(|(piece, times)| piece.repeat(times)),
        1 => "[a-z]{1,120}",
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// What the pieces teach.
fn rows() -> impl Iterator<Item = String> {
    (0..400usize).map(|n| (0..12).map(|k| PIECES[(n * 7 + k * k * 3 + n / 9) % PIECES.len()]).collect::<String>())
}

fn trained() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("dataset");
    let mut writer = Writer::create(&dataset).unwrap();
    rows().for_each(|text| writer.push(&Row::Text { text }).unwrap());
    writer.finish().unwrap();
    train(&dataset, 500, &folder.path().join("tokenizer")).unwrap()
}

/// As GPT-2's: no reserved token but one, numbers together, merges of every kind.
fn document() -> serde_json::Value {
    let bytes = byte_level_characters();
    let spelled = |text: &str| -> String {
        text.bytes()
            .map(|byte| bytes.iter().find(|(_, other)| **other == byte).map(|(character, _)| *character).unwrap())
            .collect()
    };
    let mut vocabulary: Vec<String> = bytes.keys().map(|character| character.to_string()).collect();
    vocabulary.sort();
    let mut merges: Vec<[String; 2]> = Vec::new();
    for word in ["the", " the", "that", "12", " 20", "  ", "\n\n", "слово", "語", "ing", "aaaa", "...", "'s"] {
        let word = spelled(word);
        let mut characters = word.chars();
        let mut left: String = characters.next().into_iter().collect();
        for right in characters {
            let (pair, whole) = ([left.clone(), right.to_string()], format!("{left}{right}"));
            if !vocabulary.contains(&whole) {
                merges.push(pair);
                vocabulary.push(whole.clone());
            }
            left = whole;
        }
    }
    // Learned last, and so merged last: "th" first, then "the".
    merges.push([spelled("h"), spelled("e")]);
    vocabulary.push(spelled("he"));
    let size = vocabulary.len();
    let ids: serde_json::Map<_, _> = vocabulary.into_iter().zip(0..).map(|(token, id)| (token, json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": size, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
            "byte_fallback": false, "vocab": ids, "merges": merges},
    })
}

fn imported(document: &serde_json::Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    std::fs::write(&file, serde_json::to_vec(document).unwrap()).unwrap();
    import(&file, &folder.path().join("tokenizer")).unwrap()
}

fn both() -> [Tokenizer; 2] {
    let both = [trained(), imported(&document())];
    assert!(both.iter().all(|tokenizer| tokenizer.bpe.is_some()), "neither needs the library");
    both
}

fn check(tokenizer: &Tokenizer, text: &str) {
    assert_eq!(tokenizer.encode(text), tokenizer.encode_by_library(text), "{text:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_has_the_library_s_ids(texts in prop::collection::vec(text(), 32)) {
        thread_local!(static BOTH: [Tokenizer; 2] = both());
        BOTH.with(|both| both.iter().for_each(|tokenizer| texts.iter().for_each(|text| check(tokenizer, text))));
    }
}

#[test]
fn every_character_is_of_the_class_that_the_library_takes_it_for() {
    let tokenizers = both();
    // Between a letter, a number and others it is seen with which of them it stands together.
    let around = |character: char| format!("{character}a{character}1{character}! {character} \n{character}");
    let all: Vec<char> = (0..0x32000).chain(0xE0000..0xE0200).filter_map(char::from_u32).collect();
    for characters in all.chunks(512) {
        let text: String = characters.iter().copied().map(around).collect();
        tokenizers.iter().for_each(|tokenizer| check(tokenizer, &text));
    }
}

#[test]
fn a_long_word_takes_no_more_than_its_share_of_time() {
    for tokenizer in both() {
        for text in ["a".repeat(1 << 20), "the".repeat(1 << 18), " ".repeat(1 << 20), "\n ".repeat(1 << 19)] {
            let begun = Instant::now();
            let ids = tokenizer.encode(&text);
            assert!(begun.elapsed() < Duration::from_secs(30), "{:?} for a megabyte", begun.elapsed());
            assert_eq!(tokenizer.decode(&ids), text);
        }
    }
}

#[test]
fn what_is_not_known_is_left_to_the_library() {
    let plain = document();
    let changed = |pointer: &str, value: serde_json::Value| {
        let mut document = plain.clone();
        *document.pointer_mut(pointer).unwrap() = value;
        document
    };
    for other in [
        changed("/pre_tokenizer/add_prefix_space", json!(true)),
        changed("/normalizer", json!({"type": "NFC"})),
        changed("/added_tokens/0/special", json!(false)),
        changed("/model/byte_fallback", json!(true)),
        changed("/model/dropout", json!(0.1)),
        changed(
            "/pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}),
        ),
    ] {
        assert!(super::Bpe::of(&serde_json::to_vec(&other).unwrap()).is_none(), "{other}");
    }
    assert!(super::Bpe::of(&serde_json::to_vec(&plain).unwrap()).is_some());
}
