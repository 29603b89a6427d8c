//! Many answers at a time: each as if it were alone, none in the other's way, and a queue with an end.

use std::time::{Duration, Instant};

use lathe_tests::TestApp;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{COMPLETIONS, Live, engine_load, open, stack, with};
use crate::handmade::endless;

/// Answers of 32 clients to requests of their own, with their log probabilities: one at a time, then
/// all at once.
async fn alone_and_together(app: &TestApp, model: &str) -> [Vec<Value>; 2] {
    let request = |index: usize| {
        let prompt: String = (0..1 + index * 5 % 29).map(|at| char::from(b'a' + ((index * 31 + at * 17) % 26) as u8)).collect();
        json!({"model": model, "prompt": prompt, "max_tokens": 20 + index % 9, "logprobs": 5, "seed": index, "temperature": index % 2})
    };
    let mut alone = Vec::new();
    for index in 0..32 {
        alone.push(app.post_json(COMPLETIONS, &request(index)).await.ok());
    }
    let asked = (0..32).map(async |index| app.post_json(COMPLETIONS, &request(index)).await.ok());
    [alone, futures_util::future::join_all(asked).await]
}

#[tokio::test]
async fn thirty_two_answers_at_once_equal_the_same_one_by_one() {
    let (app, model) = stack(endless(128)).await;
    let [alone, together] = alone_and_together(&app, &model).await;
    let mut compared = 0;
    for (index, (alone, together)) in alone.iter().zip(&together).enumerate() {
        let [a, b] = [alone, together].map(|answer| &answer["choices"][0]["logprobs"]);
        let tokens = a["tokens"].as_array().expect("a list").len();
        for at in 0..tokens {
            let [score, other] = [a, b].map(|logprobs| logprobs["token_logprobs"][at].as_f64().expect("a number"));
            if a["tokens"][at] != b["tokens"][at] {
                // Greedy, the likeliest two must be as good as equal; drawn, the number fell on a border.
                assert!(index % 2 == 1 || (score - other).abs() < 1e-4, "{index}: {a} {b}");
                break;
            }
            assert!((score - other).abs() < 1e-4, "{index}: {score} {other}");
            compared += 1;
        }
    }
    assert!(compared > 700, "{compared} tokens were compared");
}

#[tokio::test]
async fn deterministic_decoding_is_equal_to_the_bit() {
    let app = TestApp::builder().argument("--deterministic-decode").start().await;
    let model = endless(128).register(&app).await;
    let [alone, together] = alone_and_together(&app, &model).await;
    for (alone, together) in alone.iter().zip(&together) {
        assert_eq!(alone["choices"], together["choices"]);
    }
}

#[tokio::test]
async fn thirty_two_streams_progress_together_and_stop_when_their_clients_go() {
    let (app, model) = stack(endless(8192)).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 8000});
    let mut streams = futures_util::future::join_all((0..32).map(|_| open(&app, COMPLETIONS, &body))).await;
    for round in 0..20 {
        // Nobody has to end for another to go on.
        let pieces = futures_util::future::join_all(streams.iter_mut().map(Live::next)).await;
        assert!(pieces.iter().flatten().all(|piece| piece["choices"][0]["finish_reason"].is_null()), "in round {round}");
    }
    let load = engine_load(&app).await;
    assert_eq!(load["open"], 32);
    streams.truncate(1);
    let began = Instant::now();
    while engine_load(&app).await["open"] != 1 {
        assert!(began.elapsed() < Duration::from_secs(10), "sequences without a client go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A client that waits for the whole answer counts no less.
    let waiting = tokio::spawn(app.request(Method::POST, COMPLETIONS).json(&body).send());
    while engine_load(&app).await["open"] != 2 {
        assert!(began.elapsed() < Duration::from_secs(20), "the request does not arrive");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    waiting.abort();
    drop(streams);
    while engine_load(&app).await["open"] != 0 {
        assert!(began.elapsed() < Duration::from_secs(30), "sequences without a client go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let load = engine_load(&app).await;
    assert!(load["generated_tokens"].as_u64() < Some(33 * 8000 / 2), "they were stopped, not finished: {load}");
    // What has stopped computes nothing more.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(engine_load(&app).await["steps"], load["steps"]);
}

#[tokio::test]
async fn a_full_queue_refuses_and_lets_in_who_comes_when_there_is_room() {
    let (app, model) = stack(endless(8192)).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 8000, "n": 16});
    // 32 run and 256 wait: eighteen requests of sixteen sequences.
    let mut full = futures_util::future::join_all((0..18).map(|_| open(&app, COMPLETIONS, &body))).await;
    engine_load(&app).await;
    let began = Instant::now();
    while engine_load(&app).await["open"] != 288 {
        assert!(began.elapsed() < Duration::from_secs(20), "the queue is not full");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let one = with(&body, json!({"n": 1, "max_tokens": 1}));
    let answer = app.post_json(COMPLETIONS, &one).await;
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(answer.refused(429)["type"], "rate_limit_error");
    full.clear();
    while app.post_json(COMPLETIONS, &one).await.status != StatusCode::OK {
        assert!(began.elapsed() < Duration::from_secs(40), "there is no room");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
