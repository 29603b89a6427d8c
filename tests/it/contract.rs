//! The document as a test plan: every operation that it states is tried without a key, with bad
//! bodies, with another project's key and with every leaf of its examples changed. A new route is
//! covered by being in the document. Whether a body fits is asked of a validator that shares no code
//! with the server.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex},
};

use jsonschema::Validator;
use lathe_api::{
    idempotency::CREATIONS,
    openapi::{self, ADMIN_TAGS},
};
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
        self.stated["tags"].as_array().is_some_and(|tags| tags.iter().any(|tag| ADMIN_TAGS.iter().any(|admin| tag == admin)))
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

    /// Sends, and holds the answer against the document: its status is stated, its body has the shape
    /// stated for that.
    async fn send(&self, api: &Api, path: &str, key: &str, body: Option<&Value>) -> (StatusCode, Value) {
        let request = api.client.request(self.method.clone(), format!("{}{path}", api.base)).bearer_auth(key);
        let answer = answer(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await;
        let stated = self.stated["responses"].get(answer.0.as_str());
        assert!(stated.is_some(), "the document does not say that {} may answer {}: {}", self.id, answer.0, answer.1);
        let json = stated.map(|stated| &stated["content"]["application/json"]["schema"]).filter(|schema| schema.is_object());
        if let Some(schema) = json.filter(|_| self.method != Method::HEAD && !answer.1.is_null()) {
            let mut known = ANSWERS.lock().expect("no test panics within");
            let validator = known.entry((self.id.clone(), answer.0)).or_insert_with(|| validator(schema, &DOCUMENT));
            let wrong: Vec<String> =
                validator.iter_errors(&answer.1).map(|error| format!("{}: {error}", error.instance_path())).collect();
            drop(known);
            assert!(wrong.is_empty(), "{} answers {}: {wrong:?}", self.id, answer.1);
        }
        answer
    }

    /// What the document says a body must be.
    fn body_validator(&self, document: &Value) -> Validator {
        validator(&self.stated["requestBody"]["content"]["application/json"]["schema"], document)
    }
}

static DOCUMENT: LazyLock<Value> = LazyLock::new(openapi::document);

/// The shapes of answers, by operation and status.
static ANSWERS: LazyLock<Mutex<HashMap<(String, StatusCode), Validator>>> = LazyLock::new(Mutex::default);

fn validator(schema: &Value, document: &Value) -> Validator {
    let mut whole = json!({"components": document["components"]});
    whole["allOf"] = json!([schema]);
    jsonschema::draft202012::new(&whole).expect("the document's schemas are JSON Schema")
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
    }
}

/// Bodies and answers have examples, all of which fit their schemas; whatever is not a success has the
/// shape of an error.
#[test]
fn every_body_and_answer_has_an_example_that_fits() {
    let document = openapi::document();
    for operation in operations(&document) {
        let bodies = std::iter::once(("the body".to_owned(), &operation.stated["requestBody"]["content"]));
        let answers = operation.stated["responses"].as_object().expect("answers").iter();
        for (what, content) in bodies.chain(answers.map(|(status, answer)| (status.clone(), &answer["content"]))) {
            let json = &content["application/json"];
            let case = format!("{what} of {}", operation.id);
            if json.is_object() {
                let examples = schema_examples(&json["schema"], &document);
                assert!(!examples.is_empty(), "{case} has no example");
                let validator = validator(&json["schema"], &document);
                for example in examples {
                    let wrong: Vec<String> =
                        validator.iter_errors(&example).map(|error| format!("{}: {error}", error.instance_path())).collect();
                    assert!(wrong.is_empty(), "{case}: {example}: {wrong:?}");
                }
            }
            if what.starts_with(['4', '5']) {
                assert!(json.is_object(), "{case} has no shape");
            }
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
        let large = vec![b' '; api.state.config.json_limit + 1];
        refused(&format!("{} with a large body", operation.id), &raw("application/json", large).await, &[413]);
    }
}

/// An example with the ids in it replaced by those of resources that are there.
fn with_ids(example: &Value, resources: &[(&str, String)]) -> Value {
    match example {
        Value::String(text) => {
            let kinds = [("ds_", "dataset_id"), ("tok_", "tokenizer_id"), ("file-", "file_id"), ("model-", "model")];
            let kind = kinds.iter().find(|(prefix, _)| text.starts_with(prefix));
            let id = kind.and_then(|(_, name)| resources.iter().find(|(known, _)| known == name));
            id.map_or_else(|| example.clone(), |(_, id)| json!(id))
        }
        Value::Array(items) => items.iter().map(|item| with_ids(item, resources)).collect(),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(name, field)| (name.clone(), with_ids(field, resources)));
            Value::Object(fields.collect())
        }
        other => other.clone(),
    }
}

/// Every operation is carried out, or refused for a state that the fixture has (nothing is made, since no
/// runner is there).
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_good_request_is_answered_in_the_stated_shape(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    let unready = [
        "list_dataset_rows",
        "encode_text",
        "decode_ids",
        "count_tokens",
        "create_completion",
        "create_chat_completion",
        "delete_file",
        "delete_training_job",
        "delete_model",
        "delete_dataset",
        "delete_tokenizer",
        "resume_training_job",
        "resume_fine_tuning_job",
    ];
    let mut operations = operations(&DOCUMENT);
    // What ends something comes last, and the end of the key in use after all else.
    operations.sort_by_key(|operation| {
        (operation.id == "delete_key", operation.method == Method::DELETE, operation.id.starts_with("cancel_"))
    });
    for operation in operations {
        let path = operation.path(&resources);
        let bodies: Vec<Option<Value>> = match operation.examples(&DOCUMENT) {
            examples if examples.is_empty() => vec![None],
            examples => examples.iter().map(|example| Some(with_ids(example, &resources))).collect(),
        };
        let forms = operation.stated["requestBody"]["content"]["multipart/form-data"].is_object();
        for body in bodies.iter().filter(|_| !forms) {
            let (status, answer) = operation.send(&api, &path, &api.key, body.as_ref()).await;
            let allowed = status.is_success()
                || unready.contains(&operation.id.as_str()) && status == 409
                || operation.id == "get_readiness" && status == 503
                // The example's parts are nobody's.
                || operation.id == "complete_upload" && status == 404;
            assert!(allowed, "{} {path} {body:?}: {status} {answer}", operation.id);
        }
    }
}

/// What takes no body ignores none.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn no_body_is_ignored(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    let document = openapi::document();
    let bare = |operation: &&Operation| operation.method == Method::POST && operation.stated["requestBody"].is_null();
    let operations = operations(&document);
    let mut seen = 0;
    for operation in operations.iter().filter(bare) {
        let path = operation.path(&resources);
        let refusal = operation.send(&api, &path, &api.key, Some(&json!({"colour": 1}))).await;
        assert_eq!(refused(&operation.id, &refusal, &[400]).as_deref(), Some("colour"), "{}", operation.id);
        let (status, body) = operation.send(&api, &path, &api.key, Some(&json!({}))).await;
        assert_ne!(status, 400, "{} with an empty object: {body}", operation.id);
        seen += 1;
    }
    assert!(seen >= 7, "{seen} operations take no body");
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn bad_paths_are_refused(db: PgPool) {
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
    }
}

/// What the document says of a parameter is what the server takes.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn parameters_are_refused_where_the_schema_refuses_them(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    for operation in operations(&DOCUMENT).iter().filter(|operation| operation.method == Method::GET && !operation.public()) {
        let parameters = operation.stated["parameters"].as_array().cloned().unwrap_or_default();
        for parameter in parameters.iter().filter(|parameter| parameter["in"] != "path") {
            let (name, in_header) = (parameter["name"].as_str().expect("a name"), parameter["in"] == "header");
            let schema = validator(&parameter["schema"], &DOCUMENT);
            for text in ["unknown", "\0", "", " 1", "-1", "0", "1", "1.5", "10001", "99999999999999999999", "ASC"] {
                let number = text.parse().map(Value::Number).ok();
                let fits = [Some(json!(text)), number].into_iter().flatten().any(|value| schema.is_valid(&value));
                let path = operation.path(&resources);
                let answer = match in_header {
                    true if text.contains(['\0', ' ']) => continue,
                    true => answer(api.request(Method::GET, &path).header(name, text)).await,
                    false => {
                        let path = format!("{path}?{name}={}", text.replace('\0', "%00").replace(' ', "%20"));
                        operation.send(&api, &path, &api.key, None).await
                    }
                };
                match fits {
                    true => assert_ne!(answer.0, 400, "{} with {name} {text:?}: {}", operation.id, answer.1),
                    false => assert_eq!(refused(&operation.id, &answer, &[400]).as_deref(), Some(name), "{text:?}"),
                }
            }
        }
    }
}

/// Also where there are none, and whatever else is wrong; not for the probes of a load balancer.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn an_unknown_query_parameter_is_refused(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    for operation in operations(&DOCUMENT).iter().filter(|operation| !operation.public()) {
        let path = format!("{}?not_a_parameter=1", operation.path(&resources));
        let refusal = operation.send(&api, &path, &api.key, None).await;
        assert_eq!(refused(&operation.id, &refusal, &[400]).as_deref(), Some("not_a_parameter"), "{}", operation.id);
        refused(&operation.id, &operation.send(&api, &path, "wrong", None).await, &[401]);
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

/// `/a/0/b` as refusals write it: `a[0].b`.
fn param_of(body: &Value, pointer: &str) -> String {
    let (mut at, mut path) = (body, String::new());
    for name in pointer.split('/').skip(1) {
        let name = name.replace("~1", "/").replace("~0", "~");
        let index = name.parse::<usize>().ok().filter(|_| at.is_array());
        path += &match index {
            Some(index) => format!("[{index}]"),
            None if path.is_empty() => name.clone(),
            None => format!(".{name}"),
        };
        at = index.map_or(&at[&name], |index| &at[index]);
    }
    path
}

/// A changed example, with what a refusal of it must name.
enum Variation {
    /// The path, or one below it, of what is changed, or of what a removed thing is missing in.
    Changed(String, Value),
    /// An unknown field has this path; it is never accepted.
    Unknown(String, Value),
}

/// Every variation of an example.
fn variations(example: &Value) -> Vec<Variation> {
    let mut places = Vec::new();
    leaves(example, String::new(), &mut places);
    let mut variations = Vec::new();
    for place in places {
        let param = param_of(example, &place);
        for mutation in mutations() {
            let mut body = example.clone();
            *body.pointer_mut(&place).expect("it was found there") = mutation;
            variations.push(Variation::Changed(param.clone(), body));
        }
        let mut shorter = example.clone();
        remove(&mut shorter, &place);
        let parent = place.rsplit_once('/').map_or("", |(parent, _)| parent);
        variations.push(Variation::Changed(param_of(example, parent), shorter));
        let mut longer = example.clone();
        if let Some(Value::Object(fields)) = longer.pointer_mut(&place) {
            fields.insert("not_a_field".to_owned(), json!(1));
            variations.push(Variation::Unknown(param_of(&longer, &format!("{place}/not_a_field")), longer));
        }
    }
    variations
}

/// A body that the document's schema accepts is never answered by a 400, and one that it refuses always,
/// with the full path of what is wrong.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_changed_example_is_refused_where_the_schema_refuses_it(db: PgPool) {
    let api = Api::start(db).await;
    let resources = api.resources().await;
    let document = openapi::document();
    let mut failures = Vec::new();
    for operation in operations(&document).iter().filter(|operation| operation.takes_json()) {
        let (path, validator) = (operation.path(&resources), operation.body_validator(&document));
        for example in operation.examples(&document) {
            for variation in variations(&example) {
                let (place, body, unknown) = match variation {
                    Variation::Changed(place, body) => (place, body, false),
                    Variation::Unknown(place, body) => (place, body, true),
                };
                let fits = validator.is_valid(&body);
                let (status, answer) = operation.send(&api, &path, &api.key, Some(&body)).await;
                let param = answer["error"]["param"].as_str().unwrap_or_default();
                let right = match (fits, status.as_u16()) {
                    (false, 400) if unknown => param == place,
                    (false, 400) => param.starts_with(&place),
                    (true, 400) | (false, _) => false,
                    (true, _) if unknown => false,
                    (true, status) => (200..300).contains(&status) || matches!(status, 404 | 409 | 413 | 422),
                };
                if !right {
                    let shown: String = body.to_string().chars().take(300).collect();
                    failures.push(format!("{} {place:?}, fits: {fits}: {shown}: {status} {answer}", operation.id));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
