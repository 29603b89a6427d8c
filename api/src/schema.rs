//! Checks a body against the very schema that the OpenAPI document shows, then reads it.
//!
//! Bounds, enums, unknown fields and the shapes of tagged unions are stated once, in the
//! `#[schema(…)]` attributes of a request's type. [`Schema::check`] refuses exactly what that schema refuses,
//! with the full path of the offending field, which serde loses inside a tagged union. What a schema
//! cannot express (fields that contradict one another) is its caller's to check.
//!
//! A union is an untagged enum over structs that hold their own tag, since only a struct's schema
//! says that no other field is known.
//!
//! Only these keywords are known: those that utoipa writes (`type`, `enum`, `properties`, `required`,
//! `additionalProperties`, `propertyNames`, `items`, `oneOf`, `allOf`, `$ref` and the bounds on
//! numbers, strings, arrays and objects), `const`, and the `not` of [`never`].

use std::{
    any::TypeId,
    cmp::Ordering,
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use utoipa::{
    ToSchema,
    openapi::{RefOr, schema},
};

/// What is wrong with a body, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// `hyperparameters.optimizer.betas[1]`; empty for the body itself.
    pub param: String,
    pub message: String,
}

impl Violation {
    fn new(param: &str, message: impl Into<String>) -> Violation {
        Violation { param: param.to_owned(), message: message.into() }
    }
}

/// A struct's schema, for those values only that do not fit `combination`: `properties` that have no meaning
/// together, of which the last in `required` is the one to leave out.
///
/// It becomes the schema's `not`. A union of two structs would say the same, but generators of clients make one type
/// of this and two or none of that.
pub fn never(schema: RefOr<schema::Schema>, combination: Value) -> RefOr<schema::Schema> {
    match schema {
        RefOr::T(schema::Schema::Object(mut object)) => {
            object.extensions.get_or_insert_default().insert("not".to_owned(), combination);
            object.into()
        }
        other => other,
    }
}

/// A type's schema with those it refers to.
pub struct Schema {
    root: Value,
    named: Map<String, Value>,
}

/// Made once for each type: a schema is large and a request small.
static KNOWN: LazyLock<Mutex<HashMap<TypeId, Arc<Schema>>>> = LazyLock::new(Mutex::default);

impl Schema {
    pub fn of<T: ToSchema + 'static>() -> Arc<Schema> {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(TypeId::of::<T>()).or_insert_with(|| Arc::new(Schema::make::<T>())).clone()
    }

    fn make<T: ToSchema>() -> Schema {
        let mut referred = Vec::new();
        T::schemas(&mut referred);
        let json = |schema| serde_json::to_value(schema).unwrap_or(Value::Bool(true));
        Schema { root: json(&T::schema()), named: referred.iter().map(|(name, schema)| (name.clone(), json(schema))).collect() }
    }

    /// A schema that refers to no other.
    pub fn alone(root: Value) -> Schema {
        Schema { root, named: Map::new() }
    }

    pub fn check(&self, body: &Value) -> Result<(), Violation> {
        self.check_at(&self.root, body, "")
    }

    /// A body that this schema accepts, as the type that the schema is of.
    pub fn read<T: DeserializeOwned>(&self, mut body: Value) -> Result<T, Violation> {
        self.make_integers(&self.root, &mut body);
        serde_path_to_error::deserialize(body).map_err(|error| {
            let path = error.path().to_string();
            Violation::new(if path == "." { "" } else { &path }, error.inner().to_string())
        })
    }

    /// Where the schema asks for an integer, `12.0` is one; serde wants it as `12`.
    fn make_integers(&self, schema: &Value, value: &mut Value) {
        let schema = self.resolve(schema);
        for part in list(&schema["allOf"]) {
            self.make_integers(part, value);
        }
        if let Some(branch) = list(&schema["oneOf"]).find(|branch| self.check_at(branch, value, "").is_ok()) {
            self.make_integers(branch, value);
        }
        match value {
            Value::Number(number) if number.is_f64() && types(schema).any(|name| name == "integer") => {
                if let Some(integer) = integer(number) {
                    *value = i64::try_from(integer)
                        .map(Value::from)
                        .or_else(|_| u64::try_from(integer).map(Value::from))
                        .unwrap_or_default();
                }
            }
            Value::Array(items) if schema["items"].is_object() => {
                items.iter_mut().for_each(|item| self.make_integers(&schema["items"], item));
            }
            Value::Object(fields) => {
                for (name, field) in fields {
                    self.make_integers(schema["properties"].get(name).unwrap_or(&schema["additionalProperties"]), field);
                }
            }
            _ => {}
        }
    }

    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let name = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next());
        name.and_then(|name| self.named.get(name)).unwrap_or(schema)
    }

    fn check_at(&self, schema: &Value, value: &Value, at: &str) -> Result<(), Violation> {
        let schema = self.resolve(schema);
        for part in list(&schema["allOf"]) {
            self.check_at(part, value, at)?;
        }
        if let Some(branches) = schema["oneOf"].as_array() {
            self.check_branches(branches, value, at)?;
        }
        check_type(schema, value, at)?;
        check_enum(schema, value, at)?;
        check_const(schema, value, at)?;
        self.check_not(&schema["not"], value, at)?;
        match value {
            Value::Number(number) => check_number(schema, number, at),
            Value::String(text) => check_count(schema, text.chars().count(), ["minLength", "maxLength"], "characters", at),
            Value::Array(items) => self.check_array(schema, items, at),
            Value::Object(fields) => self.check_object(schema, fields, at),
            Value::Null | Value::Bool(_) => Ok(()),
        }
    }

    fn check_not(&self, not: &Value, value: &Value, at: &str) -> Result<(), Violation> {
        let excess = not["required"].as_array().and_then(|required| required.last()?.as_str());
        match excess {
            Some(name) if self.check_at(not, value, at).is_ok() => {
                let path = join(at, name);
                Err(Violation::new(&path, format!("`{path}` has no meaning beside the other fields: leave it out.")))
            }
            _ => Ok(()),
        }
    }

    fn check_array(&self, schema: &Value, items: &[Value], at: &str) -> Result<(), Violation> {
        check_count(schema, items.len(), ["minItems", "maxItems"], "items", at)?;
        if schema["items"].is_object() {
            for (index, item) in items.iter().enumerate() {
                self.check_at(&schema["items"], item, &format!("{at}[{index}]"))?;
            }
        }
        Ok(())
    }

    fn check_object(&self, schema: &Value, fields: &Map<String, Value>, at: &str) -> Result<(), Violation> {
        check_count(schema, fields.len(), ["minProperties", "maxProperties"], "fields", at)?;
        let (known, others) = (&schema["properties"], &schema["additionalProperties"]);
        for (name, field) in fields {
            let path = join(at, name);
            if schema["propertyNames"].is_object() {
                self.check_at(&schema["propertyNames"], &Value::String(name.clone()), &path)?;
            }
            match known.get(name) {
                Some(field_schema) => self.check_at(field_schema, field, &path)?,
                None if others == &Value::Bool(false) => {
                    return Err(unknown_field(&path, known.as_object().into_iter().flat_map(Map::keys).map(String::as_str)));
                }
                None if others.is_object() => self.check_at(others, field, &path)?,
                None => {}
            }
        }
        match list(&schema["required"]).filter_map(Value::as_str).find(|name| !fields.contains_key(*name)) {
            Some(name) => Err(Violation::new(&join(at, name), format!("`{}` is required.", join(at, name)))),
            None => Ok(()),
        }
    }

    /// Of a union's branches, the one that the value's tags choose says what is wrong.
    fn check_branches(&self, branches: &[Value], value: &Value, at: &str) -> Result<(), Violation> {
        let mut refusals = Vec::new();
        for branch in branches {
            match self.check_at(branch, value, at) {
                Ok(()) => return Ok(()),
                Err(violation) => refusals.push((self.likeness(branch, value), violation)),
            }
        }
        let branches: Vec<&Value> = branches.iter().map(|branch| self.resolve(branch)).collect();
        if let Some(violation) = wrong_type(&branches, value, at)
            .or_else(|| self.wrong_tag(&branches, value, at))
            .or_else(|| self.unknown_to_all(&branches, value, at))
        {
            return Err(violation);
        }
        // The first of the most alike, so that the order in the type settles ties.
        let best = refusals.into_iter().rev().max_by_key(|(likeness, _)| *likeness);
        Err(best.map_or_else(|| Violation::new(at, "No form of this field fits."), |(_, violation)| violation))
    }

    /// Where every branch has its own values of a tag and none takes this one: the values that there are.
    fn wrong_tag(&self, branches: &[&Value], value: &Value, at: &str) -> Option<Violation> {
        value.as_object()?.iter().find_map(|(name, field)| {
            let schemas: Vec<&Value> = branches.iter().map(|branch| self.property(branch, name)).collect::<Option<_>>()?;
            let is_tag = schemas.iter().any(|schema| *schema != schemas[0]);
            if !is_tag {
                return None;
            }
            let path = join(at, name);
            if schemas.iter().all(|schema| schema["enum"].is_array()) {
                let values: Vec<&Value> = schemas.iter().flat_map(|schema| list(&schema["enum"])).collect();
                return (!values.contains(&field)).then(|| not_one_of(&values, &path));
            }
            self.wrong_tag(&schemas, field, &path)
        })
    }

    /// Where no branch knows any field of the value: the fields that there are.
    fn unknown_to_all(&self, branches: &[&Value], value: &Value, at: &str) -> Option<Violation> {
        let fields = value.as_object()?;
        let known = |name: &String| branches.iter().any(|branch| self.property(branch, name).is_some());
        let closed = branches.iter().all(|branch| branch["additionalProperties"] == false);
        let name = fields.keys().next().filter(|_| closed && !fields.keys().any(known))?;
        let names = branches.iter().filter_map(|branch| branch["properties"].as_object()).flat_map(Map::keys);
        let names: std::collections::BTreeSet<&str> = names.map(String::as_str).collect();
        Some(unknown_field(&join(at, name), names))
    }

    /// The schema of a field of a branch, whose parts may be schemas of their own.
    fn property<'a>(&'a self, branch: &'a Value, name: &str) -> Option<&'a Value> {
        let parts = std::iter::once(branch).chain(list(&branch["allOf"]).map(|part| self.resolve(part)));
        parts.filter_map(|part| part["properties"].get(name)).map(|schema| self.resolve(schema)).next()
    }

    /// How much a value looks meant for a branch: its type, then tags that agree (two levels deep,
    /// as in `method.type`), then fields that the branch knows.
    fn likeness(&self, branch: &Value, value: &Value) -> i64 {
        let branch = self.resolve(branch);
        if check_type(branch, value, "").is_err() {
            return -1000;
        }
        let fields = match value {
            Value::Object(fields) => fields,
            Value::Array(items) => {
                let alike = items.first().is_none_or(|first| self.likeness(&branch["items"], first) > -1000);
                return if alike { 0 } else { -500 };
            }
            _ => return if branch["type"] == "null" { -1000 } else { 0 },
        };
        let mut likeness = 0;
        for (name, field) in fields {
            let Some(schema) = self.property(branch, name) else {
                likeness -= 1;
                continue;
            };
            likeness += 1;
            if schema["enum"].is_array() {
                likeness += if check_enum(schema, field, "").is_ok() { 100 } else { 0 };
            } else if let Some(tag) = field.get("type") {
                let tag_schema = self.resolve(&schema["properties"]["type"]);
                likeness += if tag_schema["enum"].is_array() && check_enum(tag_schema, tag, "").is_ok() { 100 } else { 0 };
            }
        }
        likeness
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The path of a field.
pub fn join(at: &str, name: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
}

/// The body or the field, as the start of a sentence.
fn subject(at: &str) -> String {
    if at.is_empty() { "The body".to_owned() } else { format!("`{at}`") }
}

/// The names in `type`.
fn types(schema: &Value) -> impl Iterator<Item = &str> {
    schema["type"].as_str().into_iter().chain(list(&schema["type"]).filter_map(Value::as_str))
}

/// The integer that a number is, however it is written, if it is one of at most 64 bits. An integer of more bits has been
/// read as the nearest float, which for some just below the least of 64 bits is that one: as a float it is refused.
fn integer(number: &serde_json::Number) -> Option<i128> {
    let exact = |value: &f64| value.fract() == 0.0 && *value > i64::MIN as f64;
    let integer = number.as_i128().or_else(|| number.as_f64().filter(exact).map(|value| value as i128))?;
    (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(&integer).then_some(integer)
}

fn unknown_field<'a>(path: &str, known: impl IntoIterator<Item = &'a str>) -> Violation {
    let known = known.into_iter().collect::<Vec<_>>().join(", ");
    Violation::new(path, format!("There is no field `{path}` here; known are: {known}."))
}

fn check_type(schema: &Value, value: &Value, at: &str) -> Result<(), Violation> {
    check_types(&types(schema).collect::<Vec<_>>(), value, at)
}

/// Where no branch takes a value of this type: the types that they take.
fn wrong_type(branches: &[&Value], value: &Value, at: &str) -> Option<Violation> {
    if branches.iter().any(|branch| check_type(branch, value, at).is_ok()) {
        return None;
    }
    let mut names: Vec<&str> = Vec::new();
    for name in branches.iter().flat_map(|branch| types(branch)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    check_types(&names, value, at).err()
}

fn check_types(types: &[&str], value: &Value, at: &str) -> Result<(), Violation> {
    let fits = |name: &&str| match *name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => matches!(value, Value::Number(number) if integer(number).is_some()),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => true,
    };
    if types.is_empty() || types.iter().any(fits) {
        return Ok(());
    }
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    Err(Violation::new(at, format!("{} must be of type {}, not {found}.", subject(at), types.join(" or "))))
}

fn check_enum(schema: &Value, value: &Value, at: &str) -> Result<(), Violation> {
    match schema["enum"].as_array() {
        Some(values) if !values.contains(value) => Err(not_one_of(&values.iter().collect::<Vec<_>>(), at)),
        _ => Ok(()),
    }
}

fn check_const(schema: &Value, value: &Value, at: &str) -> Result<(), Violation> {
    match schema.get("const") {
        Some(constant) if constant != value => Err(Violation::new(at, format!("{} must be {constant}.", subject(at)))),
        _ => Ok(()),
    }
}

fn not_one_of(values: &[&Value], at: &str) -> Violation {
    let values = values.iter().map(|value| value.to_string()).collect::<Vec<_>>().join(", ");
    Violation::new(at, format!("{} must be one of {values}.", subject(at)))
}

fn check_number(schema: &Value, number: &serde_json::Number, at: &str) -> Result<(), Violation> {
    let broken = |keyword: &str, allowed: fn(Ordering) -> bool| match &schema[keyword] {
        Value::Number(bound) => !allowed(compare(number, bound)),
        _ => false,
    };
    if !broken("minimum", Ordering::is_ge)
        && !broken("exclusiveMinimum", Ordering::is_gt)
        && !broken("maximum", Ordering::is_le)
        && !broken("exclusiveMaximum", Ordering::is_lt)
    {
        return Ok(());
    }
    let limits = [("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below")];
    let limits = limits.iter().filter(|(keyword, _)| schema[keyword].is_number());
    let limits = limits.map(|(keyword, words)| format!("{words} {}", schema[keyword])).collect::<Vec<_>>();
    Err(Violation::new(at, format!("{} must be {}, not {number}.", subject(at), limits.join(" and "))))
}

/// Exact among integers, which are beyond what a float holds where they are large.
fn compare(number: &serde_json::Number, bound: &serde_json::Number) -> Ordering {
    match (integer(number), integer(bound)) {
        (Some(number), Some(bound)) => number.cmp(&bound),
        _ => number.as_f64().zip(bound.as_f64()).map_or(Ordering::Equal, |(number, bound)| number.total_cmp(&bound)),
    }
}

fn check_count(schema: &Value, count: usize, [min, max]: [&str; 2], unit: &str, at: &str) -> Result<(), Violation> {
    let (min, max) = (schema[min].as_u64(), schema[max].as_u64());
    let count = count as u64;
    if min.is_some_and(|min| count < min) || max.is_some_and(|max| count > max) {
        let limits = match (min, max) {
            (Some(min), Some(max)) if min == max => format!("exactly {min}"),
            (Some(min), Some(max)) => format!("at least {min} and at most {max}"),
            (Some(min), None) => format!("at least {min}"),
            (None, max) => format!("at most {}", max.unwrap_or_default()),
        };
        return Err(Violation::new(at, format!("{} must have {limits} {unit}, not {count}.", subject(at))));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
