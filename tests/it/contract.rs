//! The document as a test plan: every operation that it states is tried without a key, with bad
//! bodies, with another project's key and with every leaf of its examples changed. A new route is
//! covered by being in the document.

use lathe_api::{idempotency::CREATIONS, openapi};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::api::{Api, answer, refused};

struct Operation {
    id: String,
    method: Method,
    path: String,
    stated: Value,
}

fn operations(document: &Value) -> Vec<Operation> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, stated) in item.as_object().expect("operations") {
            let Ok(method) = method.to_uppercase().parse::<Method>() else { continue };
            let id = stated["operationId"].as_str().expect("an operation id").to_owned();
            operations.push(Operation { id, method, path: path.clone(), stated: stated.clone() });
        }
    }
    operations
}

impl Operation {
    fn public(&self) -> bool {
        self.stated["security"] == json!([])
    }

    /// Whether only admins get that far.
    fn admin(&self) -> bool {
        self.stated["tags"].as_array().is_some_and(|tags| tags.iter().any(|tag| tag == "projects" || tag == "operating"))
    }

    fn takes_json(&self) -> bool {
        self.stated["requestBody"]["content"]["application/json"].is_object()
    }

    /// The example bodies: beside the schema or inside it.
    fn examples(&self, document: &Value) -> Vec<Value> {
        let content = &self.stated["requestBody"]["content"]["application/json"];
        let named = content["examples"].as_object().into_iter().flatten().map(|(_, example)| example["value"].clone());
        let beside = Some(&content["example"]).filter(|example| !example.is_null()).cloned();
        named.chain(beside).chain(schema_examples(&content["schema"], document)).collect()
    }

    /// The path with its parameters filled in.
    fn path(&self, resources: &[(&str, String)]) -> String {
        let mut path = self.path.clone();
        while let (Some(open), Some(close)) = (path.find('{'), path.find('}')) {
            let name = &path[open + 1..close];
            let id = resources.iter().find(|(known, _)| *known == name).map_or("unknown", |(_, id)| id);
            path = format!("{}{id}{}", &path[..open], &path[close + 1..]);
        }
        path
    }

    async fn send(&self, api: &Api, path: &str, key: &str, body: Option<&Value>) -> (StatusCode, Value) {
        let request = api.client.request(self.method.clone(), format!("{}{path}", api.base)).bearer_auth(key);
        answer(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await
    }
}

/// A schema's own examples, else those of its forms.
fn schema_examples(schema: &Value, document: &Value) -> Vec<Value> {
    let schema = match schema["$ref"].as_str() {
        Some(name) => &document["components"]["schemas"][name.trim_start_matches("#/components/schemas/")],
        None => schema,
    };
    let own =
        schema["examples"].as_array().into_iter().flatten().chain(Some(&schema["example"]).filter(|example| !example.is_null()));
    let own: Vec<Value> = own.cloned().collect();
    if !own.is_empty() {
        return own;
    }
    schema["oneOf"].as_array().into_iter().flatten().flat_map(|form| schema_examples(form, document)).collect()
}

#[test]
fn every_operation_is_described() {
    let document = openapi::document();
    let tags: Vec<&Value> = document["tags"].as_array().expect("tags").iter().map(|tag| &tag["name"]).collect();
    let mut seen = std::collections::HashSet::new();
    for operation in operations(&document) {
        assert!(seen.insert(operation.id.clone()), "{} is there twice", operation.id);
        assert!(operation.stated["summary"].is_string(), "{} has no summary", operation.id);
        let tag = &operation.stated["tags"][0];
        assert!(tags.contains(&tag), "{} has the tag {tag}, which `openapi::tags` does not describe", operation.id);
        if operation.takes_json() {
            assert!(!operation.examples(&document).is_empty(), "the body of {} has no example", operation.id);
        }
    }
}

/// The SDKs repeat a POST that was not answered; whatever creates must know a repetition.
#[test]
fn every_creation_is_idempotent() {
    // Generations are never deduplicated, and a key's answer holds a secret.
    let exempt = ["create_key", "create_completion", "create_chat_completion", "create_embedding", "create_response"];
    for operation in operations(&openapi::document()) {
        if operation.id.starts_with("create_") && !exempt.contains(&operation.id.as_str()) {
            assert!(CREATIONS.contains(&operation.path.as_str()), "{} is not among idempotency::CREATIONS", operation.path);
        }
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn no_operation_answers_without_a_key(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    for operation in operations(&openapi::document()).iter().filter(|operation| !operation.public()) {
        let path = operation.path(&resources);
        let bare = answer(api.client.request(operation.method.clone(), format!("{}{path}", api.base))).await;
        refused(&operation.id, &bare, &[401]);
        refused(&operation.id, &operation.send(&api, &path, "wrong", None).await, &[401]);
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn nothing_is_visible_to_another_project(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    let document = openapi::document();
    for operation in operations(&document).iter().filter(|operation| operation.path.contains('{')) {
        let path = operation.path(&resources);
        let bodies = operation.examples(&document);
        let expected: &[u16] = if operation.admin() { &[403] } else { &[404] };
        let body = if operation.takes_json() { Some(bodies.first().unwrap_or(&Value::Null)) } else { None };
        refused(&operation.id, &operation.send(&api, &path, &api.other, body).await, expected);
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn bad_bodies_are_refused(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    let document = openapi::document();
    for operation in operations(&document).iter().filter(|operation| operation.takes_json()) {
        let path = operation.path(&resources);
        let raw = |kind: &'static str, body: Vec<u8>| {
            answer(api.request(operation.method.clone(), &path).header("content-type", kind).body(body))
        };
        let bodies: [&[u8]; 6] = [b"{", b"[]", b"null", b"\"\xff\"", br#"{"a": 1, "a": 2}"#, br#"{"not_a_field": 1}"#];
        for body in bodies {
            let case = format!("{} with {}", operation.id, String::from_utf8_lossy(body));
            refused(&case, &raw("application/json", body.to_vec()).await, &[400]);
        }
        let deep = "[".repeat(10_000).into_bytes();
        refused(&format!("{} with a deep body", operation.id), &raw("application/json", deep).await, &[400]);
        refused(&format!("{} with plain text", operation.id), &raw("text/plain", b"{}".to_vec()).await, &[415]);
        let large = vec![b' '; lathe_api::parse::JSON_LIMIT + 1];
        refused(&format!("{} with a large body", operation.id), &raw("application/json", large).await, &[413]);
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn bad_paths_and_queries_are_refused(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    for operation in
        operations(&openapi::document()).iter().filter(|operation| operation.method == Method::GET && !operation.public())
    {
        for id in ["unknown", "%00", "%FF", "%F0%9F%92%A5", &"x".repeat(5_000)] {
            if operation.path.contains('{') {
                let open = resources.iter().map(|(name, _)| (*name, id.to_owned())).collect::<Vec<_>>();
                refused(&operation.id, &operation.send(&api, &operation.path(&open), &api.key, None).await, &[400, 404]);
            }
        }
        let parameters = operation.stated["parameters"].as_array().cloned().unwrap_or_default();
        for parameter in parameters.iter().filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().expect("a name");
            let values: &[&str] = match name {
                "limit" => &["0", "-1", "x", "1.5", "99999999999999999999", ""],
                "order" => &["up", "", "ASC"],
                "after" => &["unknown", "%00"],
                _ => &[],
            };
            for value in values {
                let path = format!("{}?{name}={value}", operation.path(&resources));
                refused(&path, &operation.send(&api, &path, &api.key, None).await, &[400]);
            }
        }
        if !parameters.is_empty() {
            let path = format!("{}?not_a_parameter=1", operation.path(&resources));
            let (status, body) = operation.send(&api, &path, &api.key, None).await;
            assert!(status.is_success() || status.is_client_error(), "{path}: {status} {body}");
        }
    }
}

/// What a leaf is replaced by.
fn mutations() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(-1),
        json!(0),
        json!(0.5),
        json!(1e300),
        json!(u64::MAX),
        json!(""),
        json!("x".repeat(20_000)),
        json!("💥"),
        json!("\u{0}"),
        json!("ds_unknown"),
        json!([]),
        json!([[]]),
        json!({}),
        json!({"not_a_field": 1}),
    ]
}

fn leaves(value: &Value, at: String, found: &mut Vec<String>) {
    found.push(at.clone());
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, field)| leaves(field, format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")), found)),
        Value::Array(items) => items.iter().enumerate().for_each(|(index, item)| leaves(item, format!("{at}/{index}"), found)),
        _ => {}
    }
}

fn remove(body: &mut Value, leaf: &str) {
    let Some((parent, name)) = leaf.rsplit_once('/') else { return };
    match body.pointer_mut(parent) {
        Some(Value::Object(fields)) => drop(fields.remove(name)),
        Some(Value::Array(items)) => drop(name.parse().map(|index: usize| items.remove(index))),
        _ => {}
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn no_changed_example_is_an_internal_error(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    let document = openapi::document();
    let mut failures = Vec::new();
    for operation in operations(&document).iter().filter(|operation| operation.takes_json()) {
        let path = operation.path(&resources);
        for example in operation.examples(&document) {
            let mut places = Vec::new();
            leaves(&example, String::new(), &mut places);
            for place in places {
                let changed = mutations().into_iter().map(|mutation| {
                    let mut body = example.clone();
                    if let Some(leaf) = body.pointer_mut(&place) {
                        *leaf = mutation;
                    }
                    body
                });
                let mut shorter = example.clone();
                remove(&mut shorter, &place);
                for body in changed.chain([shorter]) {
                    let (status, answer) = operation.send(&api, &path, &api.key, Some(&body)).await;
                    let shown: String = body.to_string().chars().take(300).collect();
                    let shaped = status.is_success() || (status.is_client_error() && answer["error"]["message"].is_string());
                    if !shaped {
                        failures.push(format!("{} {shown}: {status} {answer}", operation.id));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
