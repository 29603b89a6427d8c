//! The audit log: every deed that the document knows leaves its entry, with the key that did it.

use lathe_jobs::audit::Deed;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::api::{Api, answer, refused};

/// `(type, resource, key)` of all entries, oldest first.
async fn entries(api: &Api, query: &str) -> Vec<(String, String, Option<String>)> {
    let (status, page) = api.get(&format!("/v1/audit?order=asc&limit=100{query}")).await;
    assert_eq!(status, 200, "{page}");
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let entry = |entry: &Value| {
        let (deed, resource) = (text(&entry["type"]).expect("a type"), text(&entry["resource_id"]).expect("a resource"));
        (deed, resource, text(&entry["actor"]["key_id"]))
    };
    page["data"].as_array().expect("a page").iter().map(entry).collect()
}

async fn created(api: &Api, path: &str, body: Value) -> String {
    let (status, made) = api.post(path, &body).await;
    assert!(status.is_success(), "{path}: {made}");
    made["id"].as_str().expect("an id").to_owned()
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn every_deed_leaves_its_entry_with_its_key(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let own: String =
        sqlx::query_scalar("SELECT id FROM api_keys WHERE name = 'bootstrap'").fetch_one(&db).await.expect("it is there");
    let file = api.upload("rows.jsonl", b"{\"text\": \"hello\"}\n").await["id"].as_str().expect("an id").to_owned();
    let begun = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
    let upload = created(&api, "/v1/uploads", begun).await;
    let dataset = created(&api, "/v1/datasets", json!({"name": "d", "source": {"type": "files", "files": [file]}})).await;
    let tokenizer =
        created(&api, "/v1/tokenizers", json!({"name": "t", "type": "bpe", "dataset": dataset, "vocab_size": 300})).await;
    let body = json!({"method": {"type": "pretrain"}, "model": {"architecture": "gpt", "layers": 1, "heads": 1, "width": 8, "context": 16},
        "dataset": dataset, "tokenizer": tokenizer, "hyperparameters": {"steps": 1}});
    let (_, job) = api.post("/v1/training/jobs", &body).await;
    let (job, model) = (job["id"].as_str().expect("an id").to_owned(), job["model"].as_str().expect("a model").to_owned());
    let project = created(&api, "/v1/projects", json!({"name": "new"})).await;
    let key = created(&api, &format!("/v1/projects/{project}/keys"), json!({})).await;

    let tuned = created(&api, "/v1/fine_tuning/jobs", json!({"model": model, "training_file": file})).await;
    // Each of them twice: the second changes nothing. A job can be paused again once it was resumed.
    for path in [
        format!("/v1/training/jobs/{tuned}/pause"),
        format!("/v1/fine_tuning/jobs/{tuned}/resume"),
        format!("/v1/fine_tuning/jobs/{tuned}/pause"),
        format!("/v1/fine_tuning/jobs/{tuned}/cancel"),
        format!("/v1/training/jobs/{job}/cancel"),
        format!("/v1/uploads/{upload}/cancel"),
    ] {
        for _ in 0..2 {
            let (status, answer) = answer(api.request(Method::POST, &path)).await;
            assert_eq!(status, 200, "{path}: {answer}");
        }
    }
    let quotas = |storage: i64| json!({"quotas": {"storage_bytes": storage, "running_jobs": null}});
    for body in [quotas(5), quotas(5), quotas(6)] {
        created(&api, &format!("/v1/projects/{project}"), body).await;
    }
    // It is set anew each time, as its end may be another.
    for _ in 0..2 {
        let set = api.request(Method::PUT, "/v1/log_filter").json(&json!({"filter": "info", "expires_after": 60}));
        assert_eq!(answer(set).await.0, 200);
    }
    for _ in 0..2 {
        assert_eq!(api.delete("/v1/log_filter").await.0, 200);
    }
    sqlx::query("UPDATE datasets SET state = 'ready' WHERE implicit").execute(&db).await.expect("it is there");
    for path in [
        format!("/v1/training/jobs/{job}"),
        format!("/v1/models/{model}"),
        format!("/v1/tokenizers/{tokenizer}"),
        format!("/v1/datasets/{dataset}"),
        format!("/v1/files/{file}"),
        format!("/v1/projects/{project}/keys/{key}"),
    ] {
        let (status, answer) = api.delete(&path).await;
        assert_eq!(status, 200, "{path}: {answer}");
        api.delete(&path).await;
    }
    // What is refused is no deed.
    refused(
        "a file that is gone",
        &api.post("/v1/datasets", &json!({"name": "d", "source": {"type": "files", "files": [file]}})).await,
        &[404],
    );

    let by_own = |deed: Deed, id: &String| (deed.as_str().to_owned(), id.clone(), Some(own.clone()));
    let filter = "log_filter".to_owned();
    let expected = [
        (Deed::KeyCreated.as_str().to_owned(), own.clone(), None),
        by_own(Deed::FileCreated, &file),
        by_own(Deed::UploadCreated, &upload),
        by_own(Deed::DatasetCreated, &dataset),
        by_own(Deed::TokenizerCreated, &tokenizer),
        by_own(Deed::TrainingJobCreated, &job),
        by_own(Deed::ProjectCreated, &project),
        by_own(Deed::KeyCreated, &key),
        by_own(Deed::TrainingJobCreated, &tuned),
        by_own(Deed::TrainingJobPaused, &tuned),
        by_own(Deed::TrainingJobResumed, &tuned),
        by_own(Deed::TrainingJobPaused, &tuned),
        by_own(Deed::TrainingJobCancelled, &tuned),
        by_own(Deed::TrainingJobCancelled, &job),
        by_own(Deed::UploadCancelled, &upload),
        by_own(Deed::QuotasChanged, &project),
        by_own(Deed::QuotasChanged, &project),
        by_own(Deed::LogFilterSet, &filter),
        by_own(Deed::LogFilterSet, &filter),
        by_own(Deed::LogFilterDeleted, &filter),
        by_own(Deed::TrainingJobDeleted, &job),
        by_own(Deed::ModelDeleted, &model),
        by_own(Deed::TokenizerDeleted, &tokenizer),
        by_own(Deed::DatasetDeleted, &dataset),
        by_own(Deed::FileDeleted, &file),
        by_own(Deed::KeyRevoked, &key),
    ];
    assert_eq!(entries(&api, "").await, expected);
    for deed in Deed::ALL {
        assert!(expected.iter().any(|(known, ..)| known == deed.as_str()), "nothing here is {deed:?}");
    }
    assert_eq!(entries(&api, &format!("&resource_id={file}")).await.len(), 2);
    assert_eq!(entries(&api, &format!("&key_id={own}")).await.len(), expected.len() - 1);
    assert_eq!(entries(&api, "&type=upload.cancelled").await, [by_own(Deed::UploadCancelled, &upload)]);
    let of_new = entries(&api, &format!("&project_id={project}")).await;
    assert_eq!(
        of_new.iter().map(|(deed, ..)| &**deed).collect::<Vec<_>>(),
        ["project.created", "api_key.created", "project.quotas_changed", "project.quotas_changed", "api_key.revoked"]
    );
}

/// A completed upload's file, once though the answer is repeated; and nothing of a creation that did not happen.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_repeated_creation_is_one_deed_and_a_failed_one_none(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let begun = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
    let create = || answer(api.request(Method::POST, "/v1/uploads").header("Idempotency-Key", "one").json(&begun));
    let (_, first) = create().await;
    assert_eq!(create().await.1, first);
    let upload = first["id"].as_str().expect("an id");
    let part = reqwest::multipart::Part::bytes(b"abc".to_vec()).file_name("part");
    let form = reqwest::multipart::Form::new().part("data", part);
    let (_, part) = answer(api.request(Method::POST, &format!("/v1/uploads/{upload}/parts")).multipart(form)).await;
    let complete = async || api.post(&format!("/v1/uploads/{upload}/complete"), &json!({"part_ids": [part["id"]]})).await;
    let file = complete().await.1["file"]["id"].as_str().expect("a file").to_owned();
    complete().await;
    refused("a name twice", &api.post("/v1/projects", &json!({"name": "other"})).await, &[409]);
    let deeds: Vec<_> = entries(&api, "").await.into_iter().skip(1).map(|(deed, resource, _)| (deed, resource)).collect();
    assert_eq!(deeds, [("upload.created".to_owned(), upload.to_owned()), ("file.created".to_owned(), file)]);
}
