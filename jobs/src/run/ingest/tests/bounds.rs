//! Compression, and what would eat memory or disk.

use super::*;

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
fn an_unclosed_quote_does_not_eat_the_memory() {
    let mut case = Case::new(&[("a.csv", format!("text\n\"{}", "word\n".repeat(100_000)).as_bytes())]).skip();
    case.max_line_bytes = 10_000;
    let failure = case.failure();
    assert_eq!(failure.code, FailureCode::LineTooLong);
    assert!(failure.message.contains("quote"), "{failure:?}");
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
