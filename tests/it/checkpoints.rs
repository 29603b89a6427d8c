//! Checkpoints as models: they answer, they are tuned from, they stay while they are needed, and are
//! unknown once they are gone.

use lathe_tests::TestApp;
use serde_json::{Value, json};

use crate::training::{ingredients, path, text};

/// A greedy completion of a few tokens with their log probabilities.
fn question(model: &Value) -> Value {
    json!({"model": model, "prompt": "What is 1 plus 2?", "max_tokens": 6, "temperature": 0, "logprobs": 0})
}

#[tokio::test]
async fn a_checkpoint_answers_and_is_tuned_like_a_model() {
    let app = TestApp::start().await;
    let (dataset, tokenizer) = ingredients(&app).await;
    let request = json!({"method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 32},
        "dataset": dataset, "tokenizer": tokenizer,
        "hyperparameters": {"steps": 40, "batch_size": 4, "precision": "fp32", "seed": 1, "checkpoint_every": 10, "keep_checkpoints": 2}});
    let job = app.post_json("/v1/training/jobs", &request).await.ok();
    let job = app.wait_for(&path(&job), &["succeeded"]).await;
    let listed = app.get(&format!("{}/checkpoints", path(&job))).await.ok();
    let names: Vec<&Value> = listed["data"].as_array().expect("a list").iter().map(|one| &one["model"]).collect();
    assert_eq!(
        names,
        [&json!(format!("{}:ckpt-step-40", text(&job["model"]))), &json!(format!("{}:ckpt-step-30", text(&job["model"])))]
    );

    // The last checkpoint is the model; the one before it is not.
    let of_model = app.post_json("/v1/completions", &question(&job["model"])).await.ok();
    let of_last = app.post_json("/v1/completions", &question(names[0])).await.ok();
    assert_eq!(of_last["choices"], of_model["choices"]);
    assert_eq!(&of_last["model"], names[0]);
    let of_earlier = app.post_json("/v1/completions", &question(names[1])).await.ok();
    assert_ne!(of_earlier["choices"][0]["logprobs"], of_model["choices"][0]["logprobs"]);
    let found = app.get(&format!("/v1/models/{}", text(names[1]))).await.ok();
    assert_eq!((&found["id"], &found["state"], &found["lineage"]["job"]), (names[1], &json!("ready"), &job["id"]));

    // Pruned, never saved, or of nothing: all the same.
    for unknown in [
        format!("{}:ckpt-step-10", text(&job["model"])),
        format!("{}:ckpt-step-7", text(&job["model"])),
        "model-0:ckpt-step-1".into(),
    ] {
        let asked = app.post_json("/v1/completions", &question(&json!(unknown))).await;
        assert_eq!(asked.refused(404)["code"], "model_not_found", "{unknown}");
        app.get(&format!("/v1/models/{unknown}")).await.refused(404);
    }

    // Another project's checkpoint is as unknown as its model.
    let project = app.post_json("/v1/projects", &json!({"name": "others"})).await.ok();
    let key = app.post_json(&format!("/v1/projects/{}/keys", text(&project["id"])), &json!({})).await.ok();
    app.with_key(text(&key["key"])).post_json("/v1/completions", &question(names[0])).await.refused(404);

    let tuning = json!({"method": {"type": "instruction", "template": "ins"}, "base_model": names[1], "dataset": request["dataset"],
        "hyperparameters": {"steps": 1_000_000, "batch_size": 4, "precision": "fp32"}, "name": "sums"});
    let mut unknown = tuning.clone();
    unknown["base_model"] = json!(format!("{}:ckpt-step-10", text(&job["model"])));
    assert_eq!(app.post_json("/v1/training/jobs", &unknown).await.refused(404)["param"], "base_model");
    let tuned = app.post_json("/v1/training/jobs", &tuning).await.ok();
    assert_eq!(tuned["state"], "queued", "what it starts from is there");
    let refused = app.delete(&path(&job)).await.refused(409);
    assert!(text(&refused["message"]).contains(text(&tuned["id"])), "{refused}");
    while app.wait_for(&path(&tuned), &["queued", "running"]).await["first_step_at"].is_null() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let model = app.get(&format!("/v1/models/{}", text(&tuned["model"]))).await.ok();
    assert_eq!(&model["lineage"]["base_model"], names[1]);
    app.post(&format!("{}/cancel", path(&tuned))).await.ok();
    while app.get(&path(&tuned)).await.ok()["state"] != "cancelled" {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }

    // With its job the checkpoint goes; the model stays.
    app.delete(&path(&job)).await.ok();
    app.post_json("/v1/completions", &question(names[0])).await.refused(404);
    app.post_json("/v1/completions", &question(&job["model"])).await.ok();
}
