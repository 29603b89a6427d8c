//! Whole tokenizers: trained, imported, loaded.

use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::data::rows::{Row, Turn, Writer};

/// A dataset's folder with some conversations and texts.
fn dataset(folder: &Path, texts: impl IntoIterator<Item = String>) -> PathBuf {
    let folder = folder.join("dataset");
    let mut writer = Writer::create(&folder).unwrap();
    for text in texts {
        writer.push(&Row::Text { text }).unwrap();
    }
    let turn = Turn { instruction: "Count one up from 3761.".into(), input: String::new(), output: "3762".into() };
    writer.push(&Row::Conversation { system: None, turns: vec![turn] }).unwrap();
    writer.finish().unwrap();
    folder
}

fn sentences() -> impl Iterator<Item = String> {
    let words =
        ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seventeen", "naïve", "poets", "whisper"];
    (0..200).map(move |n| (0..9).map(|k| words[(n * 7 + k * k + n / 5) % words.len()]).collect::<Vec<_>>().join(" "))
}

fn trained(vocabulary: i64) -> (tempfile::TempDir, Tokenizer) {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(folder.path(), sentences());
    let tokenizer = train(&dataset, vocabulary, &folder.path().join("tokenizer")).unwrap();
    (folder, tokenizer)
}

#[test]
fn roles_come_first_and_ids_are_dense() {
    let (folder, tokenizer) = trained(300);
    assert_eq!(tokenizer.vocabulary(), 300);
    assert_eq!(Role::ALL.map(|role| tokenizer.roles().id(role)), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(tokenizer.reserved(), (0..16).collect::<Vec<u32>>());
    assert!((16..300).all(|id| !tokenizer.token_bytes(id).is_empty()));
    let single: std::collections::BTreeSet<u8> =
        (16..300).filter_map(|id| <[u8; 1]>::try_from(tokenizer.token_bytes(id)).ok()).map(|[byte]| byte).collect();
    assert_eq!(single.len(), 256);
    let again = Tokenizer::load(&folder.path().join("tokenizer")).unwrap();
    assert_eq!(again.sha256(), tokenizer.sha256());
}

#[test]
fn the_same_rows_give_the_same_file() {
    assert_eq!(trained(310).1.sha256(), trained(310).1.sha256());
}

#[test]
fn digits_stand_apart() {
    let (_folder, tokenizer) = trained(300);
    let pieces: Vec<String> = tokenizer.encode("3761 and 42").iter().map(|&id| tokenizer.token_name(id)).collect();
    assert_eq!(pieces.iter().filter(|piece| piece.chars().any(|c| c.is_ascii_digit())).count(), 6);
}

#[test]
fn reserved_text_stays_text() {
    let (_folder, tokenizer) = trained(300);
    for text in ["[INS]", "a[INS]b [EOS][PAD]", "[SPARE0] [UNK] [MASK]", " [CLS]  [SEP] "] {
        let ids = tokenizer.encode(text);
        assert!(ids.iter().all(|&id| !tokenizer.is_reserved(id)), "{text:?} became {ids:?}");
        assert_eq!(tokenizer.decode(&ids), text);
        assert_eq!(tokenizer.encode_batch(&[text.to_owned()]), [ids]);
    }
    assert_eq!(tokenizer.decode(&[tokenizer.roles().ins, tokenizer.roles().eos]), "");
    assert_eq!(tokenizer.decode(&[u32::MAX]), "");
}

/// A corpus that repeats the names of reserved tokens must not teach merges that reach them.
#[test]
fn training_text_cannot_reach_reserved_ids() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(folder.path(), sentences().chain((0..50).map(|_| "[INS] [EOS] INS EOS SPARE0 [SPARE0]".to_owned())));
    let tokenizer = train(&dataset, 320, &folder.path().join("tokenizer")).unwrap();
    assert!(tokenizer.encode("[INS][EOS] [SPARE0]").iter().all(|&id| !tokenizer.is_reserved(id)));
}

#[test]
fn a_vocabulary_beyond_the_text_says_what_is_possible() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(folder.path(), sentences());
    let output = folder.path().join("tokenizer");
    let Err(Error::VocabularyTooLarge { asked: 50_000, possible }) = train(&dataset, 50_000, &output) else {
        panic!("it was trained")
    };
    assert!(possible > MIN_VOCABULARY && possible < 2_000, "{possible}");
    assert!(!output.exists());
    train(&dataset, possible, &output).unwrap();
    assert!(matches!(train(&dataset, 100, &output), Err(Error::VocabularyTooSmall { asked: 100 })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_encoded_comes_back(text: String) {
        static TOKENIZER: std::sync::LazyLock<Tokenizer> = std::sync::LazyLock::new(|| trained(300).1);
        let ids = TOKENIZER.encode(&text);
        prop_assert_eq!(TOKENIZER.decode(&ids), &text[..]);
        let mut detokenizer = Detokenizer::new();
        let mut streamed: String = ids.iter().map(|&id| detokenizer.push(&TOKENIZER, id)).collect();
        streamed += &detokenizer.finish();
        prop_assert_eq!(streamed, text);
    }
}

#[test]
fn statistics_count_tokens_and_lengths() {
    let (folder, tokenizer) = trained(272);
    let dataset = dataset(folder.path(), ["a".to_owned(), "abc".to_owned(), "é".to_owned()]);
    // Only bytes in this vocabulary: "Count one up from 3761.\n3762" has 28.
    assert_eq!(
        statistics(&dataset, &tokenizer).unwrap(),
        json!({"tokens": 34, "length": {"p50": 2, "p90": 28, "p99": 28, "max": 28}})
    );
}

/// A byte-level tokenizer as others write it, with `extra` set on top.
fn foreign(extra: &[(&str, Value)]) -> Value {
    let mut vocabulary = serde_json::Map::new();
    let mut characters: Vec<(u8, char)> =
        super::train::byte_level_characters().into_iter().map(|(character, byte)| (byte, character)).collect();
    characters.sort();
    for (byte, character) in characters {
        vocabulary.insert(character.to_string(), json!(byte));
    }
    vocabulary.insert("<|endoftext|>".into(), json!(256));
    let mut document = json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}, "padding": null,
        "added_tokens": [{"id": 256, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": false}],
        "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "vocab": vocabulary, "merges": []}
    });
    for (path, value) in extra {
        *document.pointer_mut(path).unwrap() = value.clone();
    }
    document
}

fn imported(document: &[u8]) -> Result<Tokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("upload");
    std::fs::write(&file, document).unwrap();
    import(&file, &folder.path().join("tokenizer"))
}

#[test]
fn an_upload_gains_the_roles_that_it_lacks() {
    let tokenizer = imported(foreign(&[]).to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.roles().eos, 256);
    assert_eq!(tokenizer.added_roles(), ["[PAD]", "[BOS]", "[INS]", "[MASK]", "[CLS]", "[SEP]", "[UNK]"]);
    assert_eq!(tokenizer.vocabulary(), 264);
    let text = "Hello [INS] <|endoftext|> wörld";
    assert_eq!(tokenizer.encode(text).len(), text.len(), "neither truncated nor reserved");
    assert_eq!(tokenizer.decode(&tokenizer.encode(text)), text);
}

/// With `ignore_merges` a whole word that stands in the vocabulary becomes its id at once.
#[test]
fn an_upload_whose_words_reach_reserved_ids_is_defused() {
    let mut document = foreign(&[("/pre_tokenizer/use_regex", json!(false))]);
    document["model"]["ignore_merges"] = json!(true);
    document["model"]["vocab"]["[INS]"] = json!(257);
    let tokenizer = imported(document.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.roles().ins, 257);
    let ids = tokenizer.encode("[INS]");
    assert_eq!(ids.len(), 5);
    assert_eq!(tokenizer.decode(&ids), "[INS]");
}

#[test]
fn bad_uploads_are_refused_with_a_sentence() {
    let lossy = foreign(&[("/decoder", json!({"type": "WordPiece", "prefix": "##", "cleanup": true}))]);
    let huge = foreign(&[("/model/vocab/a", json!(4_000_000_000u32))]);
    let twice = foreign(&[("/model/vocab/a", json!(98))]);
    let gap = foreign(&[("/model/vocab/<|endoftext|>", json!(300)), ("/added_tokens/0/id", json!(300))]);
    let whole = foreign(&[("/pre_tokenizer", json!({"type": "Sequence", "pretokenizers": []}))]);
    let lower = foreign(&[("/normalizer", json!({"type": "Lowercase"}))]);
    let mut holes = foreign(&[]);
    holes["model"]["vocab"].as_object_mut().unwrap().remove("é");
    holes["model"]["vocab"].as_object_mut().unwrap().remove("Ċ");
    for (document, part) in [
        (lossy.to_string(), "WordPiece"),
        (huge.to_string(), "4000000000"),
        (twice.to_string(), "another token"),
        (gap.to_string(), "no token has the id 256"),
        (holes.to_string(), "bytes that occur"),
        (whole.to_string(), "comes back"),
        (lower.to_string(), "comes back"),
        (json!({"hello": 1}).to_string(), "decoder"),
        ("{".to_owned(), "not JSON"),
        (json!({"decoder": {"type": "ByteLevel"}, "model": 3}).to_string(), "tokenizer.json"),
        (json!([1]).to_string(), "decoder"),
    ] {
        let Err(error) = imported(document.as_bytes()) else { panic!("accepted: {part}") };
        assert!(error.to_string().contains(part), "{part}: {error}");
        assert!(matches!(Failure::from(error), Failure { code: FailureCode::InvalidTokenizer, retryable: false, .. }));
    }
}

/// It is refused with a sentence, or it encodes what it decodes to.
fn ends_well(document: &[u8]) -> Result<(), TestCaseError> {
    match imported(document) {
        Err(error) => prop_assert!(!error.to_string().is_empty()),
        Ok(tokenizer) => {
            let text = "Hello, wörld 42 [INS]";
            let decoded = tokenizer.decode(&tokenizer.encode(text));
            prop_assert_eq!(decoded.trim_start(), text);
        }
    }
    Ok(())
}

/// What a member of the file might be instead.
fn member() -> impl Strategy<Value = Value> {
    let oddities = [
        json!(null),
        json!(true),
        json!(-1),
        json!(3),
        json!(1e300),
        json!(""),
        json!("[INS]"),
        json!("a b"),
        json!([]),
        json!([[]]),
        json!(["a", "b", "c"]),
        json!([["a"], ["b", "c"], "a b"]),
        json!(["t h", "h e", "t h"]),
        json!({}),
        json!({"a": 0}),
        json!({"a": -1, "b": 4_294_967_295u32}),
        json!({"type": "BPE"}),
        json!({"type": "ByteLevel"}),
        json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}),
        json!({"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]], "byte_fallback": false}),
        json!({"type": "Sequence", "pretokenizers": [], "normalizers": [], "decoders": [], "processors": []}),
        json!({"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false}),
        json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
        json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": true}),
        json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "xx"}),
        json!({"type": "Lowercase"}),
        json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        json!({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
        json!([{"id": 1, "content": "", "single_word": true, "lstrip": true, "rstrip": true, "normalized": true, "special": false}]),
        json!([{"id": 4_294_967_295u32, "content": "x", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}]),
    ];
    prop::sample::select(oddities.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_upload_ends_well(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = foreign(&[]).to_string().into_bytes();
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        ends_well(&bytes)?;
    }

    #[test]
    fn an_upload_with_any_members_ends_well(
        changes in prop::collection::vec((prop::sample::select(vec![
            "/added_tokens", "/normalizer", "/pre_tokenizer", "/post_processor", "/decoder", "/truncation", "/padding", "/model",
            "/model/type", "/model/vocab", "/model/merges", "/model/unk_token", "/model/dropout", "/model/fuse_unk",
            "/model/continuing_subword_prefix", "/model/end_of_word_suffix", "/added_tokens/0/content", "/added_tokens/0/id",
            "/pre_tokenizer/add_prefix_space", "/pre_tokenizer/use_regex",
        ]), member()), 1..4),
    ) {
        let mut document = foreign(&[]);
        for (path, value) in changes {
            if let Some(member) = document.pointer_mut(path) {
                *member = value;
            }
        }
        ends_well(document.to_string().as_bytes())?;
    }
}
