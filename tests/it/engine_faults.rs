//! An engine that is killed, hangs or has too little memory: its streams end with an error, and the
//! next request gets a fresh replica or is told when to come again.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use lathe_tests::{Kind, TestApp, lathe};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::{
    generation::{COMPLETIONS, broken, open, with},
    handmade::endless,
};

/// From a fault to the end of the streams, and to the next answer.
const NOTICED: Duration = Duration::from_secs(25);

fn request(model: &str) -> Value {
    json!({"model": model, "prompt": "x", "max_tokens": 16_000, "seed": 1})
}

/// A signal to the engine in the middle of a stream: the stream ends with an error, the next request
/// is answered by another engine, and says the same as before.
async fn signalled(signal: Signal) {
    let app = TestApp::start().await;
    let model = endless(16_384).register(&app).await;
    let short = with(&request(&model), json!({"max_tokens": 8}));
    let before = app.post_json(COMPLETIONS, &short).await.ok();
    let mut stream = open(&app, COMPLETIONS, &request(&model)).await;
    stream.next().await.expect("it has begun");
    let engine = app.processes(Kind::Engine)[0];
    let fault = Instant::now();
    kill(engine, signal).expect("it is ours");
    // Asked in the middle of it: the request waits for the fresh engine.
    let (error, after) = tokio::join!(broken(stream), app.post_json(COMPLETIONS, &short));
    assert_eq!(error["code"], "engine_error");
    assert_eq!(after.ok()["choices"], before["choices"]);
    assert!(fault.elapsed() < NOTICED, "{:?}", fault.elapsed());
    println!("{signal}: noticed and replaced within {:?}", fault.elapsed());
    assert!(app.processes(Kind::Engine).iter().all(|other| *other != engine), "the old engine is gone");
}

#[tokio::test]
async fn a_killed_engine_ends_its_streams_and_is_replaced() {
    signalled(Signal::SIGKILL).await;
}

#[tokio::test]
async fn an_engine_that_hangs_is_noticed_and_replaced() {
    signalled(Signal::SIGSTOP).await;
}

/// Its address space is bounded here, as memory is by a machine; nothing of the weights is there to be read.
#[test]
fn an_engine_that_gets_too_little_memory_says_so() {
    let model = endless(64).of_width(65_536);
    let ended = Command::new("sh")
        .args(["-c", r#"ulimit -v 6000000; exec "$0" engine --model "$1" --listen 127.0.0.1:0"#])
        .arg(lathe())
        .arg(model.folder())
        .env("LATHE_ENGINE_SECRET", "secret")
        .output()
        .expect("a shell is there");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(!ended.status.success());
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    assert!(last.contains("memory"), "{said}");
}
