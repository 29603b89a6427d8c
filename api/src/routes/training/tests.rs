//! The routes of datasets, tokenizers and training against a real database, without a runner.

use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode, header},
};
use http_body_util::BodyExt;
use lathe_jobs::artifacts::Artifacts;
use serde_json::{Value, json};
use sqlx::PgPool;
use tower::ServiceExt;

use crate::{
    auth::{self, DEFAULT_PROJECT, Scope},
    server,
    state::{ApiConfig, AppState},
};

/// The API on a database of its own, with a key of the default project.
struct Api {
    app: Router,
    db: PgPool,
    key: String,
    folder: std::path::PathBuf,
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Api {
    async fn start(db: PgPool) -> Api {
        let folder = std::env::temp_dir().join(lathe_jobs::ids::new("lathe_api_test"));
        let state = AppState::new(db.clone(), Artifacts::open(&folder).unwrap(), ApiConfig::default());
        auth::bootstrap(&mut db.acquire().await.unwrap(), "secret").await.unwrap();
        Api { app: server::app(state), db, key: "secret".to_owned(), folder }
    }

    /// A key of another project.
    async fn other_key(&self) -> String {
        let mut conn = self.db.acquire().await.unwrap();
        sqlx::query("INSERT INTO projects (id, name) VALUES ('proj_other', 'other')").execute(&mut *conn).await.unwrap();
        auth::create_key(&mut conn, "proj_other", None, Scope::Project).await.unwrap().secret
    }

    async fn send(&self, method: &str, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        self.send_as(&self.key, method, path, body).await
    }

    async fn send_as(&self, key: &str, method: &str, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let request = Request::builder().method(method).uri(path).header(header::AUTHORIZATION, format!("Bearer {key}"));
        let request = match body {
            Some(body) => request.header(header::CONTENT_TYPE, "application/json").body(Body::from(body.to_string())),
            None => request.body(Body::empty()),
        };
        let response = self.app.clone().oneshot(request.unwrap()).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::String(text)))
    }

    async fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.send(method, path, body).await;
        assert!(status.is_success(), "{method} {path}: {status} {answer}");
        answer
    }

    async fn file(&self, id: &str) {
        sqlx::query("INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, artifact) VALUES ($1, $2, 'a.jsonl', 'fine-tune', 1, '', $1)")
            .bind(id)
            .bind(DEFAULT_PROJECT)
            .execute(&self.db)
            .await
            .unwrap();
    }

    async fn dataset(&self) -> Value {
        self.ok("POST", "/v1/datasets", Some(sums(json!([])))).await
    }

    /// A pretraining job with a dataset and a tokenizer that are not made yet.
    async fn pretraining(&self) -> Value {
        let dataset = self.dataset().await["id"].clone();
        let body = json!({"name": "t", "type": "bpe", "dataset": dataset, "vocab_size": 300});
        let tokenizer = self.ok("POST", "/v1/tokenizers", Some(body)).await["id"].clone();
        self.ok("POST", "/v1/training/jobs", Some(pretrain(&dataset, &tokenizer))).await
    }

    /// Ends a job and readies what it makes, as a runner would.
    async fn succeed(&self, job: &Value) {
        let job = job.as_str().unwrap();
        for sql in [
            "UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE id = $1",
            "UPDATE datasets SET state = 'ready' WHERE job_id = $1",
            "UPDATE tokenizers SET state = 'ready', vocabulary = 300 WHERE job_id = $1",
            "UPDATE models SET state = 'ready' WHERE job_id = $1",
        ] {
            sqlx::query(sql).bind(job).execute(&self.db).await.unwrap();
        }
    }
}

fn sums(exclude: Value) -> Value {
    json!({"name": "sums", "source": {"type": "template", "rows": 50, "seed": 7, "exclude": exclude, "templates": [
        {"instruction": "{{ a }}+{{ b }}?", "output": "{{ a + b }}", "variables": {"a": {"range": [0, 99]}, "b": {"range": [0, 99]}}}]}})
}

fn pretrain(dataset: &Value, tokenizer: &Value) -> Value {
    json!({"method": {"type": "pretrain"}, "model": {"architecture": "gpt", "layers": 2, "heads": 2, "width": 16, "context": 16},
           "dataset": dataset, "tokenizer": tokenizer, "name": "small", "hyperparameters": {"steps": 10}, "metadata": {"a": "b"}})
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn a_pretraining_job_waits_for_what_it_names(db: PgPool) {
    let api = Api::start(db).await;
    let job = api.pretraining().await;
    assert_eq!((&job["state"], &job["object"], &job["attempts"]), (&json!("blocked"), &json!("training.job"), &json!(0)));
    assert!(job["model"].as_str().unwrap().starts_with("model-"));
    assert_eq!(job["hyperparameters"]["schedule"], json!({"type": "cosine", "peak": 1e-3, "warmup_steps": null, "floor": 1e-4}));
    assert_eq!(
        (&job["steps"], &job["hyperparameters"]["precision"], &job["hyperparameters"]["max_attempts"]),
        (&json!(10), &Value::Null, &json!(3))
    );
    assert_eq!((&job["metadata"], &job["model_config"]["mlp_width"]), (&json!({"a": "b"}), &json!(64)));
    let path = format!("/v1/training/jobs/{}", job["id"].as_str().unwrap());
    assert_eq!(api.ok("GET", &path, None).await, job);
    let list = api.ok("GET", "/v1/training/jobs?state=blocked&name=small", None).await;
    assert_eq!((list["data"].as_array().unwrap().len(), &list["last_id"]), (1, &job["id"]));
    let events = api.ok("GET", &format!("{path}/events"), None).await;
    assert_eq!((&events["data"][0]["id"], &events["data"][0]["code"]), (&json!(1), &json!("job.created")));
    assert_eq!(api.ok("GET", &format!("{path}/logs"), None).await["text"], "");
    assert_eq!(api.ok("GET", &format!("{path}/checkpoints"), None).await["data"], json!([]));
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn what_a_body_names_must_be_there(db: PgPool) {
    let api = Api::start(db).await;
    let dataset = api.dataset().await;
    let refused = |body: Value| {
        let api = &api;
        async move {
            let (status, answer) = api.send("POST", "/v1/training/jobs", Some(body)).await;
            (status.as_u16(), answer["error"]["param"].as_str().unwrap_or_default().to_owned())
        }
    };
    let missing = json!("tok_missing");
    assert_eq!(refused(pretrain(&json!("ds_missing"), &missing)).await, (404, "dataset".into()));
    assert_eq!(refused(pretrain(&dataset["id"], &missing)).await, (404, "tokenizer".into()));
    let mut body = pretrain(&dataset["id"], &missing);
    body["validation"] = json!({"dataset": "ds_missing"});
    assert_eq!(refused(body.clone()).await, (404, "validation.dataset".into()));
    body["hyperparameters"]["optimizer"] = json!({"type": "adamw", "betas": [0.9, 2]});
    assert_eq!(refused(body).await, (400, "hyperparameters.optimizer.betas[1]".into()));
    let tune = json!({"method": {"type": "instruction"}, "base_model": "model-missing", "dataset": dataset["id"]});
    assert_eq!(refused(tune).await, (404, "base_model".into()));
    let (status, answer) = api.send("POST", "/v1/datasets", Some(sums(json!(["ds_missing"])))).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (404, &json!("source.exclude[0]")));
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn another_project_sees_nothing(db: PgPool) {
    let api = Api::start(db).await;
    let job = api.pretraining().await;
    let other = api.other_key().await;
    let id = |value: &Value| value.as_str().unwrap().to_owned();
    let (job_id, dataset, tokenizer) = (id(&job["id"]), id(&job["dataset"]), id(&job["tokenizer"]));
    for (method, path) in [
        ("GET", format!("/v1/training/jobs/{job_id}")),
        ("DELETE", format!("/v1/training/jobs/{job_id}")),
        ("POST", format!("/v1/training/jobs/{job_id}/cancel")),
        ("GET", format!("/v1/training/jobs/{job_id}/events")),
        ("GET", format!("/v1/training/jobs/{job_id}/metrics")),
        ("GET", format!("/v1/training/jobs/{job_id}/logs")),
        ("GET", format!("/v1/datasets/{dataset}")),
        ("GET", format!("/v1/datasets/{dataset}/errors")),
        ("DELETE", format!("/v1/datasets/{dataset}")),
        ("GET", format!("/v1/tokenizers/{tokenizer}")),
        ("DELETE", format!("/v1/tokenizers/{tokenizer}")),
    ] {
        assert_eq!(api.send_as(&other, method, &path, None).await.0, 404, "{method} {path}");
    }
    let (_, list) = api.send_as(&other, "GET", "/v1/training/jobs", None).await;
    assert_eq!(list["data"], json!([]));
    let (status, _) = api.send_as(&other, "POST", "/v1/training/jobs", Some(pretrain(&job["dataset"], &job["tokenizer"]))).await;
    assert_eq!(status, 404);
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn control_follows_the_state_machine(db: PgPool) {
    let api = Api::start(db).await;
    let job = api.pretraining().await;
    let path = format!("/v1/training/jobs/{}", job["id"].as_str().unwrap());
    let act = |action: &str| format!("{path}/{action}");
    assert_eq!(api.ok("POST", &act("pause"), None).await["state"], "paused");
    assert_eq!(api.ok("POST", &act("pause"), None).await["state"], "paused");
    assert_eq!(api.ok("POST", &act("resume"), None).await["state"], "blocked");
    let (status, answer) = api.send("DELETE", &path, None).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::CONFLICT, &json!("illegal_state")));
    assert_eq!(api.ok("POST", &act("cancel"), None).await["state"], "cancelled");
    assert_eq!(api.send("POST", &act("resume"), None).await.0, 409);
    // The stream of an ended job replays what is asked for and closes.
    let (_, stream) = api.send("GET", &format!("{path}/events?stream=true&after=1"), None).await;
    let stream = stream.as_str().unwrap().to_owned();
    assert!(!stream.contains("job.created") && stream.contains("id: 2\n") && stream.contains("job.cancelled"), "{stream}");
    assert_eq!(api.ok("DELETE", &path, None).await["deleted"], true);
    assert_eq!(api.send("GET", &path, None).await.0, 404);
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn an_open_stream_goes_on_without_a_gap(db: PgPool) {
    let api = Api::start(db).await;
    let job = api.pretraining().await;
    let path = format!("/v1/training/jobs/{}", job["id"].as_str().unwrap());
    let request = Request::builder()
        .uri(format!("{path}/events"))
        .header(header::AUTHORIZATION, format!("Bearer {}", api.key))
        .header(header::ACCEPT, "text/event-stream");
    let mut body = api.app.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap().into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(String::from_utf8_lossy(&first).contains("id: 1\n"));
    for action in ["pause", "resume", "cancel"] {
        api.ok("POST", &format!("{path}/{action}"), None).await;
    }
    // The stream ends by itself, since the job has.
    let rest = String::from_utf8_lossy(&body.collect().await.unwrap().to_bytes()).into_owned();
    let ids: Vec<&str> = rest.lines().filter_map(|line| line.strip_prefix("id: ")).collect();
    assert_eq!(ids, ["2", "3", "4"], "{rest}");
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn nothing_that_is_needed_can_be_deleted(db: PgPool) {
    let api = Api::start(db).await;
    let job = api.pretraining().await;
    let dataset = format!("/v1/datasets/{}", job["dataset"].as_str().unwrap());
    let tokenizer = format!("/v1/tokenizers/{}", job["tokenizer"].as_str().unwrap());
    for path in [&dataset, &tokenizer] {
        let (status, answer) = api.send("DELETE", path, None).await;
        assert_eq!((status, &answer["error"]["code"]), (StatusCode::CONFLICT, &json!("in_use")));
        assert!(path == &dataset || answer["error"]["message"].as_str().unwrap().contains(job["id"].as_str().unwrap()));
    }
    api.ok("POST", &format!("/v1/training/jobs/{}/cancel", job["id"].as_str().unwrap()), None).await;
    api.ok("DELETE", &tokenizer, None).await;
    api.ok("DELETE", &dataset, None).await;
    assert_eq!(api.send("GET", &dataset, None).await.0, 404);
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn fine_tuning_has_openai_s_shape(db: PgPool) {
    let api = Api::start(db).await;
    let base = api.pretraining().await;
    api.file("file-1").await;
    let body = json!({"model": base["model"], "training_file": "file-1", "suffix": "Sums", "seed": 5,
        "hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2.0}});
    let job = api.ok("POST", "/v1/fine_tuning/jobs", Some(body.clone())).await;
    for key in [
        "id",
        "object",
        "created_at",
        "error",
        "fine_tuned_model",
        "finished_at",
        "hyperparameters",
        "model",
        "organization_id",
        "result_files",
        "seed",
        "status",
        "trained_tokens",
        "training_file",
        "validation_file",
        "estimated_finish",
        "integrations",
        "method",
        "metadata",
    ] {
        assert!(job.get(key).is_some(), "{key} is missing");
    }
    assert_eq!((&job["status"], &job["training_file"], &job["seed"]), (&json!("queued"), &json!("file-1"), &json!(5)));
    assert_eq!(job["hyperparameters"], json!({"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2.0}));
    let id = job["id"].as_str().unwrap();
    let native = api.ok("GET", &format!("/v1/training/jobs/{id}"), None).await;
    assert_eq!(
        (&native["hyperparameters"]["schedule"]["peak"], &native["hyperparameters"]["epochs"]),
        (&json!(2e-4), &json!(2.0))
    );
    assert!(native["model"].as_str().unwrap().starts_with(&format!("ft:{}:default:sums:", base["model"].as_str().unwrap())));
    let list = api.ok("GET", "/v1/fine_tuning/jobs", None).await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "pretraining does not show");
    let events = api.ok("GET", &format!("/v1/fine_tuning/jobs/{id}/events"), None).await;
    assert_eq!((&events["data"][0]["object"], &events["data"][0]["type"]), (&json!("fine_tuning.job.event"), &json!("message")));
    assert_eq!(api.ok("POST", &format!("/v1/fine_tuning/jobs/{id}/pause"), None).await["state"], "paused");
    assert_eq!(api.ok("POST", &format!("/v1/fine_tuning/jobs/{id}/cancel"), None).await["status"], "cancelled");

    for (field, value, status, param) in [
        ("training_file", json!("file-missing"), 404, "training_file"),
        ("validation_file", json!("file-missing"), 404, "validation_file"),
        ("model", json!("model-missing"), 404, "model"),
        ("integrations", json!([]), 400, "integrations"),
        ("method", json!({"type": "dpo"}), 400, "method.type"),
        (
            "method",
            json!({"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}),
            400,
            "method.supervised.hyperparameters.n_epochs",
        ),
    ] {
        let mut body = body.clone();
        body[field] = value;
        let (got, answer) = api.send("POST", "/v1/fine_tuning/jobs", Some(body)).await;
        assert_eq!((got.as_u16(), &answer["error"]["param"]), (status, &json!(param)), "{answer}");
    }
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn token_statistics_are_counted_once(db: PgPool) {
    let api = Api::start(db).await;
    let job = api.pretraining().await;
    let (dataset, tokenizer) = (job["dataset"].as_str().unwrap(), job["tokenizer"].as_str().unwrap());
    let path = format!("/v1/datasets/{dataset}/statistics?tokenizer={tokenizer}");
    for _ in 0..2 {
        let (status, answer) = api.send("GET", &path, None).await;
        assert_eq!((status, &answer["state"]), (StatusCode::ACCEPTED, &json!("queued")));
    }
    let counting: Vec<String> =
        sqlx::query_scalar("SELECT id FROM jobs WHERE kind = 'statistics'").fetch_all(&api.db).await.unwrap();
    assert_eq!(counting.len(), 1);
    sqlx::query("UPDATE dataset_token_statistics SET statistics = $1")
        .bind(json!({"tokens": 9, "length": {"p50": 1, "p90": 2, "p99": 3, "max": 4}}))
        .execute(&api.db)
        .await
        .unwrap();
    api.succeed(&json!(counting[0])).await;
    let (status, answer) = api.send("GET", &path, None).await;
    assert_eq!((status, &answer["tokens"]["length"]["max"]), (StatusCode::OK, &json!(4)));
}

#[sqlx::test(migrator = "crate::MIGRATOR")]
async fn metrics_are_thinned_and_come_as_csv(db: PgPool) {
    let api = Api::start(db).await;
    let job = api.pretraining().await;
    let id = job["id"].as_str().unwrap();
    sqlx::query(
        "INSERT INTO job_metrics SELECT $1, n, 1.5, 0.1, 1, 10, 100, CASE WHEN n = 7 THEN 2.5 END FROM generate_series(1, 100) n",
    )
    .bind(id)
    .execute(&api.db)
    .await
    .unwrap();
    let path = format!("/v1/training/jobs/{id}/metrics");
    assert_eq!(api.ok("GET", &path, None).await["data"].as_array().unwrap().len(), 100);
    let thin = api.ok("GET", &format!("{path}?points=10"), None).await;
    let steps: Vec<i64> = thin["data"].as_array().unwrap().iter().map(|row| row["step"].as_i64().unwrap()).collect();
    assert_eq!(steps, [1, 7, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]);
    assert_eq!((&thin["data"][0].get("validation_loss"), &thin["data"][1]["validation_loss"]), (&None, &json!(2.5)));
    let csv = api.ok("GET", &format!("{path}?from_step=100&format=csv"), None).await;
    assert_eq!(csv, "step,loss,learning_rate,grad_norm,tokens,tokens_per_second,validation_loss\n100,1.5,0.1,1,10,100,\n");
    assert_eq!(api.send("GET", &format!("{path}?points=0"), None).await.0, 400);
}
