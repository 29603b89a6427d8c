//! Keys: who gets in, who sees what, and how soon a revoked key is useless.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

use lathe_api::state::ApiConfig;
use reqwest::Method;
use serde_json::json;
use sqlx::PgPool;

use crate::api::{Api, answer, refused};

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_key_lives_from_creation_to_revocation(db: PgPool) {
    let api = Api::start(db).await;
    let (status, project) = api.post("/v1/projects", &json!({"name": "research", "metadata": {"team": "nlp"}})).await;
    assert_eq!(status, 200, "{project}");
    refused("the name again", &api.post("/v1/projects", &json!({"name": "research"})).await, &[409]);
    let keys = format!("/v1/projects/{}/keys", project["id"].as_str().unwrap());
    let (status, key) = api.post(&keys, &json!({"name": "ci"})).await;
    assert_eq!((status.as_u16(), &key["scope"]), (200, &json!("project")), "{key}");
    let secret = key["key"].as_str().unwrap().to_owned();
    assert!(secret.ends_with(key["hint"].as_str().unwrap()));
    let (_, listed) = api.get(&keys).await;
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
    assert!(!listed.to_string().contains(&secret), "a list shows a secret");

    let files = || answer(api.client.get(format!("{}/v1/files", api.base)).bearer_auth(&secret));
    assert_eq!(files().await.0, 200);
    let projects = answer(api.client.get(format!("{}/v1/projects", api.base)).bearer_auth(&secret)).await;
    refused("projects with a project's key", &projects, &[403]);

    let (status, _) = api.delete(&format!("{keys}/{}", key["id"].as_str().unwrap())).await;
    assert_eq!(status, 200);
    refused("a revoked key", &files().await, &[401]);
}

/// Another process that revokes a key is not told here, so only forgetting helps.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_key_revoked_elsewhere_stops_within_seconds(db: PgPool) {
    let api = Api::start(db.clone()).await;
    assert_eq!(api.get("/v1/files").await.0, 200);
    sqlx::query("UPDATE api_keys SET revoked_at = now()").execute(&db).await.unwrap();
    let began = Instant::now();
    while api.get("/v1/files").await.0 != 401 {
        assert!(began.elapsed() < Duration::from_secs(4), "a revoked key still works");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn no_body_is_read_before_the_key(db: PgPool) {
    let api = Api::start(db).await;
    let endless = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 1 << 16]));
    let request = api.client.post(format!("{}/v1/projects", api.base)).header("content-type", "application/json");
    // The server answers and closes; a client that goes on sending may see either.
    match request.body(reqwest::Body::wrap_stream(endless)).send().await {
        Ok(response) => assert_eq!(response.status(), 401),
        Err(error) => assert!(error.is_request(), "{error}"),
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn metrics_are_for_admins(db: PgPool) {
    let api = Api::start(db).await;
    let metrics = |key: &str| api.client.get(format!("{}/metrics", api.base)).bearer_auth(key.to_owned()).send();
    assert_eq!(metrics(&api.other).await.unwrap().status(), 403);
    assert_eq!(metrics("nobody").await.unwrap().status(), 401);
    let text = metrics(&api.key).await.unwrap().text().await.unwrap();
    assert!(text.contains("lathe_http_requests_total{method=\"GET\",route=\"/metrics\",status=\"401\"} 1"), "{text}");
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn creations_happen_once(db: PgPool) {
    let api = Api::start(db).await;
    let create = |name: &str, header: (&'static str, &'static str)| {
        answer(api.request(Method::POST, "/v1/projects").header(header.0, header.1).json(&json!({"name": name})))
    };
    let first = create("a", ("idempotency-key", "one")).await;
    assert_eq!(first.0, 200);
    assert_eq!(create("a", ("idempotency-key", "one")).await, first);
    refused("the key with another body", &create("b", ("idempotency-key", "one")).await, &[422]);
    // A refusal that cannot be kept is given again.
    let nul = || {
        let request = api.request(Method::POST, "/v1/projects").header("idempotency-key", "two");
        answer(request.json(&json!({"name": "n", "metadata": {"\0": "a"}})))
    };
    for _ in 0..2 {
        refused("a name that holds U+0000", &nul().await, &[422]);
    }
    // As OpenAI's SDKs retry: the first attempt counts 0 and is a new request always.
    let first = create("c", ("x-stainless-retry-count", "0")).await;
    assert_eq!(create("c", ("x-stainless-retry-count", "1")).await, first);
    refused("a new request", &create("c", ("x-stainless-retry-count", "0")).await, &[409]);
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_lost_database_is_a_503(db: PgPool) {
    let api = Api::start(db.clone()).await;
    db.close().await;
    let response = api.request(Method::GET, "/v1/files").send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(api.get("/healthz").await.0, 200);
    let (status, readiness) = api.get("/readyz").await;
    assert_eq!((status.as_u16(), &readiness["ready"]), (503, &json!(false)));
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_key_that_sends_too_much_is_told_when_to_come_again(db: PgPool) {
    let config = ApiConfig { requests_per_minute: NonZeroU32::new(20), ..ApiConfig::default() };
    let api = Api::start_with(db, config).await;
    let number =
        |answer: &reqwest::Response, name: &str| -> Option<u64> { answer.headers().get(name)?.to_str().ok()?.parse().ok() };
    for left in (0..20).rev() {
        // A refusal for another reason counts too.
        let path = if left % 2 == 0 { "/v1/files" } else { "/v1/files/file-missing" };
        let answer = api.request(Method::GET, path).send().await.unwrap();
        assert_eq!(answer.status(), if left % 2 == 0 { 200 } else { 404 });
        assert_eq!(number(&answer, "x-ratelimit-limit-requests"), Some(20));
        assert!(number(&answer, "x-ratelimit-remaining-requests").is_some_and(|remaining| (left..left + 2).contains(&remaining)));
        assert!(answer.headers()["x-ratelimit-reset-requests"].to_str().unwrap().ends_with('s'));
    }
    let began = Instant::now();
    let refusal = api.request(Method::GET, "/v1/files").send().await.unwrap();
    let wait = number(&refusal, "retry-after").expect("it says when to come again");
    assert!((1..=3).contains(&wait), "{wait}");
    refused("one too many", &answer(api.request(Method::GET, "/v1/files")).await, &[429]);
    // Neither another key's requests nor probes.
    assert_eq!(answer(api.client.get(format!("{}/v1/files", api.base)).bearer_auth(&api.other)).await.0, 200);
    assert_eq!(api.client.get(format!("{}/healthz", api.base)).send().await.unwrap().status(), 200);
    refused("no key", &answer(api.client.get(format!("{}/v1/files", api.base))).await, &[401]);
    tokio::time::sleep(Duration::from_secs(wait).saturating_sub(began.elapsed())).await;
    assert_eq!(api.get("/v1/files").await.0, 200);
}
