//! The dashboard asks for what `/metrics` shows, by labels that it has, and for all of it.

use std::collections::BTreeSet;

use serde_json::Value;
use sqlx::PgPool;

use crate::api::Api;

/// Families that `/metrics` shows, and the names of labels in it.
async fn exposed(api: &Api) -> (BTreeSet<String>, BTreeSet<String>) {
    let request = api.client.get(format!("{}/metrics", api.base)).bearer_auth(&api.key);
    let text = request.send().await.expect("an answer").text().await.expect("text");
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let labels = text.split(['{', ',', '"']).filter_map(|piece| piece.strip_suffix('='));
    (families.map(str::to_owned).collect(), labels.map(str::to_owned).collect())
}

fn expressions(value: &Value) -> Vec<&str> {
    let inner = value.as_object().into_iter().flat_map(serde_json::Map::values).chain(value.as_array().into_iter().flatten());
    value["expr"].as_str().or_else(|| value["query"]["query"].as_str()).into_iter().chain(inner.flat_map(expressions)).collect()
}

/// Words made of letters, digits and `_`.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn the_dashboard_asks_for_what_the_metrics_are(db: PgPool) {
    let api = Api::start(db.clone()).await;
    api.resources().await;
    sqlx::query(
        "INSERT INTO replicas (id, model_id, artifact, state, memory_bytes) VALUES ('replica_1', 'model-test', 'a', 'queued', 1)",
    )
    .execute(&db)
    .await
    .expect("a row that fits");
    let (families, labels) = exposed(&api).await;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docker/grafana/lathe.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("the dashboard")).expect("JSON");
    let expressions = expressions(&dashboard);
    assert!(expressions.len() >= families.len(), "{expressions:?}");
    let asked: BTreeSet<String> =
        expressions.iter().flat_map(|text| words(text)).filter(|word| word.starts_with("lathe_")).map(str::to_owned).collect();
    assert_eq!(asked, families);
    for expression in expressions {
        // What stands before a comparison in braces, and between the parentheses of `by`.
        let compared = expression.split(['{', '}']).skip(1).step_by(2).flat_map(|selector| selector.split("\","));
        let compared = compared.filter_map(|one| words(one).next());
        let grouped = expression.split("by (").skip(1).flat_map(|rest| words(rest.split(')').next().unwrap_or_default()));
        for label in compared.chain(grouped).filter(|label| *label != "job") {
            assert!(labels.contains(label), "nothing has the label {label}: {expression}");
        }
    }
    let panels = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<i64> = panels.iter().filter_map(|panel| panel["id"].as_i64()).collect();
    assert_eq!(ids.len(), panels.len(), "ids are distinct");
    for panel in panels {
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{}", panel["title"]);
    }
}
