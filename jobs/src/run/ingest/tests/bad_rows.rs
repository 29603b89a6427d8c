//! What cannot be read, and what is said of it.

use super::*;

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
