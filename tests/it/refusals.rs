//! Requests that are nearly right, and where their refusals say that they are wrong.

use lathe_api::auth::DEFAULT_PROJECT;
use lathe_tests::TestApp;
use reqwest::{Method, multipart::Form};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    api::{Api, answer, form, refused},
    training::text,
};

/// Every case: method, path, body, and what the refusal names: status, `param`, words of its message.
type Case = (Method, &'static str, Value, u16, Option<&'static str>, &'static [&'static str]);

async fn hold(api: &Api, cases: Vec<Case>) {
    for (method, path, body, status, param, words) in cases {
        let case = format!("{method} {path} {body}");
        let request = api.request(method, path);
        let refusal = answer(if body.is_null() { request } else { request.json(&body) }).await;
        assert_eq!(refused(&case, &refusal, &[status]).as_deref(), param, "{case}: {}", refusal.1);
        for word in words {
            assert!(refusal.1["error"]["message"].as_str().is_some_and(|text| text.contains(word)), "{case}: {}", refusal.1);
        }
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_refusal_names_its_place(db: PgPool) {
    let api = Api::start(db.clone()).await;
    api.resources().await;
    sqlx::raw_sql(
        "INSERT INTO checkpoints (id, job_id, attempt, step, artifact, bytes) VALUES ('ftckpt_1', 'ftjob-test', 1, 1, 'checkpoints/1', 1);
         INSERT INTO jobs (id, project_id, kind, state, pool, spec, queued_at) VALUES ('ftjob-base', 'proj_default', 'train', 'queued', 'device', '{}', now());",
    )
    .execute(&db)
    .await
    .unwrap();
    let (get, post) = (Method::GET, Method::POST);
    let none = Value::Null;
    let chat = |message: Value| json!({"model": "model-none", "messages": [message]});
    let prompt = |prompt: Value| json!({"model": "model-test", "prompt": prompt});
    let cases: Vec<Case> = vec![
        // Unions name all that they take.
        (
            post.clone(),
            "/v1/datasets",
            json!({"name": "a", "source": {"type": "odd"}}),
            400,
            Some("source.type"),
            &["files", "template"],
        ),
        (
            post.clone(),
            "/v1/training/jobs",
            json!({"method": {"type": "odd"}}),
            400,
            Some("method.type"),
            &["pretrain", "instruction"],
        ),
        (post.clone(), "/v1/completions", prompt(json!([1, -1])), 400, Some("prompt[1]"), &["at least 0"]),
        (post.clone(), "/v1/completions", prompt(json!([[]])), 400, Some("prompt[0]"), &["at least 1 items"]),
        (post.clone(), "/v1/completions", prompt(json!(5)), 400, Some("prompt"), &["string or array"]),
        // A model that is named in a body.
        (post.clone(), "/v1/completions", json!({"model": "none", "prompt": "a"}), 404, Some("model"), &[]),
        (post.clone(), "/v1/completions", prompt(json!("a")), 409, Some("model"), &["queued"]),
        // An answer's message may be sent back as it came; what has no effect may not be sent.
        (
            post.clone(),
            "/v1/chat/completions",
            chat(json!({"role": "user", "content": "a", "refusal": null})),
            404,
            Some("model"),
            &[],
        ),
        (
            post.clone(),
            "/v1/chat/completions",
            chat(json!({"role": "user", "content": "a", "refusal": "no"})),
            400,
            Some("messages[0].refusal"),
            &[],
        ),
        (
            post.clone(),
            "/v1/chat/completions",
            chat(json!({"role": "user", "content": "a", "name": "b"})),
            400,
            Some("messages[0].name"),
            &[],
        ),
        // Queries.
        (get.clone(), "/v1/datasets?name=%FF", none.clone(), 400, None, &["UTF-8"]),
        (get.clone(), "/v1/datasets?limit=%205", none.clone(), 400, Some("limit"), &[]),
        (
            get.clone(),
            "/v1/training/jobs/ftjob-test/metrics?from_step=9223372036854775808",
            none.clone(),
            400,
            Some("from_step"),
            &["at most"],
        ),
        (get.clone(), "/v1/training/jobs/ftjob-test/logs?attempt=2147483648", none.clone(), 400, Some("attempt"), &["at most"]),
        (get.clone(), "/v1/training/jobs/ftjob-test/events?stream=true&limit=5", none.clone(), 422, Some("limit"), &["stream"]),
        // Cursors that stand for no item of the list.
        (get.clone(), "/v1/fine_tuning/jobs?after=ftjob-base", none.clone(), 404, Some("after"), &[]),
        (get.clone(), "/v1/fine_tuning/jobs/ftjob-test/events?after=ftevent-test-7", none.clone(), 404, Some("after"), &[]),
        (get.clone(), "/v1/projects/none/keys", none.clone(), 404, None, &["There is no project `none`."]),
        (Method::DELETE, "/v1/models/model-test:ckpt-step-1", none.clone(), 409, None, &["checkpoint"]),
        (Method::DELETE, "/v1/models/model-test:ckpt-step-2", none.clone(), 404, None, &[]),
    ];
    hold(&api, cases).await;
    assert_eq!(api.get("/v1/training/jobs?after=ftjob-base").await.0, 200);
    let events = api.request(Method::GET, "/v1/training/jobs/ftjob-test/events").header("last-event-id", "-1");
    assert_eq!(refused("a negative id", &answer(events).await, &[400]).as_deref(), Some("Last-Event-ID"));
}

/// A tokenizer is looked for whatever has become of the dataset.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn statistics_of_a_failed_dataset_know_their_tokenizer(db: PgPool) {
    let api = Api::start(db.clone()).await;
    api.resources().await;
    let failed = "UPDATE datasets SET state = 'failed', error = '{\"code\": \"bad_rows\", \"message\": \"x\"}'";
    sqlx::raw_sql(failed).execute(&db).await.unwrap();
    let unknown = api.get("/v1/datasets/ds_test/statistics?tokenizer=none").await;
    assert_eq!(refused("an unknown tokenizer", &unknown, &[404]).as_deref(), Some("tokenizer"));
    let (status, known) = api.get("/v1/datasets/ds_test/statistics?tokenizer=tok_test").await;
    assert_eq!((status.as_u16(), &known["state"], &known["error"]["code"]), (200, &json!("failed"), &json!("bad_rows")));
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_form_s_fields_are_named(db: PgPool) {
    let api = Api::start(db).await;
    let send = async |texts: &[(&str, &str)]| {
        let form = texts
            .iter()
            .fold(form("a.txt", b"abc"), |form: Form, (name, text)| form.text((*name).to_owned(), (*text).to_owned()));
        answer(api.request(Method::POST, "/v1/files").multipart(form)).await
    };
    let whole = r#"{"anchor": "created_at", "seconds": 3600}"#;
    for (case, texts, param, word) in [
        ("no JSON", vec![("metadata", "{")], "metadata", "`metadata` is not valid JSON"),
        ("nothing", vec![("metadata", "")], "metadata", "`metadata` is empty"),
        ("null", vec![("metadata", "null")], "metadata", "not null"),
        ("null", vec![("expires_after", "null")], "expires_after", "not null"),
        ("twice", vec![("metadata", r#"{"a": "1", "a": "2"}"#)], "metadata.a", "given twice"),
        (
            "too large",
            vec![("expires_after", r#"{"anchor": "created_at", "seconds": 1e400}"#)],
            "expires_after.seconds",
            "out of range",
        ),
        (
            "in two ways",
            vec![("expires_after", whole), ("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "7200")],
            "expires_after",
            "given twice",
        ),
    ] {
        let refusal = send(&texts).await;
        assert_eq!(refused(case, &refusal, &[400]).as_deref(), Some(param), "{case}: {}", refusal.1);
        assert!(refusal.1["error"]["message"].as_str().unwrap().contains(word), "{case}: {}", refusal.1);
    }
    assert_eq!((api.stored("files"), api.stored("tmp")), (0, 0));
    let begun = json!({"filename": "dir/a\n.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
    assert_eq!(api.post("/v1/uploads", &begun).await.1["filename"], "a.txt", "as in a form");
}

/// A file that stands twice in a dataset needs it once.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn users_are_named_once(db: PgPool) {
    let api = Api::start(db).await;
    let file = api.upload("rows.jsonl", b"{\"text\": \"hello\"}\n").await["id"].clone();
    let source = json!({"type": "files", "files": [file, file]});
    let dataset = api.post("/v1/datasets", &json!({"name": "twice", "source": source})).await.1["id"].clone();
    let refusal = api.delete(&format!("/v1/files/{}", text(&file))).await;
    refused("a file in use", &refusal, &[409]);
    assert_eq!(refusal.1["error"]["message"].as_str().unwrap().matches(text(&dataset)).count(), 1, "{}", refusal.1);
}

/// Nothing runs here, so the server is not ready.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_probe_is_told_when_to_come_back(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let response = api.client.get(format!("{}/readyz?probe=1", api.base)).send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (503, &reqwest::header::HeaderValue::from(2)));
    sqlx::query(
        "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
         VALUES ('runner_1', 'a', 'a', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
    )
    .execute(&db)
    .await
    .unwrap();
    let response = api.client.get(format!("{}/readyz", api.base)).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers().get("retry-after")), (200, None), "of {DEFAULT_PROJECT}");
}

/// The bad rows of a file as its dataset's job found them.
#[tokio::test]
async fn bad_rows_are_listed_with_their_file() {
    let app = TestApp::start().await;
    let lines = "{\"q\": \"1+1?\", \"a\": \"2\"}\n{\"q\": \"3\", \"b\": 1}\nnot JSON\n";
    let file = app.upload("rows.jsonl", "fine-tune", lines).await["id"].clone();
    let source = json!({"type": "files", "files": [file], "columns": {"instruction": "q", "output": "a"}, "on_bad_row": "skip"});
    let dataset = app.post_json("/v1/datasets", &json!({"name": "bad", "source": source})).await.ok();
    let path = format!("/v1/datasets/{}", text(&dataset["id"]));
    let ready = app.wait_for(&path, &["ready"]).await;
    assert_eq!((&ready["rows"], &ready["statistics"]["bad_rows"]), (&json!(1), &json!(2)));
    let bad = app.get(&format!("{path}/errors?limit=1")).await.ok();
    let first = json!({"index": 0, "file": file, "filename": "rows.jsonl", "line": 2, "code": "missing_field", "field": "a",
        "message": "`a` is missing", "keys": ["b", "q"]});
    assert_eq!((&bad["data"], &bad["has_more"]), (&json!([first]), &json!(true)));
    let rest = app.get(&format!("{path}/errors?after=0")).await.ok();
    let row = &rest["data"][0];
    assert_eq!((&row["index"], &row["line"], &row["code"]), (&json!(1), &json!(3), &json!("invalid_json")), "{rest}");
    assert_eq!(rest["has_more"], false);
}
