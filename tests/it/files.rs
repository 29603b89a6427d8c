//! Files and uploads in parts: what goes in comes out, and what is refused leaves nothing behind.

use lathe_api::state::ApiConfig;
use reqwest::{
    Method,
    multipart::{Form, Part},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::PgPool;

use crate::api::{Api, answer, form, refused};

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_file_comes_back_as_it_was(db: PgPool) {
    let api = Api::start(db).await;
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n * 7 % 251) as u8).collect();
    let file = api.upload("dir/rows.bin", &content).await;
    let id = file["id"].as_str().unwrap();
    assert!(id.starts_with("file-"));
    assert_eq!((&file["object"], &file["bytes"], &file["filename"]), (&json!("file"), &json!(3_000_000), &json!("rows.bin")));
    assert_eq!((&file["purpose"], &file["status"]), (&json!("fine-tune"), &json!("processed")));
    assert_eq!(file["sha256"], json!(hex::encode(Sha256::digest(&content))));
    assert_eq!(api.get(&format!("/v1/files/{id}")).await.1, file);
    let back = api.request(Method::GET, &format!("/v1/files/{id}/content")).send().await.unwrap();
    assert_eq!(back.headers()["content-length"], "3000000");
    assert_eq!(back.bytes().await.unwrap(), content);
    assert_eq!(api.delete(&format!("/v1/files/{id}")).await.1, json!({"id": id, "object": "file", "deleted": true}));
    refused("a deleted file", &api.get(&format!("/v1/files/{id}")).await, &[404]);
    refused("a deleted file's content", &api.get(&format!("/v1/files/{id}/content")).await, &[404]);
    assert_eq!((api.stored("files"), api.stored("tmp")), (0, 0));
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn refused_forms_leave_nothing(db: PgPool) {
    let api = Api::start_with(db, ApiConfig { file_limit: 1000, ..ApiConfig::default() }).await;
    let part = |bytes: usize| Part::bytes(vec![b'x'; bytes]).file_name("x.txt");
    let cases: [(&str, Form, u16, Option<&str>); 11] = [
        ("no file", Form::new().text("purpose", "fine-tune"), 400, Some("file")),
        ("no purpose", Form::new().part("file", part(3)), 400, Some("purpose")),
        ("two files", form("x.txt", b"x").part("file", part(3)), 400, Some("file")),
        ("an empty file", form("x.txt", b""), 400, Some("file")),
        ("another field", form("x.txt", b"x").text("colour", "red"), 400, Some("colour")),
        ("an unknown purpose", Form::new().text("purpose", "fun").part("file", part(3)), 400, Some("purpose")),
        (
            "an early expiry",
            form("x.txt", b"x").text("expires_after[anchor]", "created_at").text("expires_after[seconds]", "5"),
            400,
            Some("expires_after.seconds"),
        ),
        (
            "an early expiry as JSON",
            form("x.txt", b"x").text("expires_after", r#"{"anchor": "created_at", "seconds": 5}"#),
            400,
            Some("expires_after.seconds"),
        ),
        ("metadata of numbers", form("x.txt", b"x").text("metadata", r#"{"a": 1}"#), 400, Some("metadata.a")),
        ("metadata with U+0000", form("x.txt", b"x").text("metadata", r#"{"a": "\u0000"}"#), 422, Some("metadata.a")),
        ("a large file", Form::new().text("purpose", "batch").part("file", part(1001)), 413, Some("file")),
    ];
    for (case, form, status, param) in cases {
        let refusal = answer(api.request(Method::POST, "/v1/files").multipart(form)).await;
        assert_eq!(refused(case, &refusal, &[status]).as_deref(), param, "{case}");
    }
    let raw = |kind: &'static str, body: &'static str| {
        answer(api.request(Method::POST, "/v1/files").header("content-type", kind).body(body))
    };
    refused("JSON", &raw("application/json", "{}").await, &[415]);
    refused("no boundary", &raw("multipart/form-data", "x").await, &[415]);
    refused(
        "a broken form",
        &raw("multipart/form-data; boundary=b", "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\nxx")
            .await,
        &[400],
    );
    assert_eq!((api.stored("files"), api.stored("tmp")), (0, 0));
    assert_eq!(api.get("/v1/files").await.1["data"], json!([]));
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn lists_are_paged_both_ways(db: PgPool) {
    let api = Api::start(db).await;
    let mut ids = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        ids.push(api.upload(name, name.as_bytes()).await["id"].as_str().unwrap().to_owned());
    }
    for (order, expected) in [("asc", ids.clone()), ("desc", ids.iter().rev().cloned().collect())] {
        let (mut seen, mut after) = (Vec::new(), String::new());
        loop {
            let (status, page) = api.get(&format!("/v1/files?limit=2&order={order}{after}")).await;
            assert_eq!(status, 200, "{page}");
            seen.extend(page["data"].as_array().unwrap().iter().map(|file| file["id"].as_str().unwrap().to_owned()));
            assert_eq!(page["last_id"].as_str(), seen.last().map(String::as_str));
            after = format!("&after={}", page["last_id"].as_str().unwrap());
            if page["has_more"] == false {
                break;
            }
        }
        assert_eq!(seen, expected, "{order}");
    }
    assert_eq!(api.get("/v1/files?purpose=batch").await.1["data"], json!([]));
    for (query, param) in
        [("limit=0", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("colour=red", "colour")]
    {
        assert_eq!(refused(query, &api.get(&format!("/v1/files?{query}")).await, &[400]).as_deref(), Some(param));
    }
    let unknown = api.get("/v1/files?after=file-x").await;
    assert_eq!(refused("after=file-x", &unknown, &[404]).as_deref(), Some("after"));
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_file_in_use_stays(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let resources = api.resources().await;
    let file = &resources[0].1;
    sqlx::query("INSERT INTO dataset_files (dataset_id, position, file_id) VALUES ('ds_test', 0, $1)")
        .bind(file)
        .execute(&db)
        .await
        .unwrap();
    let response = api.request(Method::DELETE, &format!("/v1/files/{file}")).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers()["x-should-retry"].to_str().unwrap()), (409, "false"));
    assert!(response.text().await.unwrap().contains("ds_test"));
    sqlx::query("UPDATE datasets SET state = 'ready'").execute(&db).await.unwrap();
    assert_eq!(api.delete(&format!("/v1/files/{file}")).await.0, 200);
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn an_sdks_retry_makes_no_second_file(db: PgPool) {
    let api = Api::start(db).await;
    let first = api.upload("a.txt", b"abc").await;
    let retry =
        answer(api.request(Method::POST, "/v1/files").header("x-stainless-retry-count", "1").multipart(form("a.txt", b"abc")))
            .await;
    assert_eq!(retry.1["id"], first["id"]);
    assert_eq!(api.stored("files"), 1);
    assert_ne!(api.upload("a.txt", b"abc").await["id"], first["id"]);
}

async fn part(api: &Api, upload: &str, content: &'static [u8]) -> Value {
    let form = Form::new().part("data", Part::bytes(content).file_name("part"));
    let (status, part) = answer(api.request(Method::POST, &format!("/v1/uploads/{upload}/parts")).multipart(form)).await;
    assert_eq!(status, 200, "{part}");
    part["id"].clone()
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn parts_become_a_file_in_the_order_of_completion(db: PgPool) {
    let api = Api::start(db).await;
    let begin = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 11, "mime_type": "text/plain"});
    let (status, upload) = api.post("/v1/uploads", &begin).await;
    assert_eq!((status.as_u16(), &upload["status"]), (200, &json!("pending")), "{upload}");
    let id = upload["id"].as_str().unwrap();
    let (world, hello) = (part(&api, id, b"world").await, part(&api, id, b"hello ").await);
    let complete = format!("/v1/uploads/{id}/complete");
    let refusal = api.post(&complete, &json!({"part_ids": [hello]})).await;
    assert_eq!(refused("a part too few", &refusal, &[422]).as_deref(), Some("part_ids"));
    refused("a part twice", &api.post(&complete, &json!({"part_ids": [hello, hello]})).await, &[422]);
    let refusal = api.post(&complete, &json!({"part_ids": [hello, "part_x"]})).await;
    assert_eq!(refused("an unknown part", &refusal, &[404]).as_deref(), Some("part_ids[1]"));
    let wrong = json!({"part_ids": [hello, world], "md5": "00000000000000000000000000000000"});
    assert_eq!(refused("another md5", &api.post(&complete, &wrong).await, &[422]).as_deref(), Some("md5"));
    let right = json!({"part_ids": [hello, world], "md5": "5eb63bbbe01eeed093cb22bb8f5acdc3"});
    let (status, done) = api.post(&complete, &right).await;
    assert_eq!((status.as_u16(), &done["status"]), (200, &json!("completed")), "{done}");
    assert_eq!(api.post(&complete, &right).await.1, done);
    let content =
        api.request(Method::GET, &format!("/v1/files/{}/content", done["file"]["id"].as_str().unwrap())).send().await.unwrap();
    assert_eq!(content.bytes().await.unwrap(), "hello world");
    refused("cancelling a completed one", &api.post(&format!("/v1/uploads/{id}/cancel"), &json!({})).await, &[409]);
    assert_eq!((api.stored("files"), api.stored("parts"), api.stored("tmp")), (1, 0, 0));
}

/// Whether the client heard the first answer cannot be known, so the retry gets the same part; a client
/// that did hear it names the part where both belong.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn an_sdks_retry_makes_no_second_part(db: PgPool) {
    let api = Api::start(db).await;
    let begin = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 6, "mime_type": "text/plain"});
    let id = api.post("/v1/uploads", &begin).await.1["id"].as_str().unwrap().to_owned();
    let first = part(&api, &id, b"abc").await;
    let form = Form::new().part("data", Part::bytes(&b"abc"[..]).file_name("part"));
    let retry = api.request(Method::POST, &format!("/v1/uploads/{id}/parts")).header("x-stainless-retry-count", "1");
    assert_eq!(answer(retry.multipart(form)).await.1["id"], first);
    assert_eq!((api.stored("parts"), api.stored("tmp")), (1, 0));
    let (status, done) = api.post(&format!("/v1/uploads/{id}/complete"), &json!({"part_ids": [first, first]})).await;
    assert_eq!(status, 200, "{done}");
    let path = format!("/v1/files/{}/content", done["file"]["id"].as_str().unwrap());
    assert_eq!(api.request(Method::GET, &path).send().await.unwrap().bytes().await.unwrap(), "abcabc");
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_cancelled_or_expired_upload_takes_no_parts(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let begin = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
    for end in ["cancel", "expire"] {
        let id = api.post("/v1/uploads", &begin).await.1["id"].as_str().unwrap().to_owned();
        part(&api, &id, b"abc").await;
        match end {
            "cancel" => assert_eq!(api.post(&format!("/v1/uploads/{id}/cancel"), &json!({})).await.1["status"], "cancelled"),
            _ => drop(sqlx::query("UPDATE uploads SET expires_at = now() WHERE id = $1").bind(&id).execute(&db).await.unwrap()),
        }
        let form = Form::new().part("data", Part::bytes(&b"abc"[..]).file_name("part"));
        let late = answer(api.request(Method::POST, &format!("/v1/uploads/{id}/parts")).multipart(form)).await;
        refused(end, &late, &[409]);
    }
    assert_eq!((api.stored("parts"), api.stored("tmp")), (1, 0), "only the expired one's part waits for housekeeping");
}
