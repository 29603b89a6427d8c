//! Whole ingestions of small real files, good and bad.

use std::{
    io::Write,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use lathe_model::{
    data::rows::{Dataset, Row, Turn},
    protocol::{Failure, FailureCode},
};
use serde_json::json;

use super::*;

struct Case {
    folder: tempfile::TempDir,
    source: FilesSource,
    max_bytes: u64,
    max_line_bytes: usize,
}

impl Case {
    fn new(files: &[(&str, &[u8])]) -> Case {
        let folder = tempfile::tempdir().unwrap();
        let files = files.iter().enumerate().map(|(index, (name, bytes))| {
            let path = folder.path().join(format!("input-{index}"));
            std::fs::write(&path, bytes).unwrap();
            InputFile { id: format!("file-{index}"), name: (*name).to_owned(), path }
        });
        let source = FilesSource {
            files: files.collect(),
            format: Format::Auto,
            columns: Columns::new(),
            documents: Documents::File,
            on_bad_row: OnBadRow::Reject,
        };
        Case { folder, source, max_bytes: 1 << 30, max_line_bytes: 8 << 20 }
    }

    fn skip(mut self) -> Case {
        self.source.on_bad_row = OnBadRow::Skip;
        self
    }

    fn format(mut self, format: Format) -> Case {
        self.source.format = format;
        self
    }

    fn documents(mut self, documents: Documents) -> Case {
        self.source.documents = documents;
        self
    }

    fn columns(mut self, columns: &[(Role, &str)]) -> Case {
        self.source.columns = columns.iter().map(|(role, key)| (*role, (*key).to_owned())).collect();
        self
    }

    fn output(&self) -> std::path::PathBuf {
        self.folder.path().join("dataset")
    }

    fn run(&self) -> Result<Ingested, Failure> {
        let spec = IngestSpec {
            source: Source::Files(self.source.clone()),
            output: self.output(),
            max_bytes: self.max_bytes,
            max_ratio: 100,
            max_line_bytes: self.max_line_bytes,
        };
        run(spec, &mut |_| {}, &AtomicBool::new(false))
    }

    fn rows(&self) -> Vec<Row> {
        self.run().unwrap();
        rows(&self.output())
    }

    fn failure(&self) -> Failure {
        let failure = self.run().expect_err("the ingestion must fail");
        assert!(!self.output().join("manifest.json").exists());
        failure
    }

    fn bad_rows(&self) -> Vec<BadRow> {
        let text = std::fs::read_to_string(self.output().join("errors.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The only bad row of a set that otherwise reads.
    fn bad_row(self) -> BadRow {
        let case = self.skip();
        let _ = case.run();
        let mut bad = case.bad_rows();
        assert_eq!(bad.len(), 1, "{bad:?}");
        bad.remove(0)
    }
}

fn rows(folder: &Path) -> Vec<Row> {
    Dataset::open(folder).unwrap().iter().unwrap().map(Result::unwrap).collect()
}

fn text(text: &str) -> Row {
    Row::Text { text: text.to_owned() }
}

fn pair(instruction: &str, input: &str, output: &str) -> Row {
    let turn = Turn { instruction: instruction.into(), input: input.into(), output: output.into() };
    Row::Conversation { system: None, turns: vec![turn] }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Text that hardly compresses.
fn noise(bytes: usize) -> String {
    let mut state = 1u64;
    let mut letter = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        char::from(b' ' + ((state >> 33) % 94) as u8)
    };
    (0..bytes).map(|_| letter()).collect()
}

#[test]
fn plain_text_is_cut_as_asked() {
    let poem = b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\nfour";
    let case = |documents| Case::new(&[("poem.txt", poem)]).documents(documents).rows();
    assert_eq!(case(Documents::File), [text("one\ntwo\n\n \nthree\nfour")]);
    assert_eq!(case(Documents::BlankLine), [text("one\ntwo"), text("three\nfour")]);
    assert_eq!(case(Documents::Line), [text("one"), text("two"), text("three"), text("four")]);
}

#[test]
fn a_long_document_is_cut_at_line_ends_and_loses_nothing() {
    let whole: String = (0..100).map(|number| format!("line {number}\n")).collect();
    let mut case = Case::new(&[("long.txt", whole.as_bytes())]);
    case.max_line_bytes = 64;
    let rows = case.rows();
    assert!(rows.len() > 10);
    assert!(rows.iter().all(|row| row.document().len() <= 65 && row.document().ends_with('\n')));
    assert_eq!(rows.iter().map(Row::document).collect::<String>(), whole);
}

#[test]
fn every_known_shape_is_read_from_lines() {
    let lines = [
        (json!({"text": "a document"}), text("a document")),
        (json!({"instruction": "i", "input": "n", "output": "o", "text": "all of it"}), pair("i", "n", "o")),
        (json!({"instruction": "i", "input": null, "output": "o"}), pair("i", "", "o")),
        (json!({"prompt": "p", "completion": " c"}), pair("p", "", " c")),
        (json!({"question": "q", "answer": "a", "id": 7}), pair("q", "", "a")),
        (
            json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
                {"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "2"}]}, {"role": "assistant", "content": "b"}]}),
            Row::Conversation {
                system: Some("s".into()),
                turns: vec![
                    Turn { instruction: "u".into(), input: String::new(), output: "a".into() },
                    Turn { instruction: "u2".into(), input: String::new(), output: "b".into() },
                ],
            },
        ),
    ];
    let (records, expected): (Vec<_>, Vec<_>) = lines.into_iter().unzip();
    let jsonl = records.iter().map(|record| format!("{record}\r\n\n")).collect::<String>();
    let array = serde_json::to_string_pretty(&records).unwrap();
    let stream = records.iter().map(|record| serde_json::to_string_pretty(record).unwrap()).collect::<Vec<_>>().join("\n");
    for (name, content) in [
        ("a.jsonl", &jsonl),
        ("a", &jsonl),
        ("a.json", &jsonl),
        ("a.json", &array),
        ("a.jsonl", &array),
        ("a", &array),
        ("a.json", &stream),
    ] {
        assert_eq!(Case::new(&[(name, content.as_bytes())]).rows(), expected, "{name}: {content}");
    }
}

#[test]
fn a_named_format_goes_before_content_and_name() {
    let content = b"{\"text\": \"a\"}";
    assert_eq!(Case::new(&[("a.jsonl", content)]).format(Format::Text).rows(), [text("{\"text\": \"a\"}")]);
    assert_eq!(Case::new(&[("a.txt", content)]).format(Format::Jsonl).rows(), [text("a")]);
    assert_eq!(Case::new(&[("a.txt", b"text\nb\n")]).format(Format::Csv).rows(), [text("b")]);
    assert_eq!(Case::new(&[("a.txt", content)]).format(Format::Parquet).failure().code, FailureCode::UnsupportedFormat);
    // Without a telling name, prose that begins like JSON stays prose.
    for prose in ["[Scene 1] Enter two sentries.", "{braces}, they say", "Instruction, input and output are words."] {
        assert_eq!(Case::new(&[("scene", prose.as_bytes())]).rows(), [text(prose)]);
    }
}

#[test]
fn columns_map_other_keys() {
    let row = json!({"q": "why", "context": "c", "a": "because", "instruction": "not this"}).to_string();
    let columns = [(Role::Instruction, "q"), (Role::Output, "a"), (Role::Input, "context")];
    assert_eq!(Case::new(&[("x.jsonl", row.as_bytes())]).columns(&columns).rows(), [pair("why", "c", "because")]);
    let columns = [(Role::Output, "a")];
    assert_eq!(Case::new(&[("x.jsonl", row.as_bytes())]).columns(&columns).rows(), [pair("not this", "", "because")]);
    let body = json!({"body": "a text"}).to_string();
    assert_eq!(Case::new(&[("x.jsonl", body.as_bytes())]).columns(&[(Role::Text, "body")]).rows(), [text("a text")]);
    let bad = Case::new(&[("x.jsonl", body.as_bytes())]).columns(&[(Role::Text, "content")]).bad_row();
    assert_eq!((bad.code, bad.field.as_deref(), bad.keys), (RowCode::MissingField, Some("content"), vec!["body".to_owned()]));

    let conflicting: Columns = [(Role::Text, "t".to_owned()), (Role::Output, "o".to_owned())].into();
    assert!(check_columns(&conflicting).unwrap_err().contains("exclude each other"));
    assert_eq!(check_columns(&[(Role::Instruction, "q".to_owned())].into()), Ok(()));
}

#[test]
fn csv_is_read_by_its_header() {
    let comma = "question,answer\r\n\"one, two\",\"a \"\"b\"\"\nnext\"\r\nq2,a2\r\n";
    let expected = [pair("one, two", "", "a \"b\"\nnext"), pair("q2", "", "a2")];
    for name in ["a.csv", "a", "a.csv.gz"] {
        assert_eq!(Case::new(&[(name, comma.as_bytes())]).rows(), expected, "{name}");
    }
    assert_eq!(Case::new(&[("a.csv", b"\xef\xbb\xbftext;n\nhello, you;1\n")]).rows(), [text("hello, you")]);
    assert_eq!(Case::new(&[("a.tsv", b"text\tn\nhello, you\t1\n")]).rows(), [text("hello, you")]);
    assert_eq!(Case::new(&[("a.csv", b"text\nalone\n")]).rows(), [text("alone")]);

    let bad = Case::new(&[("a.csv", b"question,answer\na,b\n\"x\ny\",z\nonly one\n")]).bad_row();
    assert_eq!((bad.line, bad.code, bad.keys.len()), (5, RowCode::InvalidRecord, 2));
    let bad = Case::new(&[("a.csv", b"question,answer\na,b\nc,\xff\n")]).bad_row();
    assert_eq!((bad.line, bad.code, bad.field.as_deref()), (3, RowCode::InvalidEncoding, Some("answer")));
    let failure = Case::new(&[("a.csv", b"text,text\na,b\n")]).failure();
    assert_eq!(failure.code, FailureCode::UnsupportedFormat);
}

#[test]
fn an_unclosed_quote_does_not_eat_the_memory() {
    let mut case = Case::new(&[("a.csv", format!("text\n\"{}", "word\n".repeat(100_000)).as_bytes())]).skip();
    case.max_line_bytes = 10_000;
    let failure = case.failure();
    assert_eq!(failure.code, FailureCode::LineTooLong);
    assert!(failure.message.contains("quote"), "{failure:?}");
}

#[test]
fn compression_goes_by_magic_in_any_layers() {
    let jsonl = b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
    let zstd = zstd::encode_all(&jsonl[..], 3).unwrap();
    let members = [gzip(b"{\"text\": \"a\"}\n"), gzip(b"{\"text\": \"b\"}\n")].concat();
    for bytes in [gzip(jsonl), zstd.clone(), gzip(&zstd), members] {
        assert_eq!(Case::new(&[("data.jsonl", &bytes)]).rows(), [text("a"), text("b")]);
    }
    let deep = gzip(&gzip(&gzip(&gzip(jsonl))));
    assert_eq!(Case::new(&[("data.jsonl", &deep)]).failure().code, FailureCode::UnsupportedFormat);
}

#[test]
fn damaged_compression_is_named() {
    let plain = noise(200_000);
    // A zstd frame without its checksum would not show all damage.
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(plain.as_bytes()).unwrap();
    let whole = [gzip(plain.as_bytes()), encoder.finish().unwrap()];
    for bytes in whole {
        for end in [bytes.len() / 2, bytes.len() - 1, 12] {
            let failure = Case::new(&[("data.txt", &bytes[..end])]).skip().failure();
            assert_eq!(failure.code, FailureCode::TruncatedFile, "{failure:?}");
            assert!(failure.message.contains("data.txt"));
        }
        let mut damaged = bytes.clone();
        let middle = bytes.len() / 2;
        damaged[middle..middle + 64].fill(0xaa);
        let failure = Case::new(&[("data.txt", &damaged)]).failure();
        assert!(matches!(failure.code, FailureCode::TruncatedFile | FailureCode::InvalidEncoding), "{failure:?}");
    }
}

#[test]
fn bombs_meet_their_bounds() {
    let zeros = "0\n".repeat(5 << 20);
    for bomb in [gzip(zeros.as_bytes()), zstd::encode_all(zeros.as_bytes(), 3).unwrap(), gzip(&gzip(zeros.as_bytes()))] {
        let failure = Case::new(&[("bomb.txt", &bomb)]).failure();
        assert_eq!(failure.code, FailureCode::DecompressionLimit, "{failure:?}");
    }
    let mut case = Case::new(&[("large.txt.gz", &gzip(noise(200_000).as_bytes()))]);
    case.max_bytes = 100_000;
    assert_eq!(case.failure().code, FailureCode::DecompressionLimit);
    let mut case = Case::new(&[("large.txt", noise(200_000).as_bytes())]);
    case.max_bytes = 100_000;
    assert_eq!(case.failure().code, FailureCode::DiskFull);
}

#[test]
fn what_is_no_text_is_refused() {
    let mut tar = vec![b'x'; 600];
    tar[257..262].copy_from_slice(b"ustar");
    let refused: [(&str, &[u8], &str); 7] = [
        ("a.zip", b"PK\x03\x04rest", "ZIP"),
        ("a.xz", b"\xfd7zXZ\0", "xz"),
        ("a.pdf", b"%PDF-1.7", "PDF"),
        ("a.bin", b"ab\0c", "binary"),
        ("a.txt", b"\x7fELF\x02\x01\0\0", "binary"),
        ("a.tar.gz", &gzip(&tar), "tar"),
        ("a.parquet", b"no such thing", "PAR1"),
    ];
    for (name, bytes, word) in refused {
        let failure = Case::new(&[(name, bytes)]).failure();
        assert_eq!(failure.code, FailureCode::UnsupportedFormat, "{name}");
        assert!(failure.message.contains(word) && failure.message.contains(name), "{failure:?}");
    }
    assert_eq!(Case::new(&[("a.txt", b"\xff\xfea\0")]).failure().code, FailureCode::InvalidEncoding);
}

#[test]
fn no_row_is_a_failure_that_says_why() {
    for bytes in [&b""[..], b"\n \n", b"[]"] {
        let failure = Case::new(&[("a.json", bytes)]).failure();
        assert_eq!(failure.code, FailureCode::NoValidRows);
        assert!(failure.message.contains("empty"), "{failure:?}");
    }
    assert_eq!(Case::new(&[("empty.txt", b"")]).failure().code, FailureCode::NoValidRows);
    assert_eq!(Case::new(&[("empty.csv", b"question,answer\n")]).failure().code, FailureCode::NoValidRows);
    let failure = Case::new(&[("a.jsonl", b"{\"x\": 1}\n")]).skip().failure();
    assert_eq!(failure.code, FailureCode::NoValidRows);
    assert!(failure.message.contains("line 1 of a.jsonl") && failure.message.contains("keys found: x"), "{failure:?}");
}

#[test]
fn each_bad_row_has_its_line_field_and_keys() {
    let deep = format!("{{\"text\": {}1{}}}", "[".repeat(200), "]".repeat(200));
    let cases: [(&[u8], RowCode, Option<&str>, &str); 18] = [
        (br#"{"text": 5}"#, RowCode::WrongType, Some("text"), "a number"),
        (br#"{"text": " "}"#, RowCode::Empty, Some("text"), "empty"),
        (br#"{"instruction": "i"}"#, RowCode::MissingField, Some("output"), "missing"),
        (br#"{"instruction": "i", "output": null}"#, RowCode::MissingField, Some("output"), "missing"),
        (br#"{"instruction": "i", "output": ""}"#, RowCode::Empty, Some("output"), "nothing to learn"),
        (br#"{"prompt": "", "completion": "c"}"#, RowCode::Empty, Some("prompt"), "empty"),
        (br#"{"other": 1}"#, RowCode::MissingField, None, "columns"),
        (br#"{"text": "a", "text": "b"}"#, RowCode::DuplicateKey, Some("text"), "twice"),
        (br#"{"text": "a", "more": {"k": 1, "k": 2}}"#, RowCode::DuplicateKey, Some("k"), "twice"),
        (br#"{"text": "a""#, RowCode::InvalidJson, None, "JSON"),
        (br#"{"text": "a"} {"text": "b"}"#, RowCode::InvalidJson, None, "JSON"),
        (br#"["text"]"#, RowCode::WrongType, None, "an array"),
        (deep.as_bytes(), RowCode::InvalidJson, None, "recursion"),
        (b"{\"text\": \"\xe9\"}", RowCode::InvalidEncoding, None, "byte 11"),
        (br#"{"messages": []}"#, RowCode::BadMessages, Some("messages"), "assistant"),
        (br#"{"messages": [{"role": "user", "content": "u"}]}"#, RowCode::BadMessages, Some("messages"), "end with"),
        (
            br#"{"messages": [{"role": "assistant", "content": "u"}]}"#,
            RowCode::BadMessages,
            Some("messages[0].role"),
            "follow a user",
        ),
        (
            br#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": ""}]}"#,
            RowCode::BadMessages,
            Some("messages[1].content"),
            "nothing to learn",
        ),
    ];
    for (line, code, field, word) in cases {
        let content = [b"{\"text\": \"good\"}\n\n", line, b"\n{\"text\": \"good too\"}\n"].concat();
        let case = Case::new(&[("rows.jsonl", &content)]);
        let failure = case.failure();
        let expected = if code == RowCode::InvalidEncoding { FailureCode::InvalidEncoding } else { FailureCode::BadRows };
        assert_eq!(failure.code, expected, "{failure:?}");
        assert!(failure.message.contains("line 3 of rows.jsonl"), "{failure:?}");
        let bad = case.bad_row();
        assert_eq!((bad.line, bad.code, bad.field.as_deref(), bad.file.as_str()), (3, code, field, "file-0"), "{bad:?}");
        assert!(bad.message.contains(word), "{bad:?}");
    }
    let bad = Case::new(&[("rows.jsonl", br#"{"instruction": "i", "b": 1}"#)]).bad_row();
    assert_eq!(bad.keys, ["b", "instruction"]);
}

#[test]
fn skipped_rows_are_counted_and_the_others_kept() {
    let lines: String =
        (0..300).map(|n| if n % 3 == 0 { "{\"text\": \"row\"}\n".to_owned() } else { "{\"x\": 1}\n".to_owned() }).collect();
    let case = Case::new(&[("a.jsonl", lines.as_bytes())]).skip();
    let ingested = case.run().unwrap();
    assert_eq!((ingested.manifest.rows, ingested.bad_rows, ingested.manifest.duplicates), (100, 200, 99));
    assert_eq!(ingested.statistics()["bad_rows"], 200);
    assert_eq!(case.bad_rows().iter().map(|bad| bad.line).take(3).collect::<Vec<_>>(), [2, 3, 5]);
    let case = Case::new(&[("a.jsonl", lines.as_bytes())]);
    assert!(case.failure().message.starts_with("200 rows are bad; the first is line 2 of a.jsonl"));
}

#[test]
fn only_the_first_errors_are_kept() {
    let case = Case::new(&[("a.jsonl", "{}\n".repeat(10_050).as_bytes())]);
    assert!(case.failure().message.starts_with("10050 rows are bad"));
    assert_eq!(case.bad_rows().len(), 10_000);
}

#[test]
fn a_line_of_ten_megabytes_is_one_bad_row() {
    let long = format!("{{\"text\": \"good\"}}\n{{\"text\": \"{}\"}}\n{{\"text\": \"good too\"}}\n", "x".repeat(10 << 20));
    let case = Case::new(&[("a.jsonl", long.as_bytes())]);
    assert_eq!(case.failure().code, FailureCode::LineTooLong);
    let case = case.skip();
    assert_eq!(case.rows(), [text("good"), text("good too")]);
    assert_eq!((case.bad_rows()[0].line, case.bad_rows()[0].code), (2, RowCode::LineTooLong));

    let array = format!("[{{\"text\": \"good\"}}, {{\"text\": \"{}\"}}, {{\"text\": \"good too\"}}]", "x".repeat(10 << 20));
    let case = Case::new(&[("a.json", array.as_bytes())]).skip();
    assert_eq!(case.rows(), [text("good"), text("good too")]);
    assert_eq!((case.bad_rows()[0].line, case.bad_rows()[0].code), (2, RowCode::LineTooLong));
    assert_eq!(Case::new(&[("a.txt", "x".repeat(10 << 20).as_bytes())]).failure().code, FailureCode::LineTooLong);
}

#[test]
fn invalid_text_fails_its_document_only() {
    let content = b"good one\n\nbad \xff one\nsame document\n\ngood two\n";
    let case = Case::new(&[("a.txt", content)]).documents(Documents::BlankLine);
    let failure = case.failure();
    assert_eq!(failure.code, FailureCode::InvalidEncoding);
    assert!(failure.message.contains("line 3") && failure.message.contains("byte 5"), "{failure:?}");
    let case = case.skip();
    assert_eq!(case.rows(), [text("good one"), text("good two")]);
    assert_eq!(case.bad_rows()[0].line, 3);
}

#[test]
fn a_broken_array_fails_the_file() {
    for (content, word) in [
        (&br#"[{"text": "a"}, {"text": "b"}"#[..], "inside the array"),
        (br#"[{"text": "a"}, {"text": "b"#, "inside a row"),
        (br#"[{"text": "a"} {"text": "b"}]"#, "no comma"),
        (br#"[{"text": "a"},]"#, "punctuation"),
        (br#"[{"text": "a"}] x"#, "follows the array"),
        (br#"[,]"#, "punctuation"),
    ] {
        let failure = Case::new(&[("a.json", content)]).skip().failure();
        assert_eq!(failure.code, FailureCode::BadRows);
        assert!(failure.message.contains(word), "{failure:?}");
    }
    let bad = Case::new(&[("a.json", br#"[{"text": "]}\"[{"}, 5, {"text": "b"}]"#)]).bad_row();
    assert_eq!((bad.line, bad.code), (2, RowCode::WrongType));
}

#[test]
fn the_codes_of_rows_are_their_names() {
    for code in RowCode::ALL {
        assert_eq!(serde_json::to_value(code).expect("a text"), code.as_str());
    }
}

#[test]
fn names_and_keys_from_files_are_shown_harmlessly() {
    let key = "k\\u0000\\u001b[31m".to_owned() + &"y".repeat(100);
    let bad = Case::new(&[("a\u{0}\n.jsonl", format!("{{\"{key}\": 1}}").as_bytes())]).bad_row();
    assert!(!bad.name.contains(char::is_control) && !bad.keys[0].contains(char::is_control), "{bad:?}");
    assert_eq!(bad.keys[0].chars().count(), 65);
}

#[test]
fn half_of_a_pair_is_told_what_is_missing_also_beside_a_text() {
    for (row, field) in [("{\"text\": \"a\", \"question\": \"b\"}", "answer"), ("{\"output\": \"b\"}", "instruction")] {
        let bad = Case::new(&[("a.jsonl", row.as_bytes())]).bad_row();
        assert_eq!((bad.code, bad.field.as_deref()), (RowCode::MissingField, Some(field)));
    }
    assert_eq!(Case::new(&[("a.jsonl", b"{\"text\": \"a\", \"question\": null}")]).rows(), [text("a")]);
}

#[test]
fn several_files_are_read_in_their_order_and_progress_reaches_the_end() {
    let case = Case::new(&[("a.txt", b"first"), ("b.jsonl", b"{\"text\": \"second\"}"), ("c.csv", b"text,n\nthird,1\n")]);
    assert_eq!(case.rows(), [text("first"), text("second"), text("third")]);
    let spec = IngestSpec {
        source: Source::Files(case.source.clone()),
        output: case.output(),
        max_bytes: 1 << 20,
        max_ratio: 100,
        max_line_bytes: 1 << 20,
    };
    let mut last = IngestProgress::default();
    run(spec.clone(), &mut |progress| last = progress, &AtomicBool::new(false)).unwrap();
    assert_eq!((last.done, last.total, last.rows, last.bad_rows), (5 + 18 + 15, 38, 3, 0));

    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<IngestSpec>(&json).unwrap(), spec);
}

#[test]
fn a_task_reports_progress_and_its_result() {
    let case = Case::new(&[("a.jsonl", b"{\"text\": \"one\"}\n{\"x\": 1}\n")]).skip();
    let spec = json!({
        "source": {"type": "files", "files": case.source.files, "on_bad_row": "skip"}, "output": case.output(), "max_bytes": 1000,
    });
    let mut reports = Vec::new();
    let result = task(spec, &AtomicBool::new(false), &mut |report| reports.push(report)).unwrap();
    assert_eq!(reports.last(), Some(&Report::Progress { step: 2, seconds_per_step: None }));
    let TaskResult::Dataset { folder, sha256, statistics } = result else { panic!("{result:?}") };
    assert_eq!((folder, sha256.len(), &statistics["rows"], &statistics["bad_rows"]), (case.output(), 64, &json!(1), &json!(1)));
    let failure = task(json!({"source": {}}), &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert_eq!(failure.code, FailureCode::Internal);
}

#[test]
fn stopping_ends_within_a_row_and_leaves_no_dataset() {
    let case = Case::new(&[("a.jsonl", "{\"text\": \"row\"}\n".repeat(10_000).as_bytes())]);
    let stop = AtomicBool::new(false);
    let spec = IngestSpec {
        source: Source::Files(case.source.clone()),
        output: case.output(),
        max_bytes: 1 << 30,
        max_ratio: 100,
        max_line_bytes: 1 << 20,
    };
    stop.store(true, Ordering::Relaxed);
    let failure = run(spec, &mut |_| {}, &stop).unwrap_err();
    assert!(failure.retryable);
    assert!(!case.output().join("manifest.json").exists());
}

mod parquet_files {
    use std::sync::Arc;

    use ::parquet::{
        basic::Compression,
        data_type::{ByteArray, ByteArrayType, Int64Type},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };

    use super::*;

    /// Two text columns and a number, with a null answer in the last row.
    fn qa(rows: usize, compression: Compression) -> Vec<u8> {
        let schema = "message schema { required binary question (UTF8); optional binary answer (UTF8); required int64 id; }";
        let properties = WriterProperties::builder().set_compression(compression).build();
        let mut bytes = Vec::new();
        let mut writer =
            SerializedFileWriter::new(&mut bytes, Arc::new(parse_message_type(schema).unwrap()), Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts =
            |prefix: &str, count: usize| (0..count).map(|n| ByteArray::from(format!("{prefix}{n}").as_str())).collect::<Vec<_>>();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts("q", rows), None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let levels: Vec<i16> = (0..rows).map(|n| i16::from(n + 1 < rows)).collect();
        column.typed::<ByteArrayType>().write_batch(&texts("a", rows - 1), Some(&levels), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&(0..rows as i64).collect::<Vec<_>>(), None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn records_are_rows() {
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(Default::default()),
            Compression::GZIP(Default::default()),
        ] {
            let case = Case::new(&[("data", &qa(1_000, compression))]).skip();
            let rows = case.rows();
            assert_eq!(rows.len(), 999);
            assert_eq!(rows[7], pair("q7", "", "a7"));
            let bad = &case.bad_rows()[0];
            assert_eq!((bad.line, bad.code, bad.field.as_deref()), (1_000, RowCode::MissingField, Some("answer")));
            assert_eq!(bad.keys, ["question", "answer", "id"]);
        }
        let case = Case::new(&[("data.parquet.gz", &gzip(&qa(100, Compression::UNCOMPRESSED)))]).skip();
        assert_eq!(case.rows().len(), 99);
        let case = Case::new(&[("data", &qa(5, Compression::SNAPPY))]).columns(&[(Role::Text, "question")]);
        assert_eq!(case.rows()[4], text("q4"));
    }

    #[test]
    fn wrong_columns_and_damage_are_named() {
        let bytes = qa(100, Compression::SNAPPY);
        let bad = Case::new(&[("data", &bytes)]).columns(&[(Role::Text, "body")]).bad_row();
        assert_eq!(
            (bad.field.as_deref(), bad.keys),
            (Some("body"), vec!["question".to_owned(), "answer".to_owned(), "id".to_owned()])
        );
        let bad = Case::new(&[("data", &qa(1, Compression::SNAPPY))]).columns(&[(Role::Text, "id")]).bad_row();
        assert_eq!(bad.code, RowCode::WrongType);
        for end in [4, 8, bytes.len() / 2, bytes.len() - 1] {
            assert_eq!(Case::new(&[("data.parquet", &bytes[..end])]).failure().code, FailureCode::TruncatedFile);
        }
    }

    #[test]
    fn lists_of_messages_are_read() {
        let schema = "message schema { required group messages (LIST) { repeated group list { required group element {
            required binary role (UTF8); required binary content (UTF8); } } } }";
        let mut bytes = Vec::new();
        let mut writer =
            SerializedFileWriter::new(&mut bytes, Arc::new(parse_message_type(schema).unwrap()), Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for values in [["user", "assistant"], ["hello", "goodbye"]] {
            let mut column = group.next_column().unwrap().unwrap();
            let values = values.map(ByteArray::from);
            column.typed::<ByteArrayType>().write_batch(&values, Some(&[1, 1]), Some(&[0, 1])).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        assert_eq!(Case::new(&[("chat.parquet", &bytes)]).rows(), [pair("hello", "", "goodbye")]);
    }
}

mod templates {
    use std::collections::HashSet;

    use super::*;

    struct Rules {
        folder: tempfile::TempDir,
    }

    impl Rules {
        fn new() -> Rules {
            Rules { folder: tempfile::tempdir().unwrap() }
        }

        fn make(
            &self,
            name: &str,
            rows: u64,
            seed: u64,
            exclude: &[&str],
            templates: serde_json::Value,
        ) -> Result<Vec<Row>, Failure> {
            let output = self.folder.path().join(name);
            let source = TemplateSource {
                rows,
                seed,
                templates: serde_json::from_value(templates).unwrap(),
                exclude: exclude.iter().map(|name| self.folder.path().join(name)).collect(),
            };
            let spec = IngestSpec {
                source: Source::Template(source),
                output: output.clone(),
                max_bytes: 1 << 30,
                max_ratio: 100,
                max_line_bytes: 1 << 20,
            };
            let ingested = run(spec, &mut |_| {}, &AtomicBool::new(false))?;
            assert_eq!((ingested.manifest.rows, ingested.manifest.duplicates), (rows, 0));
            Ok(super::rows(&output))
        }
    }

    fn parts(row: &Row) -> (&str, &str) {
        match row {
            Row::Conversation { turns, .. } => (&turns[0].instruction, &turns[0].output),
            Row::Text { .. } => panic!("rules make conversations"),
        }
    }

    #[test]
    fn answers_are_computed_and_the_seed_decides_all() {
        let sums = json!([{"instruction": "What is {{ a }} plus {{ b }}?", "output": "{{ a + b }}",
            "variables": {"a": {"range": [0, 99]}, "b": {"range": [0, 99]}}}]);
        let rules = Rules::new();
        let rows = rules.make("one", 500, 7, &[], sums.clone()).unwrap();
        for row in &rows {
            let (question, answer) = parts(row);
            let numbers: Vec<i64> = question.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
            assert_eq!(answer.parse::<i64>().unwrap(), numbers[0] + numbers[1]);
        }
        assert_eq!(rules.make("two", 500, 7, &[], sums.clone()).unwrap(), rows);
        assert_ne!(rules.make("three", 500, 8, &[], sums).unwrap(), rows);
    }

    #[test]
    fn filters_serve_the_usual_answers() {
        let one = |output: &str, variables: serde_json::Value| {
            let template = json!([{"instruction": "{{ x }}", "output": output, "variables": variables}]);
            parts(&Rules::new().make("d", 1, 1, &[], template).unwrap()[0]).1.to_owned()
        };
        let letters = json!({"x": {"choice": ["cab"]}});
        assert_eq!(one("{{ x|upper }}", letters.clone()), "CAB");
        assert_eq!(one("{{ x|reverse }}", letters.clone()), "bac");
        assert_eq!(one("{{ x|list|sort|join(' ') }}", letters.clone()), "a b c");
        assert_eq!(one("{{ x|list|reverse|join(' ') }}", letters.clone()), "b a c");
        assert_eq!(one("{{ x|length }}", letters), "3");
        let number = json!({"x": {"range": [7, 7]}});
        assert_eq!(one("{{ '%02d:00'|format(x) }}", number.clone()), "07:00");
        assert_eq!(one("{{ x|pad(3) }}", number.clone()), "007");
        assert_eq!(one("{{ 'even' if x % 2 == 0 else 'odd' }}", number.clone()), "odd");
        assert_eq!(one("{{ [x, 12]|max }}", number), "12");
        let month = json!({"x": {"choice": [{"name": "July", "number": 7}]}});
        assert_eq!(one("2036-{{ x.number|pad(2) }}-{{ x.name[:3] }}", month), "2036-07-Jul");
        let list = json!({"x": {"sample": {"from": [3, 1, 2], "count": 3}}});
        assert_eq!(one("{{ x|sort|join(', ') }}", list), "1, 2, 3");
    }

    #[test]
    fn wordings_and_templates_share_the_rows_out() {
        let templates = json!([
            {"family": "up", "instruction": ["Upper {{ w }}", "Make {{ w }} upper"], "output": "{{ w|upper }}", "variables": {"w": {"letters": 3}}},
            {"family": "digits", "instruction": "Say {{ d }}", "input": "aloud", "output": "{{ d }}", "variables": {"d": {"digits": 4}}}
        ]);
        let rows = Rules::new().make("d", 401, 1, &[], templates).unwrap();
        let count = |prefix: &str| rows.iter().filter(|row| parts(row).0.starts_with(prefix)).count();
        assert_eq!((count("Upper") + count("Make"), count("Say")), (201, 200));
        assert!(count("Upper") > 60 && count("Make") > 60);
    }

    #[test]
    fn excluded_variables_come_back_under_no_wording_and_in_no_order() {
        let templates = |word: &str| {
            json!([{"family": "sort", "key": "{{ d|sort|join(',') }}", "instruction": [format!("{word} {{{{ d|join(' ') }}}}")],
                "output": "{{ d|sort|join(' ') }}", "variables": {"d": {"sample": {"from": [0,1,2,3,4,5,6,7,8,9], "count": 4, "repeat": true}}}}])
        };
        let rules = Rules::new();
        let held_out = rules.make("test", 100, 1, &[], templates("Sort")).unwrap();
        let train = rules.make("train", 3_000, 1, &["test"], templates("Order")).unwrap();
        let answers = |rows: &[Row]| rows.iter().map(|row| parts(row).1.to_owned()).collect::<HashSet<_>>();
        assert!(answers(&held_out).is_disjoint(&answers(&train)));
        assert_eq!(std::fs::metadata(rules.folder.path().join("train/keys.bin")).unwrap().len(), 16 * 3_000);

        // Without a key the variables themselves are excluded, whatever the wording.
        let plain = |word: &str| json!([{"instruction": format!("{word} {{{{ a }}}}"), "output": "{{ a }}", "variables": {"a": {"range": [1, 100]}}}]);
        let first = rules.make("first", 60, 1, &[], plain("Say")).unwrap();
        let second = rules.make("second", 40, 1, &["first"], plain("Tell")).unwrap();
        assert_eq!(answers(&first).union(&answers(&second)).count(), 100);
    }

    #[test]
    fn other_families_are_not_excluded_by_key_and_files_are_by_content() {
        let family = |family: &str| json!([{"family": family, "instruction": "Say {{ a }}", "output": family, "variables": {"a": {"range": [1, 10]}}}]);
        let rules = Rules::new();
        rules.make("one", 10, 1, &[], family("one")).unwrap();
        rules.make("two", 10, 1, &["one"], family("two")).unwrap();

        let case = Case::new(&[("a.jsonl", br#"{"instruction": "Say 3", "output": "one"}"#)]);
        case.run().unwrap();
        let from_files = case.output();
        let rows = rules.make("three", 9, 1, &[from_files.to_str().unwrap()], family("one")).unwrap();
        assert!(rows.iter().all(|row| parts(row).0 != "Say 3"));
    }

    #[test]
    fn too_few_combinations_are_a_failure_with_numbers() {
        let templates = json!([{"family": "coin", "instruction": "{{ c }}", "output": "{{ c }}", "variables": {"c": {"choice": ["a", "b", "b"]}}}]);
        let rules = Rules::new();
        let failure = rules.make("d", 3, 1, &[], templates.clone()).unwrap_err();
        assert_eq!(failure.code, FailureCode::NotEnoughDistinctRows);
        assert!(
            failure.message.contains("(coin)")
                && failure.message.contains("2 of the 3")
                && failure.message.contains("all 3 combinations"),
            "{failure:?}"
        );
        rules.make("d", 2, 1, &[], templates.clone()).unwrap();
        let failure = rules.make("e", 1, 1, &["d"], templates).unwrap_err();
        assert!(failure.message.contains("3 belong to excluded"), "{failure:?}");
    }

    #[test]
    fn bad_templates_are_named_by_their_path() {
        let cases = [
            (json!({"instruction": "{{ a", "output": "x"}), "instruction"),
            (json!({"instruction": ["fine", "{% if %}"], "output": "x"}), "instruction[1]"),
            (json!({"instruction": [], "output": "x"}), "instruction"),
            (json!({"instruction": "i", "output": "{{ missing }}"}), "output"),
            (json!({"instruction": "i", "output": " "}), "output"),
            (json!({"instruction": "i", "output": "{{ 1 / 0 }}x{{ a.b.c }}"}), "output"),
            (
                json!({"instruction": "i", "output": "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}"}),
                "output",
            ),
            (json!({"instruction": "i", "output": "{{ 'x' * 1000000000 }}"}), "output"),
            (json!({"instruction": "i", "output": "{{ 1|pad(1000000000) }}"}), "output"),
            (json!({"instruction": "i", "output": "{% include 'x' %}"}), "output"),
            (json!({"instruction": "i", "output": "o", "variables": {"a": {"range": [2, 1]}}}), "variables.a"),
            (json!({"instruction": "i", "output": "o", "variables": {"a b": {"range": [1, 2]}}}), "variables.a b"),
            (json!({"instruction": "i", "output": "o", "variables": {"a": {"letters": 90}}}), "variables.a"),
        ];
        for (template, field) in cases {
            let failure = Rules::new().make("d", 1, 1, &[], json!([template])).unwrap_err();
            assert_eq!(failure.code, FailureCode::BadTemplate, "{failure:?}");
            assert_eq!(failure.param, Some(format!("source.templates[0].{field}")), "{failure:?}");
        }
        assert_eq!(check_templates(&[]).unwrap_err().code, FailureCode::BadTemplate);
    }
}
