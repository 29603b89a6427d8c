//! The OpenAPI 3.1 document: what the router states, with what is common to all operations.
//!
//! The router is the source; nothing here names a route. Each operation gains the bearer scheme
//! (unless it is one of the public ones, which say so themselves) and the refusals that any
//! operation can give, so that routes state only what is particular to them.

use serde_json::{Map, Value, json};
use utoipa::{PartialSchema, ToSchema, openapi::OpenApi};

use crate::{problem::ErrorBody, routes};

/// The tag of operations that need no key.
pub const PUBLIC_TAG: &str = "health";

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
    if let Some(paths) = document["paths"].as_object_mut() {
        let operations = paths.values_mut().filter_map(Value::as_object_mut).flat_map(|item| item.values_mut());
        operations.filter_map(Value::as_object_mut).filter(|operation| operation.contains_key("operationId")).for_each(complete);
    }
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
        ("operating", "Runners and metrics."),
        (PUBLIC_TAG, "Whether the server lives and is ready."),
    ];
    tags.iter().map(|(name, description)| json!({"name": name, "description": description})).collect()
}

fn complete(operation: &mut Map<String, Value>) {
    let public = operation.get("tags").and_then(Value::as_array).is_some_and(|tags| tags.iter().any(|tag| tag == PUBLIC_TAG));
    let has_body = operation.contains_key("requestBody");
    let has_id =
        operation.get("parameters").and_then(Value::as_array).is_some_and(|all| all.iter().any(|one| one["in"] == "path"));
    operation.insert("security".to_owned(), if public { json!([]) } else { json!([{"key": []}]) });
    let Some(responses) = operation.get_mut("responses").and_then(Value::as_object_mut) else { return };
    let mut refusals = vec![("500", "Something failed inside; the log has it under the answer's x-request-id.")];
    if !public {
        refusals.push(("400", "Malformed or out of bounds; `param` says where."));
        refusals.push(("401", "No valid API key."));
        refusals.push(("503", "The database is away or there is no capacity; try again after `Retry-After` seconds."));
    }
    if has_body {
        refusals.push(("408", "The body stopped arriving."));
        refusals.push(("413", "The body is over the limit."));
        refusals.push(("415", "The body is of another content type."));
    }
    if has_id {
        refusals.push(("404", "Unknown, or another project's."));
    }
    for (status, description) in refusals {
        let content = json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{}", ErrorBody::name())}}});
        responses.entry(status).or_insert_with(|| json!({"description": description, "content": content}));
    }
    responses.sort_keys();
}

#[cfg(test)]
mod tests {
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
