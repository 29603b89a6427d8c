//! What is logged is changed while the stack runs, for the api and its runner.

use lathe_tests::{PATIENCE, TestApp, within};
use reqwest::Method;
use serde_json::{Value, json};

#[tokio::test]
async fn what_is_logged_changes_without_a_restart() {
    let app = TestApp::start().await;
    let put = |body: Value| app.send(app.request(Method::PUT, "/v1/log_filter").json(&body));
    let count = |text: &str| app.log_text().matches(text).count();
    assert_eq!(app.get("/v1/log_filter").await.ok()["filter"], Value::Null);
    assert_eq!(put(json!({"filter": "a=b=c"})).await.refused(422)["param"], "filter");
    assert_eq!(count("DEBUG sqlx::query"), 0);

    let set = put(json!({"filter": "info,sqlx=debug", "expires_after": 3600})).await.ok();
    assert!(set["expires_at"].is_i64(), "{set}");
    assert_eq!(app.get("/v1/log_filter").await.ok(), set);
    within(PATIENCE, "api and runner log by it", || (count("what is logged was changed") == 2).then_some(()));
    within(PATIENCE, "statements are logged", || (count("DEBUG sqlx::query") > 0).then_some(()));

    let deleted = app.delete("/v1/log_filter").await.ok();
    assert_eq!((&deleted["filter"], &deleted["expires_at"]), (&Value::Null, &Value::Null));
    within(PATIENCE, "both log as before", || (count("what is logged was changed") == 4).then_some(()));
    let statements = count("DEBUG sqlx::query");
    app.get("/v1/projects").await.ok();
    assert_eq!(count("DEBUG sqlx::query"), statements);
}
