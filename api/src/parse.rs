//! Requests become values of their types here, once, or are refused with the full path of what is
//! wrong.
//!
//! [`Body<T>`] reads strict JSON: no duplicate keys, bounded depth and size. The
//! value is then held against `T`'s own schema (see [`crate::schema`]), which is the one that the
//! OpenAPI document shows. So bounds, enums and the shapes of tagged unions are stated once, in
//! `#[schema(minimum = 1, maximum = 100)]` attributes, and a violation inside a tagged union keeps
//! its path, which serde alone would lose. Give a request's type
//! `#[derive(Deserialize, ToSchema)] #[serde(deny_unknown_fields)]` and nothing else is needed.
//! Fields that contradict one another are the handler's to refuse, with
//! [`ApiError::unprocessable`].
//!
//! [`Query<T>`] does the same for the query string, after its parameters have been read as the
//! types that `T`'s parameters state; [`Path<T>`] is axum's with the API's refusals. None of them
//! ever answers in another shape than [`crate::problem::ErrorBody`].

use std::fmt;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Request},
    http::{HeaderMap, Uri, header, request::Parts},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use percent_encoding::percent_decode_str;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_path_to_error::Segment;
use utoipa::{IntoParams, ToSchema};

use crate::{
    problem::ApiError,
    schema::{self, Schema, Violation},
    state::AppState,
};

/// Arrays and objects inside one another.
const DEPTH_LIMIT: usize = 64;

/// axum's `Path`, with refusals in the API's shape.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(ApiError))]
pub struct Path<T>(pub T);

/// A JSON body that `T`'s schema accepts.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned + ToSchema + 'static> FromRequest<AppState> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        require_json(&parts.headers)?;
        let bytes = read_body(&parts.headers, body, state.config.json_limit).await?;
        Ok(Body(typed(json(&bytes)?)?))
    }
}

/// Like [`Body`], for a route whose body may be absent: an empty one reads as `{}`.
pub struct OptionalBody<T>(pub T);

impl<T: DeserializeOwned + ToSchema + 'static> FromRequest<AppState> for OptionalBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let is_json = require_json(&parts.headers);
        let bytes = read_body(&parts.headers, body, state.config.json_limit).await?;
        if bytes.is_empty() {
            return Ok(OptionalBody(typed(Value::Object(Map::new()))?));
        }
        is_json?;
        Ok(OptionalBody(typed(json(&bytes)?)?))
    }
}

/// For a route that takes no body: there is none, or the `{}` of clients that always send one.
pub struct NoBody;

impl FromRequest<AppState> for NoBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = read_body(&parts.headers, body, state.config.json_limit).await?;
        if bytes.is_empty() {
            return Ok(NoBody);
        }
        match json(&bytes)? {
            Value::Object(fields) if fields.is_empty() => Ok(NoBody),
            Value::Object(fields) => {
                let field = fields.keys().next().map_or("", String::as_str);
                Err(ApiError::bad_request(field, format!("There is no field `{field}` here: this takes no body.")))
            }
            _ => Err(ApiError::bad_request("", "This takes no body.")),
        }
    }
}

/// The query string as a `T` (`#[derive(Deserialize, IntoParams)]` with
/// `#[serde(deny_unknown_fields)] #[into_params(parameter_in = Query)]`).
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + IntoParams> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let pairs = query_pairs(&parts.uri)?;
        let parameters = T::into_params(|| Some(utoipa::openapi::path::ParameterIn::Query));
        let mut properties = Map::new();
        for parameter in parameters {
            let schema = serde_json::to_value(&parameter.schema).map_err(ApiError::internal)?;
            properties.insert(parameter.name, schema);
        }
        let mut values = Map::new();
        for (name, text) in pairs {
            let Some(schema) = properties.get(&name) else {
                return Err(unknown_parameter(&name));
            };
            if text.contains('\0') {
                return Err(ApiError::bad_request(&name, "Text may not hold the character U+0000."));
            }
            let value = parameter(schema, text);
            match (has_type(schema, "array"), values.get_mut(&name)) {
                (true, Some(Value::Array(items))) => items.push(value),
                (true, _) => drop(values.insert(name, Value::Array(vec![value]))),
                (false, None) => drop(values.insert(name, value)),
                (false, Some(_)) => return Err(ApiError::bad_request(&name, format!("`{name}` is given twice."))),
            }
        }
        let shape = serde_json::json!({"type": "object", "additionalProperties": false, "properties": properties});
        let (schema, values) = (Schema::alone(shape), Value::Object(values));
        schema.check(&values)?;
        Ok(Query(schema.read(values)?))
    }
}

/// The query's parameters in their order.
fn query_pairs(uri: &Uri) -> Result<Vec<(String, String)>, ApiError> {
    // What is no UTF-8 would be read as U+FFFD otherwise.
    if percent_decode_str(uri.query().unwrap_or_default()).decode_utf8().is_err() {
        return Err(ApiError::bad_request("", "The query is not UTF-8."));
    }
    let axum::extract::Query(pairs) = axum::extract::Query::try_from_uri(uri)?;
    Ok(pairs)
}

fn unknown_parameter(name: &str) -> ApiError {
    ApiError::bad_request(name, format!("There is no query parameter `{name}` here."))
}

/// 400 for any parameter, on a route that has none.
pub fn refuse_query(uri: &Uri) -> Result<(), ApiError> {
    query_pairs(uri)?.first().map_or(Ok(()), |(name, _)| Err(unknown_parameter(name)))
}

/// A value as a `T`: 400 where `T`'s schema refuses it, 422 for the character that no column of the
/// database holds, which a schema has no word for.
pub fn typed<T: DeserializeOwned + ToSchema + 'static>(value: Value) -> Result<T, ApiError> {
    let schema = Schema::of::<T>();
    schema.check(&value)?;
    if let Some(param) = find_nul(&value, String::new()) {
        return Err(ApiError::unprocessable("nul_character", param, "Text may not hold the character U+0000."));
    }
    Ok(schema.read(value)?)
}

/// Where a text or a name holds U+0000.
pub fn find_nul(value: &Value, at: String) -> Option<String> {
    match value {
        Value::String(text) => text.contains('\0').then_some(at),
        Value::Array(items) => items.iter().enumerate().find_map(|(index, item)| find_nul(item, format!("{at}[{index}]"))),
        Value::Object(fields) => fields.iter().find_map(|(name, field)| {
            let path = schema::join(&at, name);
            if name.contains('\0') { Some(path) } else { find_nul(field, path) }
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

impl From<Violation> for ApiError {
    fn from(violation: Violation) -> ApiError {
        ApiError::bad_request(violation.param, violation.message)
    }
}

fn has_type(schema: &Value, name: &str) -> bool {
    schema["type"] == name || schema["type"].as_array().is_some_and(|types| types.iter().any(|one| one == name))
}

/// A parameter's text as the JSON value that its schema asks for; text that does not fit stays text
/// and is refused by the schema.
fn parameter(schema: &Value, text: String) -> Value {
    let schema = if has_type(schema, "array") { &schema["items"] } else { schema };
    let is_number = has_type(schema, "integer") || has_type(schema, "number");
    let wanted = |value: &Value| is_number && value.is_number() || has_type(schema, "boolean") && value.is_boolean();
    // JSON may have spaces around it, a parameter may not.
    let parsed = serde_json::from_str(&text).ok().filter(|value| wanted(value) && text.trim() == text);
    parsed.unwrap_or(Value::String(text))
}

fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    let found = if kind.is_empty() { "none was given".to_owned() } else { format!("`{kind}` was given") };
    Err(ApiError::unsupported_media_type(format!("The body must be JSON under `Content-Type: application/json`, and {found}.")))
}

/// The bytes of a body that its head announces.
pub fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The whole body, at most `limit` bytes of it. One that announces more is not read at all.
pub async fn read_body(headers: &HeaderMap, body: axum::body::Body, limit: usize) -> Result<Bytes, ApiError> {
    if announced(headers).is_some_and(|bytes| bytes > limit as u64) {
        return Err(ApiError::too_large("The body", limit as u64));
    }
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::too_large("The body", limit as u64)),
        Err(error) => Err(broken_body(error.as_ref())),
    }
}

/// The refusal of a body that ended before its end: it stopped arriving, or the client is gone.
pub fn broken_body(error: &(dyn std::error::Error + 'static)) -> ApiError {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<tower_http::timeout::TimeoutError>() {
            return ApiError::request_timeout();
        }
        cause = error.source();
    }
    ApiError::bad_request("", "The body broke off before its end.")
}

/// A body as strict JSON.
pub fn json(bytes: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        ApiError::bad_request("", format!("The body is not UTF-8: byte {} does not belong there.", error.valid_up_to()))
    })?;
    json_text("The body", text)
}

/// Strict JSON. `what` begins the sentence of a refusal, whose `param` is a path within the value.
pub fn json_text(what: &str, text: &str) -> Result<Value, ApiError> {
    if text.is_empty() {
        return Err(ApiError::bad_request("", format!("{what} is empty; it must be a JSON object.")));
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let mut track = serde_path_to_error::Track::new();
    let parsed = StrictValue { depth: 0 }.deserialize(serde_path_to_error::Deserializer::new(&mut reader, &mut track));
    let value = parsed.and_then(|value| reader.end().map(|()| value));
    value.map_err(|error| {
        let path = place(&track.path());
        let message = match error.classify() {
            serde_json::error::Category::Data => {
                let message = error.to_string();
                format!("{}.", message.rsplit_once(" at line").map_or(message.as_str(), |(sentence, _)| sentence))
            }
            _ => format!("{what} is not valid JSON: {error}."),
        };
        ApiError::bad_request(path, message)
    })
}

/// The path of a field, as far as it is known: text that breaks off may have no name yet.
fn place(path: &serde_path_to_error::Path) -> String {
    let known = path.iter().map_while(|segment| match segment {
        Segment::Seq { index } => Some(format!("[{index}]")),
        Segment::Map { key } => Some(key.clone()),
        Segment::Enum { .. } | Segment::Unknown => None,
    });
    known.reduce(|at, next| if next.starts_with('[') { at + &next } else { schema::join(&at, &next) }).unwrap_or_default()
}

/// Builds a [`Value`] and refuses what [`Value`]'s own reader lets through.
#[derive(Clone, Copy)]
struct StrictValue {
    depth: usize,
}

impl StrictValue {
    fn inner<E: serde::de::Error>(self) -> Result<StrictValue, E> {
        if self.depth == DEPTH_LIMIT {
            return Err(E::custom(format!("Arrays and objects may lie at most {DEPTH_LIMIT} deep in one another")));
        }
        Ok(StrictValue { depth: self.depth + 1 })
    }
}

/// The value of a name that was there before.
struct GivenTwice<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for GivenTwice<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, _: D) -> Result<(), D::Error> {
        Err(D::Error::custom(format!("The field `{}` is given twice", self.0)))
    }
}

impl<'de> DeserializeSeed<'de> for StrictValue {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for StrictValue {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("This number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut object = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            if object.contains_key(&name) {
                // Refused as a value, so that the path ends in its name.
                fields.next_value_seed(GivenTwice(&name))?;
            }
            let value = fields.next_value_seed(inner)?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> (Option<String>, String) {
        let error = json(text.as_bytes()).unwrap_err().body.error.clone();
        (error.param, error.message)
    }

    #[test]
    fn nul_characters_are_found_wherever_they_stand() {
        let found = |text: &str| find_nul(&json(text.as_bytes()).unwrap(), String::new());
        assert_eq!(found(r#"{"a": {"b": ["x", "\u0000"]}}"#).as_deref(), Some("a.b[1]"));
        assert_eq!(found(r#"{"a": {"b\u0000": 1}}"#).as_deref(), Some("a.b\0"));
        assert_eq!(found(r#"{"a": [1, true, null, "x"]}"#), None);
    }

    #[test]
    fn parameters_are_what_their_schemas_ask_for() {
        let integer = serde_json::json!({"type": ["integer", "null"]});
        assert_eq!(parameter(&integer, "12".to_owned()), 12);
        for text in [" 5", "5 ", "+5", "0x5", "true", "null", ""] {
            assert_eq!(parameter(&integer, text.to_owned()), text, "it stays a text");
        }
        assert_eq!(parameter(&serde_json::json!({"type": "boolean"}), "true".to_owned()), true);
        assert_eq!(parameter(&serde_json::json!({"type": "string"}), "12".to_owned()), "12");
        let list = serde_json::json!({"type": "array", "items": {"type": "integer"}});
        assert_eq!(parameter(&list, "12".to_owned()), 12);
    }

    #[test]
    fn a_query_is_utf_8() {
        let pairs = |text: &str| query_pairs(&text.parse().unwrap());
        assert_eq!(pairs("/?a=%C3%A9&b").unwrap(), [("a".to_owned(), "é".to_owned()), ("b".to_owned(), String::new())]);
        assert_eq!(pairs("/?a=%FF").unwrap_err().status, 400);
        assert!(refuse_query(&"/?&".parse().unwrap()).is_ok());
        assert_eq!(refuse_query(&"/?a=1".parse().unwrap()).unwrap_err().body.error.param.as_deref(), Some("a"));
    }

    #[test]
    fn strict_json() {
        assert_eq!(
            json(br#"{"a": [1, -2, 0.5, "x", null, true]}"#).unwrap(),
            serde_json::json!({"a": [1, -2, 0.5, "x", null, true]})
        );
        let twice = refusal(r#"{"a": {"b": [{"c": 1, "c": 2}]}}"#);
        assert_eq!(twice, (Some("a.b[0].c".to_owned()), "The field `c` is given twice.".to_owned()));
        assert_eq!(refusal(r#"{"a": 1, "a": 1}"#).0.as_deref(), Some("a"));
        assert_eq!(refusal(r#"{"a": [0, 1e400]}"#).0.as_deref(), Some("a[1]"));
        assert_eq!(refusal(r#"{"a": {"b": "#).0.as_deref(), Some("a.b"));
        assert_eq!(refusal(r#"{"a": {"#).0.as_deref(), Some("a"));
        assert!(refusal(&("[".repeat(65) + &"]".repeat(65))).1.contains("deep"));
        assert!(refusal(&"[".repeat(1_000_000)).1.contains("deep"));
        for malformed in ["", "{", "{} x", "{'a': 1}", "[1e999]", "\"\\ud800\"", "nul", "\u{feff}{}"] {
            assert_eq!(json(malformed.as_bytes()).unwrap_err().status, 400, "{malformed}");
        }
        assert!(json(&[b'"', 0xff, b'"']).unwrap_err().body.error.message.contains("UTF-8"));
    }
}
