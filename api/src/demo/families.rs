//! The families of tasks that the demo teaches, and the datasets made of them.
//!
//! `families.json` holds each family as a template of the API's datasets; a variable
//! `{"pool": name}` draws from a list shared by several families. A family's `key` says what makes
//! two rows the same task whatever the wording: by it the training rows exclude the held-out ones.

use serde::Deserialize;
use serde_json::{Map, Value, json};

const FAMILIES: &str = include_str!("families.json");

/// One family, ready to be sent.
#[derive(Clone, Debug)]
pub struct Family {
    pub name: String,
    /// A template of `POST /v1/datasets`.
    pub template: Value,
    /// What stands between the variables of each wording.
    wordings: Vec<Vec<String>>,
}

#[derive(Deserialize)]
struct Document {
    pools: Map<String, Value>,
    families: Vec<Value>,
}

/// All families, in the order in which they are shown.
pub fn load() -> Result<Vec<Family>, serde_json::Error> {
    let Document { pools, families } = serde_json::from_str(FAMILIES)?;
    Ok(families.into_iter().map(|family| Family::new(family, &pools)).collect())
}

/// The body of a dataset of `rows` rows, the same number of each family, that shares no row with
/// the datasets in `exclude`.
pub fn dataset(name: &str, families: &[Family], rows: u64, seed: u64, exclude: &[&str]) -> Value {
    let templates: Vec<&Value> = families.iter().map(|family| &family.template).collect();
    json!({"name": name, "source": {"type": "template", "rows": rows, "seed": seed, "exclude": exclude, "templates": templates}})
}

/// Which family an instruction is of.
pub fn recognise(families: &[Family], instruction: &str) -> Option<usize> {
    families.iter().position(|family| family.wordings.iter().any(|wording| matches(wording, instruction)))
}

impl Family {
    fn new(mut template: Value, pools: &Map<String, Value>) -> Family {
        if let Some(variables) = template["variables"].as_object_mut() {
            variables.values_mut().for_each(|variable| draw_from_pools(variable, pools));
        }
        let texts = template["instruction"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let wordings = texts.map(pieces).collect();
        Family { name: template["family"].as_str().unwrap_or_default().to_owned(), template, wordings }
    }
}

/// `{"pool": p}` becomes a choice from the pool, and a sample's `pool` the list that it is from.
fn draw_from_pools(variable: &mut Value, pools: &Map<String, Value>) {
    let pool = |name: &Value| name.as_str().and_then(|name| pools.get(name)).cloned().unwrap_or_default();
    let Some(object) = variable.as_object_mut() else { return };
    if let Some(name) = object.remove("pool") {
        object.insert("choice".to_owned(), pool(&name));
    }
    if let Some(sample) = object.get_mut("sample").and_then(Value::as_object_mut)
        && let Some(name) = sample.remove("pool")
    {
        sample.insert("from".to_owned(), pool(&name));
    }
}

/// The literal texts before, between and behind the `{{ … }}` of a wording.
fn pieces(wording: &str) -> Vec<String> {
    let mut parts = wording.split("{{");
    let first = parts.next().unwrap_or_default().to_owned();
    let rest = parts.map(|part| part.split_once("}}").map_or(part, |(_, literal)| literal).to_owned());
    std::iter::once(first).chain(rest).collect()
}

fn matches(pieces: &[String], text: &str) -> bool {
    let [first, middle @ .., last] = pieces else { return false };
    let Some(text) = text.strip_prefix(first.as_str()).and_then(|text| text.strip_suffix(last.as_str())) else { return false };
    let mut rest = text;
    for piece in middle {
        match rest.split_once(piece.as_str()) {
            Some((_, behind)) => rest = behind,
            None => return false,
        }
    }
    true
}
