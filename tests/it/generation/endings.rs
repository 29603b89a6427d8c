//! How an answer ends that is not finished: its model goes, its time is over, nothing serves it.

use std::time::{Duration, Instant};

use lathe_api::state::ApiConfig;
use lathe_tests::{TestApp, within};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{COMPLETIONS, Live, broken, engine_load, open, stack, with};
use crate::{
    api::{Api, answer},
    handmade::{endless, scripted},
    training::text,
};

#[tokio::test]
async fn a_deleted_model_ends_its_streams_with_an_error() {
    let (app, model) = stack(endless(16_384)).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 16_000, "n": 2});
    let mut stream = open(&app, COMPLETIONS, &body).await;
    stream.next().await.expect("it has begun");
    let whole = app.post_json(COMPLETIONS, &body);
    let deletion = async {
        while engine_load(&app).await["open"] != 4 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        app.delete(&format!("/v1/models/{model}")).await.ok();
    };
    let (refused, ()) = tokio::join!(whole, deletion);
    assert_eq!(broken(stream).await["code"], "model_unloaded");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(refused.refused(503)["code"], "model_unloaded");
    assert_eq!(app.post_json(COMPLETIONS, &body).await.refused(404)["code"], "model_not_found");
    within(Duration::from_secs(10), "its engine goes", || app.processes(lathe_tests::Kind::Engine).is_empty().then_some(()));
}

#[tokio::test]
async fn an_answer_has_a_deadline() {
    let app = TestApp::builder().argument("--generation-seconds").argument("1").start().await;
    let model = endless(16_384).register(&app).await;
    let body = json!({"model": model, "prompt": "x", "max_tokens": 16_000, "n": 8});
    let answer = app.post_json(COMPLETIONS, &body).await;
    assert_eq!(answer.headers["x-should-retry"], "false");
    let refused = answer.refused(504);
    assert_eq!(refused["code"], "generation_deadline");
    assert!(text(&refused["message"]).contains("1 seconds"), "{refused}");
    assert_eq!(broken(open(&app, COMPLETIONS, &body).await).await["code"], "generation_deadline");
    let began = Instant::now();
    while engine_load(&app).await["open"] != 0 {
        assert!(began.elapsed() < Duration::from_secs(10), "late answers are still computed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn loading_is_waited_for_and_then_refused(db: PgPool) {
    let config = ApiConfig {
        loading_patience: Duration::from_millis(1500),
        stream_comments: Duration::from_millis(100),
        disk_low_bytes: 0,
        ..ApiConfig::default()
    };
    // No runner is there, so nothing is ever loaded.
    let api = Api::start_with(db, config).await;
    let model = scripted("a").register_in(&api.state.db, api.artifacts.path()).await;
    let body = json!({"model": model, "prompt": "x"});
    let response = api.request(Method::POST, COMPLETIONS).json(&body).send().await.expect("an answer");
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(response.status(), 503);
    assert_eq!(response.json::<Value>().await.expect("a refusal")["error"]["code"], "model_loading");
    let mut stream = Live::open(api.request(Method::POST, COMPLETIONS).json(&with(&body, json!({"stream": true})))).await;
    let error = stream.next().await.expect("an event");
    assert_eq!(error["error"]["code"], "model_loading");
    assert!(stream.comments > 0, "the connection was kept alive");
    assert_eq!(stream.next().await, None, "nothing follows an error");
    let queued: i64 = sqlx::query_scalar("SELECT count(*) FROM replicas WHERE state = 'queued'")
        .fetch_one(&api.state.db)
        .await
        .expect("a count");
    assert_eq!(queued, 1, "one replica is asked for, whoever asks");

    // Whoever waits for a model that is deleted hears so, and asks for no replica of what is gone.
    let waiting = tokio::spawn(answer(api.request(Method::POST, COMPLETIONS).json(&body)));
    let (status, _) = api.delete(&format!("/v1/models/{model}")).await;
    assert_eq!(status, 200);
    let (status, body) = waiting.await.expect("no panic");
    assert_eq!((status.as_u16(), &body["error"]["code"]), (404, &json!("model_not_found")));
}
