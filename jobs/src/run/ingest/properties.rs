//! Whatever the bytes, every reader ends with a dataset or a failure: it never panics, and never
//! writes more than its bounds allow.

use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use serde_json::json;

use super::*;

const MAX_LINE_BYTES: usize = 300;
const MAX_BYTES: u64 = 20_000;

fn ingest(bytes: &[u8], name: &str, format: Format, documents: Documents, on_bad_row: OnBadRow) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input");
    fs::write(&path, bytes).unwrap();
    let output = folder.path().join("dataset");
    let files = vec![InputFile { id: "file-1".into(), name: name.into(), path }];
    let source = Source::Files(FilesSource { files, format, columns: Columns::new(), documents, on_bad_row });
    let spec =
        IngestSpec { source, output: output.clone(), max_bytes: MAX_BYTES, max_ratio: 100, max_line_bytes: MAX_LINE_BYTES };
    let outcome = run(spec, &mut |_| {}, &AtomicBool::new(false));

    assert_eq!(outcome.is_ok(), output.join("manifest.json").exists());
    // One row may pass the bound before it is noticed.
    let written = fs::metadata(output.join("rows.jsonl")).unwrap().len();
    assert!(written <= MAX_BYTES + 10 * MAX_LINE_BYTES as u64, "{written} bytes");
    if let Err(failure) = outcome {
        assert!(!failure.message.is_empty() && !failure.message.contains(char::is_control), "{failure:?}");
        assert_ne!(failure.code, FailureCode::Internal, "{failure:?}");
    }
}

fn format() -> impl Strategy<Value = Format> {
    prop::sample::select(vec![Format::Auto, Format::Text, Format::Jsonl, Format::Json, Format::Csv, Format::Parquet])
}

fn documents() -> impl Strategy<Value = Documents> {
    prop::sample::select(vec![Documents::File, Documents::BlankLine, Documents::Line])
}

fn on_bad_row() -> impl Strategy<Value = OnBadRow> {
    prop::sample::select(vec![OnBadRow::Reject, OnBadRow::Skip])
}

fn name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
}

/// Bytes that look much like what the readers know, so that they get far.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    let pieces = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        "\n",
        "\r\n",
        " ",
        "\t",
        ";",
        "text",
        "\"text\"",
        "\"output\"",
        "\"instruction\"",
        "\"messages\"",
        "\"role\"",
        "\"user\"",
        "null",
        "1e999",
        "-0",
        "true",
        "\\ud800",
        "{\"text\":\"a\"}",
        "{\"question\":\"q\",\"answer\":\"a\"}",
        "question,answer\n",
        "\u{feff}",
        "é",
        "\u{2028}",
        "PAR1",
    ];
    let piece = prop_oneof![
        8 => prop::sample::select(pieces.to_vec()).prop_map(|text| text.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..8),
        1 => (1usize..500).prop_map(|length| vec![b'x'; length]),
    ];
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

fn compressed(bytes: &[u8], layer: u8) -> Vec<u8> {
    match layer {
        1 => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut encoder, bytes).unwrap();
            encoder.finish().unwrap()
        }
        2 => zstd::encode_all(bytes, 1).unwrap(),
        _ => bytes.to_vec(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_end_well(
        bytes in prop::collection::vec(any::<u8>(), 0..2_000),
        magic in prop::sample::select(vec![&b""[..], b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"{\"text\":", b"\xff\xfe"]),
        name in name(), format in format(), documents in documents(), on_bad_row in on_bad_row(),
    ) {
        ingest(&[magic, &bytes].concat(), name, format, documents, on_bad_row);
    }

    #[test]
    fn plausible_bytes_end_well(
        bytes in plausible(), layer in 0u8..3, damage in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
        name in name(), format in format(), documents in documents(), on_bad_row in on_bad_row(),
    ) {
        let mut bytes = compressed(&bytes, layer);
        if let (Some((index, byte)), false) = (damage, bytes.is_empty()) {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        ingest(&bytes, name, format, documents, on_bad_row);
    }

    #[test]
    fn valid_rows_come_back_to_the_letter(texts in prop::collection::vec("\\PC{1,40}", 1..20), layer in 0u8..3, array in any::<bool>()) {
        let texts: Vec<String> = texts.into_iter().map(|text| format!("{text}.")).collect();
        let records: Vec<_> = texts.iter().map(|text| serde_json::json!({"text": text})).collect();
        let content = match array {
            true => serde_json::to_string(&records).unwrap(),
            false => records.iter().map(|record| format!("{record}\n")).collect(),
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("input");
        fs::write(&path, compressed(content.as_bytes(), layer)).unwrap();
        let output = folder.path().join("dataset");
        let source = FilesSource {
            files: vec![InputFile { id: "file-1".into(), name: "rows.json".into(), path }],
            format: Format::Auto,
            columns: Columns::new(),
            documents: Documents::File,
            on_bad_row: OnBadRow::Reject,
        };
        let spec = IngestSpec { source: Source::Files(source), output: output.clone(), max_bytes: 1 << 20, max_ratio: 100, max_line_bytes: 1 << 16 };
        run(spec, &mut |_| {}, &AtomicBool::new(false)).unwrap();
        let rows = lathe_model::data::rows::Dataset::open(&output).unwrap().iter().unwrap().map(|row| row.unwrap().document()).collect::<Vec<_>>();
        prop_assert_eq!(rows, texts);
    }

    #[test]
    fn damaged_parquet_ends_well(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), format in format()) {
        let mut bytes = small_parquet();
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        ingest(&bytes, "a.parquet", format, Documents::File, OnBadRow::Skip);
    }
}

/// A template of pieces that mean something to the renderer.
fn template() -> impl Strategy<Value = String> {
    let pieces = [
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        " a ",
        "b",
        "|",
        "upper",
        "join",
        "range(",
        ")",
        "for i in ",
        "endfor",
        "if ",
        "else",
        "endif",
        "set x = ",
        "macro m()",
        "endmacro",
        "m()",
        "'",
        "\"",
        "[",
        "]",
        "1",
        "-1",
        "99999999999999999999",
        " * ",
        " ** ",
        " // ",
        " % ",
        " / 0",
        "'x' * 9999999",
        "range(10000000)",
        "a.b.c",
        "[::-1]",
        "loop",
        "self",
        "é",
        "\n",
        "{{ a }}",
        "{% for i in range(1000) %}",
        "{% endfor %}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% raw %}",
        "text",
    ];
    prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..14).prop_map(|pieces| pieces.concat())
}

/// Of a few values: where a template does not name a variable of many, a million of them are tried before the
/// search for another row ends.
fn variable() -> impl Strategy<Value = Variable> {
    prop_oneof![
        (-9i64..9, -9i64..9).prop_map(|(from, to)| Variable::Range(from, to)),
        prop::sample::select(vec![(i64::MIN, i64::MIN), (i64::MAX - 2, i64::MAX), (i64::MAX, i64::MIN)])
            .prop_map(|(from, to)| Variable::Range(from, to)),
        prop::collection::vec(prop::sample::select(vec![json!(1), json!("x"), json!(null), json!({"c": [1]})]), 0..4)
            .prop_map(Variable::Choice),
        (0u32..3).prop_map(Variable::Digits),
        (0u32..2).prop_map(Variable::Letters),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_template_ends_well(
        instruction in template(), output in template(), key in prop::option::of(template()),
        variables in prop::collection::btree_map(prop::sample::select(vec!["a", "b", "i", "1x", ""]), variable(), 0..3),
        rows in 0u64..30, seed in any::<u64>(),
    ) {
        let variables = variables.into_iter().map(|(name, variable)| (name.to_owned(), variable)).collect();
        let template = TemplateSpec { family: None, key, instruction: Wordings::One(instruction), input: None, output, variables };
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("dataset");
        let source = Source::Template(TemplateSource { rows, seed, templates: vec![template], exclude: Vec::new() });
        let spec =
            IngestSpec { source, output: output.clone(), max_bytes: 1 << 20, max_ratio: 100, max_line_bytes: 1 << 16 };
        match run(spec, &mut |_| {}, &AtomicBool::new(false)) {
            Ok(made) => prop_assert_eq!(made.manifest.rows, rows),
            Err(failure) => {
                prop_assert!(!failure.message.is_empty());
                prop_assert_ne!(failure.code, FailureCode::Internal, "{:?}", failure);
            }
        }
    }
}

fn small_parquet() -> Vec<u8> {
    use ::parquet::{
        data_type::{ByteArray, ByteArrayType},
        file::writer::SerializedFileWriter,
        schema::parser::parse_message_type,
    };
    let schema = parse_message_type("message schema { required binary text (UTF8); }").unwrap();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, std::sync::Arc::new(schema), Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts: Vec<ByteArray> = (0..50).map(|n| ByteArray::from(format!("text {n}").as_str())).collect();
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}
