//! Bounds on what files may unfold to, on a real server with its flags.

use std::io::Write;

use lathe_tests::{PATIENCE, TestApp};
use serde_json::{Value, json};

use crate::training::text;

/// The dataset of one file, once it is made or has failed.
async fn made_of(app: &TestApp, filename: &str, content: &[u8]) -> Value {
    let file = app.upload(filename, "fine-tune", content).await;
    let source = json!({"type": "files", "files": [file["id"]], "documents": "line"});
    let dataset = app.post_json("/v1/datasets", &json!({"name": filename, "source": source})).await.ok();
    let began = std::time::Instant::now();
    loop {
        let dataset = app.get(&format!("/v1/datasets/{}", text(&dataset["id"]))).await.ok();
        if ["ready", "failed"].contains(&text(&dataset["state"])) {
            return dataset;
        }
        assert!(began.elapsed() < PATIENCE, "{dataset}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_ratio_of_decompression_is_a_flag() {
    // Of hexadecimal digits, half of each byte is needed: they unfold to about twice their size.
    let mut state = 1u64;
    let mut line = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        format!("{state:016x}\n")
    };
    let plain: String = (0..200_000).map(|_| line()).collect();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(plain.as_bytes()).expect("memory can be written");
    let packed = encoder.finish().expect("memory can be written");
    let app = TestApp::builder().argument("--decompression-ratio").argument("1").start().await;
    let refused = made_of(&app, "digits.txt.gz", &packed).await;
    assert_eq!(refused["error"]["code"], "decompression_limit", "{refused}");
    assert!(text(&refused["error"]["message"]).contains("more than 1 times its size"), "{refused}");
    let taken = made_of(&app, "digits.txt", plain.as_bytes()).await;
    assert_eq!((&taken["state"], &taken["rows"]), (&json!("ready"), &json!(200_000)), "{taken}");
}
