//! Quotas of a project: what is refused, what counts, what waits and says why.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::api::{Api, answer, form, refused};

const DEFAULT: &str = "/v1/projects/proj_default";

async fn set(api: &Api, quotas: Value) {
    let (status, project) = api.post(DEFAULT, &json!({"quotas": quotas})).await;
    assert_eq!(status, 200, "{project}");
    for (name, value) in quotas.as_object().expect("quotas") {
        assert_eq!(&project["quotas"][name], value);
    }
    assert_eq!(api.get(DEFAULT).await.1, project);
}

async fn usage(api: &Api, what: &str) -> i64 {
    api.get(&format!("{DEFAULT}/usage")).await.1[what].as_i64().expect("a number")
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn nothing_is_stored_beyond_the_quota(db: PgPool) {
    let api = Api::start(db.clone()).await;
    set(&api, json!({"storage_bytes": 1000, "running_jobs": null})).await;
    let upload = |bytes: usize| answer(api.request(Method::POST, "/v1/files").multipart(form("a", &vec![b'x'; bytes])));
    let file = upload(600).await.1["id"].as_str().expect("it fits").to_owned();
    assert_eq!(usage(&api, "files").await, 600);

    let over = upload(401).await;
    refused("a file over the quota", &over, &[507]);
    assert_eq!(
        (&over.1["error"]["code"], &over.1["error"]["type"]),
        (&json!("storage_quota_exceeded"), &json!("insufficient_quota"))
    );
    assert_eq!(api.stored("files"), 1, "what was refused has left nothing");
    // More than a form's other fields may have, so that it is refused by its announced length.
    refused("an announced file", &upload(4 << 20).await, &[507]);

    // An upload takes what it promises, until it is cancelled.
    let begin = |bytes: i64| json!({"filename": "a", "purpose": "fine-tune", "bytes": bytes, "mime_type": "text/plain"});
    refused("an upload over the quota", &api.post("/v1/uploads", &begin(401)).await, &[507]);
    let begun = api.post("/v1/uploads", &begin(400)).await.1["id"].as_str().expect("it fits").to_owned();
    assert_eq!(usage(&api, "storage_bytes").await, 1000);
    let data = |bytes: usize| reqwest::multipart::Part::bytes(vec![b'x'; bytes]).file_name("part");
    let parts = format!("/v1/uploads/{begun}/parts");
    let part = |bytes: usize| {
        answer(api.request(Method::POST, &parts).multipart(reqwest::multipart::Form::new().part("data", data(bytes))))
    };
    assert_eq!(part(400).await.0, 200);
    refused("a part beyond the promise", &part(1).await, &[507]);
    refused("a file beside the upload", &upload(1).await, &[507]);

    // A full project makes nothing new.
    let dataset = json!({"name": "d", "source": {"type": "files", "files": [file]}});
    refused("a dataset", &api.post("/v1/datasets", &dataset).await, &[507]);
    let tune = json!({"model": "model-none", "training_file": file});
    refused("a job", &api.post("/v1/fine_tuning/jobs", &tune).await, &[507]);
    assert_eq!(api.post(&format!("/v1/uploads/{begun}/cancel"), &Value::Null).await.0, 400, "no body is taken");
    assert_eq!(answer(api.request(Method::POST, &format!("/v1/uploads/{begun}/cancel"))).await.0, 200);
    assert_eq!(api.post("/v1/datasets", &dataset).await.0, 201);

    // Everything that is stored counts.
    api.resources().await;
    sqlx::raw_sql(
        "UPDATE datasets SET bytes = 7 WHERE id = 'ds_test'; UPDATE tokenizers SET bytes = 11; UPDATE models SET bytes = 13;
         INSERT INTO checkpoints (id, job_id, attempt, step, artifact, bytes) VALUES ('ftckpt_1', 'ftjob-test', 1, 1, 'c', 17)",
    )
    .execute(&db)
    .await
    .expect("rows that fit");
    let kinds = ["datasets", "tokenizers", "models", "checkpoints"];
    for (kind, bytes) in kinds.iter().zip([7, 11, 13, 17]) {
        assert_eq!(usage(&api, kind).await, bytes, "{kind}");
    }
    sqlx::query("UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE state = 'queued'")
        .execute(&db)
        .await
        .expect("rows");
    assert_eq!(api.delete("/v1/models/model-test").await.0, 200);
    assert_eq!(usage(&api, "models").await, 0);

    // Another project's bytes are its own, and a quota that is lifted is none.
    let other =
        answer(api.client.post(format!("{}/v1/files", api.base)).bearer_auth(&api.other).multipart(form("a", &[b'x'; 2000])));
    assert_eq!(other.await.0, 200);
    set(&api, json!({"storage_bytes": null, "running_jobs": null})).await;
    assert_eq!(upload(5000).await.0, 200);
}

/// Uploads at once do not all take the same room.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn files_that_arrive_together_share_the_quota(db: PgPool) {
    let api = Api::start(db).await;
    set(&api, json!({"storage_bytes": 1000, "running_jobs": null})).await;
    let upload = || answer(api.request(Method::POST, "/v1/files").multipart(form("a", &[b'x'; 300])));
    let answers = futures_util::future::join_all((0..8).map(|_| upload())).await;
    assert_eq!(answers.iter().filter(|(status, _)| *status == 200).count(), 3, "{answers:?}");
    assert_eq!((usage(&api, "files").await, api.stored("files")), (900, 3));
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_job_over_the_quota_waits_and_says_why(db: PgPool) {
    let api = Api::start(db.clone()).await;
    api.resources().await;
    let job = async || api.get("/v1/training/jobs/ftjob-test").await.1;
    assert_eq!(job().await["waiting_for"], Value::Null);
    set(&api, json!({"storage_bytes": null, "running_jobs": 1})).await;
    assert_eq!(job().await["waiting_for"], Value::Null, "there is room");
    sqlx::query("UPDATE jobs SET state = 'running' WHERE id = 'job_ds'").execute(&db).await.expect("it is there");
    assert_eq!((&job().await["waiting_for"], usage(&api, "running_jobs").await), (&json!("running_jobs_quota"), 1));
    set(&api, json!({"storage_bytes": null, "running_jobs": 2})).await;
    assert_eq!(job().await["waiting_for"], Value::Null);
    refused("no such project", &api.post("/v1/projects/proj_none", &json!({"quotas": {}})).await, &[404]);
    refused("a negative quota", &api.post(DEFAULT, &json!({"quotas": {"running_jobs": -1}})).await, &[400]);
}
