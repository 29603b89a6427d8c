//! Trainings of several ranks, each a process, on one runner.

use std::time::{Duration, Instant};

use lathe_tests::{Kind, PATIENCE, TestApp};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::training::{ingredients, path, text};

const STEPS: u64 = 120;

async fn app(slots: u16) -> TestApp {
    TestApp::builder().argument(&format!("--cpu-slots={slots}")).start().await
}

fn request((dataset, tokenizer): &(Value, Value), parallelism: Value) -> Value {
    json!({"method": {"type": "pretrain"},
        "model": {"architecture": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 32, "dropout": 0.1},
        "dataset": dataset, "tokenizer": tokenizer, "validation": {"fraction": 0.1},
        "hyperparameters": {"steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "seed": 5,
            "checkpoint_every": 20, "evaluate_every": 40},
        "parallelism": parallelism})
}

/// As a job shows it.
fn parallelism(said: Value) -> Value {
    let mut whole = json!({"data": 1, "tensor": 1, "pipeline": 1, "zero": 0, "sequence": false, "schedule": "1f1b", "chunks": 1});
    whole.as_object_mut().expect("an object").extend(said.as_object().expect("an object").clone());
    whole
}

async fn create(app: &TestApp, request: &Value) -> Value {
    app.post_json("/v1/training/jobs", request).await.ok()
}

async fn weights(app: &TestApp, job: &Value) -> String {
    text(&app.get(&format!("/v1/models/{}", text(&job["model"]))).await.ok()["weights_sha256"]).to_owned()
}

/// The job once it has saved a checkpoint and has steps before it.
async fn midway(app: &TestApp, job: &Value) -> Value {
    let began = Instant::now();
    loop {
        let job = app.wait_for(&path(job), &["queued", "running"]).await;
        if job["checkpoints"].as_array().is_some_and(|saved| !saved.is_empty()) {
            return job;
        }
        assert!(began.elapsed() < PATIENCE, "no checkpoint: {job}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn losses(app: &TestApp, job: &Value) -> Vec<f64> {
    let metrics = app.get(&format!("{}/metrics", path(job))).await.ok();
    metrics["data"].as_array().expect("a list").iter().filter_map(|row| row["loss"].as_f64()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ranks_train_as_one_does_and_are_shown() {
    let app = app(2).await;
    let ingredients = ingredients(&app).await;
    let alone = create(&app, &request(&ingredients, json!({"data": 1}))).await;
    let alone = app.wait_for(&path(&alone), &["succeeded"]).await;
    assert_eq!((&alone["parallelism"], alone["ranks"].as_array().unwrap().len()), (&parallelism(json!({})), 1));

    let gang = create(&app, &request(&ingredients, json!({"data": 2}))).await;
    let running = midway(&app, &gang).await;
    assert_eq!(running["parallelism"], parallelism(json!({"data": 2})));
    let ranks = running["ranks"].as_array().expect("a list");
    for (number, rank) in ranks.iter().enumerate() {
        assert_eq!(
            (&rank["rank"], &rank["coordinates"]),
            (&json!(number), &json!({"data": number, "tensor": 0, "pipeline": 0})),
            "{rank}"
        );
        assert_eq!(rank["device"]["kind"], "cpu", "{rank}");
    }
    assert_eq!((ranks.len(), app.processes(Kind::Worker).len()), (2, 2));
    let gang = app.wait_for(&path(&gang), &["succeeded"]).await;
    assert_eq!(gang["ranks"][1]["state"], "ended");
    assert_eq!(gang["trained_tokens"], alone["trained_tokens"]);

    let (ours, theirs) = (losses(&app, &gang).await, losses(&app, &alone).await);
    assert_eq!((ours.len(), theirs.len()), (STEPS as usize, STEPS as usize));
    // After that, differences of rounding have grown.
    for (step, (a, b)) in ours.iter().zip(&theirs).enumerate().take(20) {
        assert!((a - b).abs() / b < 1e-4, "step {}: {a} for {b}", step + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_rank_is_killed_or_paused_the_weights_are_those_of_the_undisturbed_gang() {
    let app = app(2).await;
    let ingredients = ingredients(&app).await;
    let undisturbed = create(&app, &request(&ingredients, json!({"data": 2}))).await;
    let undisturbed = app.wait_for(&path(&undisturbed), &["succeeded"]).await;
    let expected = weights(&app, &undisturbed).await;
    for rank in 0..2 {
        let job = create(&app, &request(&ingredients, json!({"data": 2}))).await;
        midway(&app, &job).await;
        // The second rank is started first.
        let mut workers = app.processes(Kind::Worker);
        workers.sort();
        assert_eq!(workers.len(), 2, "{workers:?}");
        kill(workers[1 - rank], Signal::SIGKILL).expect("it is ours");
        let done = app.wait_for(&path(&job), &["succeeded"]).await;
        assert_eq!((&done["attempts"], &done["failures"]), (&json!(2), &json!(1)), "rank {rank}: {done}");
        assert_eq!(weights(&app, &done).await, expected, "rank {rank}");
    }
    let job = create(&app, &request(&ingredients, json!({"data": 2}))).await;
    midway(&app, &job).await;
    app.post(&format!("{}/pause", path(&job))).await.ok();
    app.wait_for(&path(&job), &["paused"]).await;
    app.post(&format!("{}/resume", path(&job))).await.ok();
    let done = app.wait_for(&path(&job), &["succeeded"]).await;
    assert_eq!((&done["attempts"], &done["failures"]), (&json!(2), &json!(0)), "{done}");
    assert_eq!(weights(&app, &done).await, expected);
}

/// Ranks of which none has all: their checkpoints are resumed from, served and tuned like any other.
#[tokio::test(flavor = "multi_thread")]
async fn what_ranks_have_in_shares_is_one_checkpoint_and_one_model() {
    let app = app(2).await;
    let ingredients = ingredients(&app).await;
    let alone = create(&app, &request(&ingredients, json!({}))).await;
    let alone = losses(&app, &app.wait_for(&path(&alone), &["succeeded"]).await).await;
    for layout in [json!({"tensor": 2, "sequence": true}), json!({"pipeline": 2}), json!({"data": 2, "zero": 3})] {
        let undisturbed = create(&app, &request(&ingredients, layout.clone())).await;
        let undisturbed = app.wait_for(&path(&undisturbed), &["succeeded"]).await;
        assert_eq!(undisturbed["parallelism"], parallelism(layout.clone()));
        for (step, (ours, theirs)) in losses(&app, &undisturbed).await.iter().zip(&alone).enumerate().take(20) {
            assert!((ours - theirs).abs() / theirs < 1e-4, "{layout}, step {}: {ours} for {theirs}", step + 1);
        }

        let job = create(&app, &request(&ingredients, layout.clone())).await;
        midway(&app, &job).await;
        kill(app.processes(Kind::Worker)[0], Signal::SIGKILL).expect("it is ours");
        let done = app.wait_for(&path(&job), &["succeeded"]).await;
        assert_eq!((&done["attempts"], &done["failures"]), (&json!(2), &json!(1)), "{layout}: {done}");
        assert_eq!(weights(&app, &done).await, weights(&app, &undisturbed).await, "{layout}");

        let listed = app.get(&format!("{}/checkpoints", path(&done))).await.ok();
        let last = &listed["data"][0]["model"];
        assert_eq!(*last, json!(format!("{}:ckpt-step-{STEPS}", text(&done["model"]))));
        let ask = |model: &Value| json!({"model": model, "prompt": "a", "max_tokens": 8, "temperature": 0, "logprobs": 1});
        let of_model = app.post_json("/v1/completions", &ask(&done["model"])).await.ok();
        let of_last = app.post_json("/v1/completions", &ask(last)).await.ok();
        assert_eq!(of_last["choices"], of_model["choices"], "{layout}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_divide_is_refused_and_what_nobody_can_hold_waits() {
    let app = app(2).await;
    let ingredients = ingredients(&app).await;
    let refused = app.post_json("/v1/training/jobs", &request(&ingredients, json!({"data": 3}))).await.refused(422);
    assert_eq!((&refused["code"], &refused["param"]), (&json!("layout_does_not_divide"), &json!("parallelism")));
    let message = text(&refused["message"]);
    assert!(
        message.contains("A batch of 8 is not a multiple of 3 data ranks") && message.contains(r#"{"data":4,"tensor":1"#),
        "{message}"
    );
    for (body, param) in [
        (json!({"data": 0}), "parallelism.data"),
        (json!({"zero": 4}), "parallelism.zero"),
        (json!({"schedule": "fifo"}), "parallelism.schedule"),
    ] {
        let refused = app.post_json("/v1/training/jobs", &request(&ingredients, body)).await.refused(400);
        assert_eq!(refused["param"], param);
    }
    let refused = app.post_json("/v1/training/jobs", &request(&ingredients, json!({"tensor": 4}))).await.refused(422);
    assert_eq!((&refused["code"], &refused["param"]), (&json!("heads_do_not_split"), &json!("parallelism")));

    let waiting = create(&app, &request(&ingredients, json!({"data": 4}))).await;
    let behind = create(&app, &request(&ingredients, json!({"data": 1}))).await;
    app.wait_for(&path(&behind), &["succeeded"]).await;
    assert_eq!(app.get(&path(&waiting)).await.ok()["state"], "queued");
    app.post(&format!("{}/cancel", path(&waiting))).await.ok();
}
