//! Tuning under a tokenizer that adds tokens to the base's: the embedding grows, and a tokenizer that is
//! no extension is refused, at once where it can be seen and else by the job.

use lathe_tests::TestApp;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::training::{ingredients, path, text};

/// The `tokenizer.json` of a ready tokenizer.
async fn document(app: &TestApp, tokenizer: &Value) -> Value {
    let mut conn = PgConnection::connect(&app.database_url()).await.expect("the database is there");
    let artifact: String = sqlx::query_scalar("SELECT artifact FROM tokenizers WHERE id = $1")
        .bind(text(tokenizer))
        .fetch_one(&mut conn)
        .await
        .expect("a tokenizer that is ready");
    let read = std::fs::read(app.artifacts().join(artifact).join("tokenizer.json")).expect("its file is there");
    serde_json::from_slice(&read).expect("it is JSON")
}

/// Uploads it; the tokenizer once it is ready.
async fn uploaded(app: &TestApp, name: &str, document: &Value) -> Value {
    let file = app.upload("tokenizer.json", "user_data", document.to_string()).await["id"].clone();
    let made = app.post_json("/v1/tokenizers", &json!({"name": name, "file": file})).await.ok();
    app.wait_for(&format!("/v1/tokenizers/{}", text(&made["id"])), &["ready"]).await
}

/// With two more tokens behind the others.
fn grown(document: &Value, vocabulary: u64) -> Value {
    let mut grown = document.clone();
    let tokens = grown["added_tokens"].as_array_mut().expect("a list");
    for offset in 0..2 {
        let mut token = tokens[0].clone();
        token["id"] = json!(vocabulary + offset);
        token["content"] = json!(format!("[NEW{offset}]"));
        tokens.push(token);
    }
    grown
}

/// With the ids of two bytes exchanged: as many tokens, and weights over them mean something else.
fn exchanged(document: &Value) -> Value {
    let mut other = document.clone();
    let tokens = other["model"]["vocab"].as_object_mut().expect("names and ids");
    let (a, b) = (tokens["a"].clone(), tokens["b"].clone());
    tokens.insert("a".to_owned(), b);
    tokens.insert("b".to_owned(), a);
    other
}

fn pretraining(dataset: &Value, tokenizer: &Value, steps: u64) -> Value {
    json!({"method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 32},
        "dataset": dataset, "tokenizer": tokenizer, "hyperparameters": {"steps": steps, "batch_size": 4, "precision": "fp32"}})
}

fn tuning(dataset: &Value, base: &Value, tokenizer: &Value) -> Value {
    json!({"method": {"type": "instruction", "template": "ins"}, "base_model": base, "tokenizer": tokenizer, "dataset": dataset,
        "hyperparameters": {"steps": 5, "batch_size": 4, "precision": "fp32"}})
}

#[tokio::test]
async fn a_tokenizer_that_adds_tokens_grows_the_model_and_another_is_refused() {
    let app = TestApp::start().await;
    let (dataset, tokenizer) = ingredients(&app).await;
    let base = app.post_json("/v1/training/jobs", &pretraining(&dataset, &tokenizer, 10)).await.ok();
    let base = app.wait_for(&path(&base), &["succeeded"]).await["model"].clone();
    let own = document(&app, &tokenizer).await;
    let larger = uploaded(&app, "larger", &grown(&own, 280)).await;
    assert_eq!((&larger["vocab_size"], &larger["added_roles"]), (&json!(282), &json!([])));

    let job = app.post_json("/v1/training/jobs", &tuning(&dataset, &base, &larger["id"])).await.ok();
    assert_eq!((&job["model_config"]["vocabulary"], &job["tokenizer"]), (&json!(282), &larger["id"]));
    let job = app.wait_for(&path(&job), &["succeeded"]).await;
    let events = app.get(&format!("{}/events", path(&job))).await.ok();
    let told = events["data"].as_array().expect("a list").iter().find(|event| event["code"] == "embedding.grown");
    assert_eq!(told.map(|event| &event["data"]), Some(&json!({"from": 280, "to": 282})), "{events}");
    let model = async |id: &Value| app.get(&format!("/v1/models/{}", text(id))).await.ok();
    let (before, after) = (model(&base).await, model(&job["model"]).await);
    assert_eq!((&after["config"]["vocabulary"], &after["lineage"]["tokenizer"]), (&json!(282), &larger["id"]));
    // Two rows more of the one table, which is the output layer too.
    let count = |model: &Value| model["parameters"].as_u64().expect("a count");
    assert_eq!(count(&after), count(&before) + 2 * 32);
    let question =
        json!({"model": job["model"], "messages": [{"role": "user", "content": "What is 1 plus 2?"}], "max_tokens": 4});
    assert!(app.post_json("/v1/chat/completions", &question).await.ok()["usage"]["prompt_tokens"].as_u64() > Some(2));

    // The base's own has fewer tokens than the grown model; another one has other tokens.
    let other = uploaded(&app, "other", &exchanged(&own)).await;
    assert_eq!(other["vocab_size"], 280);
    for (case, base, tokenizer) in [("fewer", &job["model"], &tokenizer), ("other tokens", &base, &other["id"])] {
        let refusal = app.post_json("/v1/training/jobs", &tuning(&dataset, base, tokenizer)).await.refused(422);
        assert_eq!(
            (&refusal["code"], &refusal["param"]),
            (&json!("invalid_tokenizer"), &json!("tokenizer")),
            "{case}: {refusal}"
        );
    }

    // Of a base that is not there yet, only the job can tell.
    let later = app.post_json("/v1/training/jobs", &pretraining(&dataset, &tokenizer, 10)).await.ok();
    let job = app.post_json("/v1/training/jobs", &tuning(&dataset, &later["model"], &other["id"])).await.ok();
    assert_eq!(job["state"], "blocked");
    let job = app.wait_for(&path(&job), &["failed"]).await;
    assert_eq!((&job["error"]["code"], &job["error"]["param"]), (&json!("invalid_tokenizer"), &json!("tokenizer")), "{job}");
}
