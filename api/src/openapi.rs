//! The OpenAPI 3.1 document: what the router states, with what is common to all operations.
//!
//! The router is the source; nothing here names a route. Each operation gains the bearer scheme
//! (unless it is one of the public ones, which say so themselves) and the refusals that any
//! operation can give, so that routes state only what is particular to them.

use serde_json::{Map, Value, json};
use utoipa::{PartialSchema, ToSchema, openapi::OpenApi};

use crate::{idempotency::CREATIONS, problem::ErrorBody, routes};

/// The tag of operations that need no key.
pub const PUBLIC_TAG: &str = "health";

/// The tags of operations that only an admin's key may call.
pub const ADMIN_TAGS: [&str; 2] = ["projects", "operating"];

/// What a text in a path or a query fits: the database holds no U+0000.
const NO_NUL: &str = r"^[^\x00]*$";

/// The whole document, as `/openapi.json` and `lathe openapi` show it.
pub fn document() -> Value {
    finish(routes::routes().into_openapi())
}

/// Completes the router's own document.
pub fn finish(document: OpenApi) -> Value {
    let mut document = serde_json::to_value(document).unwrap_or_default();
    document["info"] = json!({
        "title": "Lathe",
        "version": env!("CARGO_PKG_VERSION"),
        "summary": "A corpus becomes a language model that answers over HTTP.",
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    });
    document["servers"] = json!([{"url": "/"}]);
    document["tags"] = json!(tags());
    document["components"]["securitySchemes"] =
        json!({"key": {"type": "http", "scheme": "bearer", "description": "An API key of a project."}});
    let mut schemas = vec![(ErrorBody::name().into_owned(), ErrorBody::schema())];
    ErrorBody::schemas(&mut schemas);
    for (name, schema) in schemas {
        document["components"]["schemas"][name] = json!(schema);
    }
    document["components"]["headers"] = json!({
        "x-request-id": {"description": "Names the request in the server's log.", "schema": {"type": "string"}},
        "Retry-After": {"description": "Seconds after which the request may succeed.", "schema": {"type": "integer"}},
        "x-should-retry": {"description": "`false`: the same request again will not help, whatever the status suggests.",
            "schema": {"type": "string", "enum": ["false"]}},
        "x-ratelimit-limit-requests": {"description": "Requests that the key may send in a minute; on every answer, where there is such a limit.",
            "schema": {"type": "integer"}},
        "x-ratelimit-remaining-requests": {"description": "How many of them are left.", "schema": {"type": "integer"}},
        "x-ratelimit-reset-requests": {"description": "Until all of them are there again, as in `1.5s`.", "schema": {"type": "string"}},
        "idempotent-replayed": {"description": "`true`: the answer that an earlier request got.", "schema": {"type": "string", "enum": ["true"]}},
    });
    document["components"]["parameters"] = json!({
        "Idempotency-Key": {"name": "Idempotency-Key", "in": "header", "required": false,
            "description": "For 24 hours the same key and body get the first answer again; with another body it is a 422.",
            "schema": {"type": "string", "minLength": 1, "maxLength": 255}},
    });
    if let Some(schemas) = document["components"]["schemas"].as_object_mut() {
        complete_lists(schemas);
    }
    for (path, item) in document["paths"].as_object_mut().into_iter().flatten() {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            match operation.as_object_mut() {
                Some(operation) if operation.contains_key("operationId") => complete(path, method, operation),
                _ => {}
            }
        }
    }
    link(&mut document);
    document
}

/// The document as it is committed: indented, with a newline at its end.
pub fn text() -> String {
    format!("{:#}\n", document())
}

fn tags() -> Vec<Value> {
    let tags = [
        ("files", "Uploaded bytes, whole or in parts."),
        ("datasets", "Rows made from files or by rule."),
        ("tokenizers", "Byte-level BPE, trained or imported."),
        ("training", "Training jobs: pretraining and instruction tuning."),
        ("fine-tuning", "The same jobs in OpenAI's shapes."),
        ("models", "The registry, with lineage."),
        ("generation", "Text from models."),
        ("projects", "Tenants and their keys."),
        ("operating", "Runners, metrics, the audit log and what is logged."),
        (PUBLIC_TAG, "Whether the server lives and is ready."),
    ];
    tags.iter().map(|(name, description)| json!({"name": name, "description": description})).collect()
}

/// What decides which refusals an operation can give.
struct Traits {
    public: bool,
    admin: bool,
    generates: bool,
    /// A body arrives, and is bounded, also where it must be empty.
    posted: bool,
    has_body: bool,
    has_json: bool,
    creates: bool,
    /// It names something that may not be there.
    has_id: bool,
}

impl Traits {
    fn of(path: &str, method: &str, operation: &Map<String, Value>) -> Traits {
        let list = |name: &str| operation.get(name).and_then(Value::as_array).into_iter().flatten();
        let tagged = |names: &[&str]| list("tags").any(|tag| names.iter().any(|name| tag == name));
        let body = operation.get("requestBody").map(|body| &body["content"]);
        Traits {
            public: tagged(&[PUBLIC_TAG]),
            admin: tagged(&ADMIN_TAGS),
            generates: tagged(&["generation"]),
            posted: ["post", "put"].contains(&method),
            has_body: body.is_some(),
            has_json: body.is_some_and(|body| body["application/json"].is_object()),
            creates: body.is_some() && CREATIONS.contains(&path),
            // The id of an item after which a page begins is one too; where items are numbered, any number may be named.
            has_id: list("parameters").any(|one| one["in"] == "path" || one["name"] == "after" && is_text(one)),
        }
    }

    /// Status, whether it applies, and what it means. Of two for one status the first holds.
    fn refusals(&self) -> [(&'static str, bool, &'static str); 18] {
        let &Traits { public, admin, generates, posted, has_body, has_json, creates, has_id } = self;
        [
            ("404", generates, "No such model."),
            ("409", generates, "The model is not ready."),
            ("429", generates, "The model's queue is full, or the key has sent too many requests."),
            ("429", !public, "The key has sent too many requests; try again after `Retry-After` seconds."),
            ("503", generates, "The model is loading, or its engine failed."),
            ("504", generates, "The answer took longer than the server allows."),
            ("400", !public, "Malformed or out of bounds; `param` says where."),
            ("401", !public, "No valid API key."),
            ("403", admin, "The key is not an admin's."),
            ("404", has_id, "Unknown, or another project's."),
            ("408", posted, "The body stopped arriving."),
            ("409", creates, "The first request with this `Idempotency-Key` is still being answered."),
            ("413", posted, "The body is over the limit."),
            ("415", has_body, "The body is of another content type."),
            ("422", has_json || creates, "Valid by the schema, but impossible here; `code` and `param` say why."),
            ("500", true, "Something failed inside; the log has it under the answer's x-request-id."),
            ("503", !public, "The database is away or there is no capacity; try again after `Retry-After` seconds."),
            ("507", has_body, "The disk or the project's quota on storage is full."),
        ]
    }

    /// The headers of an answer.
    fn headers(&self, status: &str) -> &'static [&'static str] {
        match status {
            "409" if self.creates => &["x-request-id", "Retry-After", "x-should-retry"],
            "409" | "504" | "507" => &["x-request-id", "x-should-retry"],
            "429" => &[
                "x-request-id",
                "Retry-After",
                "x-ratelimit-limit-requests",
                "x-ratelimit-remaining-requests",
                "x-ratelimit-reset-requests",
            ],
            "503" => &["x-request-id", "Retry-After"],
            "200" | "201" if self.creates => &["x-request-id", "idempotent-replayed"],
            _ => &["x-request-id"],
        }
    }
}

fn is_text(parameter: &Value) -> bool {
    parameter["schema"]["type"] == "string"
}

/// The refusals that any operation of this kind can give, and where they differ, an operation's own words
/// for them.
fn complete(path: &str, method: &str, operation: &mut Map<String, Value>) {
    // A body that is optional may be left out; it may not be null.
    if let Some(schema) = operation.get_mut("requestBody").and_then(|body| body.pointer_mut("/content/application~1json/schema"))
        && let Some(body) = schema["oneOf"].as_array().and_then(|either| either.iter().find(|one| one["$ref"].is_string()))
        && schema["oneOf"].as_array().is_some_and(|either| either.iter().any(|one| one["type"] == "null"))
    {
        *schema = body.clone();
    }
    let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
    for parameter in parameters.into_iter().flatten() {
        // It may be left out; it may not be null.
        if let Some(name) =
            parameter["schema"]["type"].as_array().and_then(|types| types.iter().find(|name| *name != "null")).cloned()
        {
            parameter["schema"]["type"] = name;
        }
        if is_text(parameter) && parameter["schema"]["enum"].is_null() {
            parameter["schema"]["pattern"] = json!(NO_NUL);
        }
    }
    let traits = Traits::of(path, method, operation);
    operation.insert("security".to_owned(), if traits.public { json!([]) } else { json!([{"key": []}]) });
    if traits.creates
        && let Some(parameters) = operation.entry("parameters").or_insert_with(|| json!([])).as_array_mut()
    {
        parameters.push(json!({"$ref": "#/components/parameters/Idempotency-Key"}));
    }
    let Some(responses) = operation.get_mut("responses").and_then(Value::as_object_mut) else { return };
    for (status, _, description) in traits.refusals().into_iter().filter(|(_, applies, _)| *applies) {
        responses.entry(status).or_insert_with(|| json!({ "description": description }));
    }
    for (status, response) in responses.iter_mut() {
        let header = |name: &&str| ((*name).to_owned(), json!({"$ref": format!("#/components/headers/{name}")}));
        let headers: Map<String, Value> = traits.headers(status).iter().map(header).collect();
        if !status.starts_with('2') && response["content"].is_null() {
            response["content"] =
                json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{}", ErrorBody::name())}}});
        }
        response["headers"] = Value::Object(headers);
    }
    responses.sort_keys();
}

/// What a POST to a collection creates is what the paths below its item's are about: its answer links to them.
fn link(document: &mut Value) {
    let operations: Vec<(String, String)> = document["paths"]
        .as_object()
        .into_iter()
        .flatten()
        .flat_map(|(path, item)| item.as_object().into_iter().flat_map(Map::values).map(move |operation| (path, operation)))
        .filter_map(|(path, operation)| Some((path.clone(), operation["operationId"].as_str()?.to_owned())))
        .collect();
    let schemas = document["components"]["schemas"].clone();
    for (collection, item) in document["paths"].as_object_mut().into_iter().flatten() {
        let outer = parameters_of(collection).map(|name| (name.to_owned(), json!(format!("$request.path.{name}"))));
        let outer: Map<String, Value> = outer.collect();
        let links = operations.iter().filter_map(|(path, id)| {
            let (name, rest) = path.strip_prefix(collection.as_str())?.strip_prefix("/{")?.split_once('}')?;
            let mut parameters = outer.clone();
            parameters.insert(name.to_owned(), json!("$response.body#/id"));
            (!rest.contains('{')).then(|| (id.clone(), json!({"operationId": id, "parameters": parameters})))
        });
        let links: Map<String, Value> = links.collect();
        let responses = item.pointer_mut("/post/responses").and_then(Value::as_object_mut);
        for (status, response) in responses.into_iter().flatten() {
            let schema = &response["content"]["application/json"]["schema"];
            let named = schema["$ref"].as_str().and_then(|named| schemas.get(named.rsplit('/').next()?)).unwrap_or(schema);
            if status.starts_with('2') && named["properties"]["id"].is_object() && !links.is_empty() {
                response["links"] = Value::Object(links.clone());
            }
        }
    }
}

/// The names in a path's braces.
fn parameters_of(path: &str) -> impl Iterator<Item = &str> {
    path.split('{').skip(1).filter_map(|rest| rest.split('}').next())
}

/// A list refers to its items' schema, where utoipa repeats it without its name, and shows one of them.
fn complete_lists(schemas: &mut Map<String, Value>) {
    let items: Vec<(String, String)> = schemas
        .keys()
        .filter_map(|list| Some((list.clone(), list.strip_prefix("List_")?.to_owned())))
        .filter(|(_, item)| schemas.contains_key(item))
        .collect();
    for (list, item) in items {
        schemas[&list]["properties"]["data"]["items"] = json!({"$ref": format!("#/components/schemas/{item}")});
        let example = schemas[&item]["example"].clone();
        if !example.is_null() {
            schemas[&list]["example"] = json!({"object": "list", "data": [example], "has_more": false, "first_id": example["id"], "last_id": example["id"]});
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    /// What generators of clients and linters ask for beyond a valid document.
    #[test]
    fn responses_are_described_and_lists_name_their_items() {
        let document = super::document();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (status, response) in item.as_object().unwrap().values().flat_map(|one| one["responses"].as_object().unwrap()) {
                assert!(response["description"].as_str().is_some_and(|text| !text.is_empty()), "{status} of {path}");
            }
        }
        for (name, list) in document["components"]["schemas"].as_object().unwrap() {
            let items = &list["properties"]["data"]["items"];
            assert!(!name.starts_with("List_") || items["$ref"].is_string(), "{name}: {items}");
        }
        assert!(null_properties(&document).is_empty(), "{:?}", null_properties(&document));
    }

    #[test]
    fn what_is_created_links_to_what_can_be_done_with_it() {
        let document = super::document();
        let links = |path: &str, status: &str| document["paths"][path]["post"]["responses"][status]["links"].clone();
        let deletion = &links("/v1/projects/{project_id}/keys", "200")["delete_key"];
        assert_eq!(deletion["parameters"]["project_id"], "$request.path.project_id");
        assert_eq!(deletion["parameters"]["key_id"], "$response.body#/id");
        assert!(links("/v1/projects", "200")["delete_key"].is_null(), "a project's id is none of a key");
        assert_eq!(links("/v1/training/jobs", "201")["pause_training_job"]["parameters"]["job_id"], "$response.body#/id");
        assert!(links("/v1/completions", "200").is_null());
    }

    /// Where a property's only type is null: openapi-generator stops there.
    fn null_properties(value: &Value) -> Vec<&Value> {
        let own = value["properties"].as_object().into_iter().flatten();
        let own = own.map(|(_, property)| property).filter(|property| property["type"] == "null");
        let inner = value.as_object().into_iter().flat_map(serde_json::Map::values).chain(value.as_array().into_iter().flatten());
        own.chain(inner.flat_map(null_properties)).collect()
    }

    #[test]
    fn the_committed_document_is_fresh() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../openapi/openapi.json");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == super::text(),
            "openapi/openapi.json is stale; write it anew with `lathe openapi > openapi/openapi.json`"
        );
    }
}
