//! The flow of training on a real server: a dataset by rule, a tokenizer, a tiny GPT, its tuning;
//! pausing, resuming, cancelling; a stream of events that goes on where it broke off.

use futures_util::StreamExt;
use lathe_tests::TestApp;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}"))
}

/// A dataset of small sums and a tokenizer made of it; neither is waited for.
pub async fn ingredients(app: &TestApp) -> (Value, Value) {
    let source = json!({"type": "template", "rows": 200, "seed": 7, "templates": [
        {"instruction": "What is {{ a }} plus {{ b }}?", "output": "{{ a + b }}", "variables": {"a": {"range": [0, 99]}, "b": {"range": [0, 99]}}}]});
    let dataset = app.post_json("/v1/datasets", &json!({"name": "sums", "source": source})).await.ok()["id"].clone();
    let tokenizer = json!({"name": "small", "type": "bpe", "dataset": dataset, "vocab_size": 280});
    (dataset, app.post_json("/v1/tokenizers", &tokenizer).await.ok()["id"].clone())
}

pub fn pretraining((dataset, tokenizer): &(Value, Value), steps: u64) -> Value {
    json!({"method": {"type": "pretrain", "objective": "causal_lm"},
           "model": {"architecture": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 32},
           "dataset": dataset, "tokenizer": tokenizer, "validation": {"fraction": 0.1},
           "hyperparameters": {"steps": steps, "batch_size": 4, "precision": "fp32", "seed": 1, "evaluate_every": 20}})
}

pub fn path(job: &Value) -> String {
    format!("/v1/training/jobs/{}", text(&job["id"]))
}

/// A tiny pretrained model's id.
pub async fn pretrained(app: &TestApp) -> String {
    let ingredients = ingredients(app).await;
    let job = app.post_json("/v1/training/jobs", &pretraining(&ingredients, 40)).await.ok();
    let job = app.wait_for(&path(&job), &["succeeded"]).await;
    text(&job["model"]).to_owned()
}

#[tokio::test]
async fn from_rules_to_a_tuned_model() {
    let app = TestApp::start().await;
    let ingredients = ingredients(&app).await;
    // Everything is asked for before anything is ready: the jobs wait for one another.
    let pretraining = app.post_json("/v1/training/jobs", &pretraining(&ingredients, 40)).await.ok();
    let tuning = json!({"method": {"type": "instruction", "template": "ins"}, "base_model": pretraining["model"], "dataset": ingredients.0,
        "hyperparameters": {"steps": 20, "batch_size": 4, "precision": "fp32"}, "name": "sums"});
    let tuning = app.post_json("/v1/training/jobs", &tuning).await.ok();
    assert_eq!(tuning["state"], "blocked");

    let done = app.wait_for(&path(&pretraining), &["succeeded"]).await;
    assert_eq!((&done["step"], &done["steps"], &done["error"]), (&json!(40), &json!(40), &Value::Null));
    assert!(
        done["hyperparameters"]["micro_batch_size"].is_u64() && done["hyperparameters"]["schedule"]["warmup_steps"].is_u64(),
        "{done}"
    );
    assert!(!done["checkpoints"].as_array().expect("a list").is_empty());
    let metrics = app.get(&format!("{}/metrics", path(&pretraining))).await.ok();
    let losses: Vec<f64> = metrics["data"].as_array().expect("a list").iter().filter_map(|row| row["loss"].as_f64()).collect();
    assert_eq!(losses.len(), 40);
    assert!(losses[39] < losses[0], "the loss falls: {losses:?}");
    assert!(metrics["data"].as_array().expect("a list").iter().any(|row| row["validation_loss"].is_f64()));

    let tuned = app.wait_for(&path(&tuning), &["succeeded"]).await;
    let model = app.get(&format!("/v1/models/{}", text(&tuned["model"]))).await.ok();
    assert_eq!((&model["state"], &model["template"]), (&json!("ready"), &json!("ins")));
    let listed = app.get("/v1/fine_tuning/jobs").await.ok();
    assert_eq!((listed["data"].as_array().map(Vec::len), &listed["data"][0]["fine_tuned_model"]), (Some(1), &tuned["model"]));

    // Nothing is lost and nothing comes twice between a stream's end and its resumption.
    let all = follow(&app, &path(&tuning), None).await;
    let rest = follow(&app, &path(&tuning), Some(2)).await;
    assert_eq!(all, (1..=all.len() as u64).collect::<Vec<_>>());
    assert_eq!(rest, all[2..]);
}

/// The request of the smallest model that is worth training, and how soon it has taken a step.
#[tokio::test]
async fn the_first_step_ends_within_three_seconds_of_the_claim() {
    let app = TestApp::start().await;
    let (dataset, tokenizer) = ingredients(&app).await;
    let body = json!({"method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64},
        "dataset": dataset, "tokenizer": tokenizer, "validation": {"fraction": 0.05},
        "hyperparameters": {"steps": 10, "batch_size": 12, "micro_batch_size": 12, "precision": "bf16", "seed": 1, "clip": 1.0,
            "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"type": "cosine", "peak": 1e-3, "warmup_steps": 2, "floor": 1e-4},
            "checkpoint_every": 200, "evaluate_every": 200, "keep_checkpoints": 2},
        "name": "small", "priority": 0, "after": [], "metadata": {}});
    let mut seconds = Vec::new();
    // The first job makes the token shards. Of the others the quickest counts: the slower ones measure
    // what else the machine does.
    for _ in 0..4 {
        let job = app.post_json("/v1/training/jobs", &body).await.ok();
        let done = app.wait_for(&path(&job), &["succeeded"]).await;
        let time = |field: &str| done[field].as_f64().unwrap_or_else(|| panic!("no {field}: {done}"));
        seconds.push(time("first_step_at") - time("started_at"));
        assert!(done["tokens_per_second"].as_f64() > Some(0.0), "{done}");
    }
    println!("from the claim to the first step: {seconds:?}");
    let quickest = seconds[1..].iter().copied().fold(f64::INFINITY, f64::min);
    assert!(quickest < 3.0, "{seconds:?}");
}

/// From queued to claimed, by the database's clock, on a runner that has nothing else to do.
#[tokio::test]
async fn an_idle_runner_claims_within_a_tenth_of_a_second() {
    let app = TestApp::start().await;
    for n in 0..15 {
        let source = json!({"type": "template", "rows": 1, "seed": n, "templates": [{"instruction": "a", "output": "b"}]});
        let dataset = app.post_json("/v1/datasets", &json!({"name": "one row", "source": source})).await.ok();
        app.wait_for(&format!("/v1/datasets/{}", text(&dataset["id"])), &["ready"]).await;
    }
    let mut conn = PgConnection::connect(&app.database_url()).await.expect("the database is there");
    let mut seconds: Vec<f64> = sqlx::query_scalar(
        "SELECT extract(epoch FROM a.started_at - j.queued_at)::float8 FROM jobs j JOIN job_attempts a ON a.job_id = j.id AND a.n = 1",
    )
    .fetch_all(&mut conn)
    .await
    .expect("the tables are there");
    seconds.sort_by(f64::total_cmp);
    println!("from queued to claimed: median {} s, slowest {} s", seconds[7], seconds[14]);
    assert!(seconds[0] > 0.0 && seconds[7] < 0.1, "{seconds:?}");
}

#[tokio::test]
async fn a_job_pauses_goes_on_and_is_cancelled() {
    let app = TestApp::start().await;
    let ingredients = ingredients(&app).await;
    let job = app.post_json("/v1/training/jobs", &pretraining(&ingredients, 1_000_000)).await.ok();
    let path = path(&job);
    let live = follow(&app, &path, None);
    let control = async {
        stepped(&app, &path, 0).await;
        app.post(&format!("{path}/pause")).await.ok();
        let paused = app.wait_for(&path, &["paused"]).await;
        let step = paused["step"].as_u64().expect("a step");
        app.post(&format!("{path}/resume")).await.ok();
        stepped(&app, &path, step).await;
        app.post(&format!("{path}/cancel")).await.ok();
        loop {
            let job = app.get(&path).await.ok();
            if job["state"] == "cancelled" {
                return;
            }
            assert_eq!(job["state"], "cancelling");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    // The stream, opened before anything happened, ends by itself when the job does.
    let (events, ()) = tokio::join!(live, control);
    assert_eq!(events, (1..=events.len() as u64).collect::<Vec<_>>());
    app.post(&format!("{path}/resume")).await.refused(409);
    app.delete(&path).await.ok();
    app.get(&path).await.refused(404);
}

/// Skipped ones count: with this rate and without a moving average, the weights soon make no finite gradient.
#[tokio::test]
async fn a_job_that_has_succeeded_has_taken_all_its_steps() {
    let app = TestApp::start().await;
    let mut body = pretraining(&ingredients(&app).await, 20);
    body["model"]["norm"] = json!("rms");
    body["hyperparameters"] = json!({"steps": 20, "batch_size": 4, "precision": "fp32", "clip": 1e9,
        "schedule": {"type": "constant", "peak": 10, "warmup_steps": 0}, "optimizer": {"eps": 1e-300, "betas": [0, 0]},
        "divergence": {"window": 1, "patience": 1000, "factor": 1e6, "non_finite_steps": 1000}});
    let job = app.post_json("/v1/training/jobs", &body).await.ok();
    let job = app.wait_for(&path(&job), &["succeeded"]).await;
    let events = app.get(&format!("{}/events", path(&job))).await.ok();
    let mut skipped = events["data"].as_array().expect("a list").iter().filter(|event| event["code"] == "step.skipped");
    assert_eq!(skipped.next_back().map(|event| &event["data"]["step"]), Some(&json!(20)), "{events}");
    assert_eq!((&job["step"], &job["steps"]), (&json!(20), &json!(20)));
}

/// Waits until a job has finished a step beyond `step`.
async fn stepped(app: &TestApp, path: &str, step: u64) {
    loop {
        let job = app.wait_for(path, &["blocked", "queued", "running"]).await;
        if job["step"].as_u64() > Some(step) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// The ids of a job's events, streamed to the end.
async fn follow(app: &TestApp, path: &str, after: Option<u64>) -> Vec<u64> {
    let mut request = app.request(Method::GET, &format!("{path}/events")).header("accept", "text/event-stream");
    if let Some(after) = after {
        request = request.header("last-event-id", after);
    }
    let mut stream = request.send().await.expect("the server answers").bytes_stream();
    let mut text = String::new();
    while let Some(chunk) = stream.next().await {
        text += &String::from_utf8_lossy(&chunk.expect("the stream ends whole"));
    }
    text.lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect()
}
