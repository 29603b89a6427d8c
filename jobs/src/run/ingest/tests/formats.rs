//! What is read from each format, in order and to the end.

use super::*;

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
