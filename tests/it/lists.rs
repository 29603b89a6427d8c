//! Every list of the document is paged the same way: by (created_at, id), in both orders, with filters.

use lathe_api::openapi;
use serde_json::Value;
use sqlx::PgPool;

use crate::api::Api;

/// Five more of everything, all created at one moment, so that the id decides.
const MORE: &str = r#"
INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, artifact)
    SELECT 'file-' || n, 'proj_default', 'a', 'batch', 1, '', 'files/file-' || n FROM generate_series(1, 5) n;
INSERT INTO jobs (id, project_id, kind, name, state, pool, spec, base_model_id, queued_at)
    SELECT 'ftjob-' || n, 'proj_default', 'train', 'named', 'queued', 'device', '{}', 'model-base', now() FROM generate_series(1, 5) n;
INSERT INTO datasets (id, project_id, name, state, job_id, source)
    SELECT 'ds_' || n, 'proj_default', 'named', 'ready', 'job_ds', '{}' FROM generate_series(1, 5) n;
INSERT INTO tokenizers (id, project_id, name, state, job_id, type)
    SELECT 'tok_' || n, 'proj_default', 'named', 'ready', 'job_tok', 'bpe' FROM generate_series(1, 5) n;
INSERT INTO models (id, project_id, name, state, job_id, config, code_version)
    SELECT 'model-' || n, 'proj_default', 'named', 'ready', 'ftjob-test', '{}', '0' FROM generate_series(1, 5) n;
INSERT INTO checkpoints (id, job_id, attempt, step, artifact, bytes)
    SELECT 'ftckpt_' || n, 'ftjob-test', 1, n, 'checkpoints/' || n, 1 FROM generate_series(1, 5) n;
INSERT INTO projects (id, name) SELECT 'proj_' || n, 'named' || n FROM generate_series(1, 5) n;
INSERT INTO api_keys (id, project_id, name, scope, hash, hint)
    SELECT 'key_' || n, 'proj_default', 'named', 'project', 'hash' || n, 'hint' FROM generate_series(1, 5) n;
INSERT INTO audit_log (id, type, resource_id, project_id, actor)
    SELECT 'audit_' || n, 'file.deleted', 'file-' || n, 'proj_default', 'system' FROM generate_series(1, 5) n;
INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
    SELECT 'runner_' || n, 'named', 'host', 1, '0', '[]', 1, 1, now() + interval '1 hour' FROM generate_series(1, 5) n;
"#;

/// The paths of the lists that are paged by id, filled in, with the names of their parameters.
fn lists(resources: &[(&str, String)]) -> Vec<(String, Vec<String>)> {
    let document = openapi::document();
    let mut lists = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        let parameters = item["get"]["parameters"].as_array().into_iter().flatten();
        let names: Vec<String> =
            parameters.filter(|one| one["in"] == "query").filter_map(|one| one["name"].as_str().map(str::to_owned)).collect();
        if !names.iter().any(|name| name == "order") {
            continue;
        }
        let filled = resources.iter().fold(path.clone(), |path, (name, id)| path.replace(&format!("{{{name}}}"), id));
        lists.push((filled, names));
    }
    lists
}

async fn pages(api: &Api, path: &str, order: &str) -> Vec<String> {
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let (status, page) = api.get(&format!("{path}?limit=2&order={order}{after}")).await;
        assert_eq!(status, 200, "{path}: {page}");
        assert_eq!(page["object"], "list");
        let ids = page["data"].as_array().expect("a page").iter().map(|item| item["id"].as_str().expect("an id").to_owned());
        seen.extend(ids);
        assert_eq!(page["last_id"].as_str(), seen.last().map(String::as_str), "{path}");
        if page["has_more"] == false {
            return seen;
        }
        after = format!("&after={}", page["last_id"].as_str().expect("a page that goes on has a last item"));
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn every_list_is_paged_both_ways_and_filtered(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let resources = api.resources().await;
    sqlx::raw_sql(MORE).execute(&db).await.expect("rows that fit the schema");
    let lists = lists(&resources);
    assert!(lists.len() >= 10, "{lists:?}");
    for (path, parameters) in lists {
        let has = |name: &str| parameters.iter().any(|known| known == name);
        assert!(has("after") && has("limit"), "{path}");
        let ascending = pages(&api, &path, "asc").await;
        let mut descending = pages(&api, &path, "desc").await;
        assert!(ascending.len() >= 5, "{path}: {ascending:?}");
        let mut unique = ascending.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), ascending.len(), "{path} shows something twice");
        descending.reverse();
        assert_eq!(ascending, descending, "{path}");
        let (_, default) = api.get(&path).await;
        assert_eq!(default["data"][0]["id"].as_str(), ascending.last().map(String::as_str), "{path} begins with the newest");
        if has("name") {
            let named = if path == "/v1/projects" { "named3" } else { "named" };
            let (_, found) = api.get(&format!("{path}?name={named}")).await;
            let count = found["data"].as_array().map_or(0, Vec::len);
            assert_eq!(count, if named == "named" { 5 } else { 1 }, "{path}: {found}");
        }
        if has("state") {
            let state: &Value = &default["data"][0]["state"];
            let state = state.as_str().unwrap_or("active");
            let (_, found) = api.get(&format!("{path}?state={state}")).await;
            assert!(found["data"].as_array().is_some_and(|data| !data.is_empty()), "{path}?state={state}: {found}");
            let (_, none) = api.get(&format!("{path}?state={state}&name=nobody")).await;
            assert_eq!(none["data"], Value::Array(Vec::new()), "{path}");
        }
    }
}
