//! Parquet, made by its own crate.

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

/// `number` in the place of the varint that stands at `at`.
fn with_number(bytes: &[u8], at: usize, number: u32) -> Vec<u8> {
    let end = at + bytes[at..].iter().position(|byte| *byte < 0x80).unwrap() + 1;
    let mut zigzag = u64::from(number) << 1;
    let mut varint = Vec::new();
    while zigzag >= 0x80 {
        varint.push(zigzag as u8 | 0x80);
        zigzag >>= 7;
    }
    varint.push(zigzag as u8);
    [&bytes[..at], &varint, &bytes[end..]].concat()
}

/// What the decoder would reserve before it saw that nothing of it is true.
#[test]
fn a_header_that_asks_for_gigabytes_is_refused_before_they_are_reserved() {
    let bytes = qa(100, Compression::SNAPPY);
    // The first page is a dictionary: its type, what it unfolds to, and after the fourth field how many values.
    assert_eq!(bytes[4..7], [0x15, 4, 0x15]);
    let dictionary = bytes.windows(2).position(|pair| pair == [0x4c, 0x15]).unwrap();
    for at in [7, dictionary + 2] {
        let failure = Case::new(&[("data.parquet", &with_number(&bytes, at, i32::MAX as u32))]).failure();
        assert_eq!(failure.code, FailureCode::DecompressionLimit, "{failure:?}");
        assert!(failure.message.contains("data.parquet") && failure.message.contains("smaller pages"), "{failure:?}");
    }
}
