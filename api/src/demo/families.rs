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

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, path::Path, sync::atomic::AtomicBool};

    use lathe_jobs::run::ingest::{self, IngestSpec, Source, TemplateSource};
    use lathe_model::data::rows::{Dataset, Row};

    use super::*;

    const ROWS: u64 = 2_700;

    /// Rows as (family, instruction, output), made as the server makes them.
    fn made(families: &[Family], folder: &Path, rows: u64, seed: u64, exclude: &[&Path]) -> Vec<(usize, String, String)> {
        let templates =
            families.iter().map(|family| serde_json::from_value(family.template.clone()).expect("a template")).collect();
        let exclude = exclude.iter().map(|folder| folder.to_path_buf()).collect();
        let source = Source::Template(TemplateSource { rows, seed, templates, exclude });
        let spec = IngestSpec { source, output: folder.to_owned(), max_bytes: 1 << 30, max_ratio: 100, max_line_bytes: 1 << 20 };
        ingest::run(spec, &mut |_| {}, &AtomicBool::new(false)).expect("rows");
        let mut dataset = Dataset::open(folder).expect("a dataset");
        let rows = dataset.iter().expect("rows").map(|row| match row.expect("a row") {
            Row::Conversation { turns, .. } => {
                let turn = turns.into_iter().next().expect("a turn");
                (recognise(families, &turn.instruction).expect("a family"), turn.instruction, turn.output)
            }
            Row::Text { text } => panic!("a text: {text}"),
        });
        rows.collect()
    }

    /// What two rows of a family must not share. Its output tells a row's variables, except that
    /// many names have the same initials: there it is the names.
    fn variables(families: &[Family], (family, instruction, output): &(usize, String, String)) -> (usize, String) {
        let names = |text: &str| {
            text.split([' ', '?', '.'])
                .filter(|word| word.starts_with(char::is_uppercase) && !["What", "Shorten"].contains(word))
                .collect::<Vec<_>>()
                .join(" ")
        };
        (*family, if families[*family].name == "initials" { names(instruction) } else { output.clone() })
    }

    #[test]
    fn no_held_out_rows_variables_occur_together_in_a_training_row() {
        let families = load().expect("families");
        let root = tempfile::tempdir().expect("a folder");
        let (first, second) = (root.path().join("held_out"), root.path().join("train"));
        let held_out = made(&families, &first, ROWS / 2, 1, &[]);
        let train = made(&families, &second, 4 * ROWS, 2, &[&first]);
        let known: HashSet<_> = train.iter().map(|row| variables(&families, row)).collect();
        let shared: Vec<_> = held_out.iter().filter(|row| known.contains(&variables(&families, row))).collect();
        assert!(shared.is_empty(), "{shared:?}");
    }

    #[test]
    fn every_family_is_recognised_and_has_many_answers() {
        let families = load().expect("families");
        assert!(families.len() >= 7);
        let root = tempfile::tempdir().expect("a folder");
        let rows = made(&families, &root.path().join("rows"), ROWS, 3, &[]);
        let each = ROWS as usize / families.len();
        for (index, family) in families.iter().enumerate() {
            let answers: Vec<&String> = rows.iter().filter(|row| row.0 == index).map(|row| &row.2).collect();
            assert_eq!(answers.len(), each, "{}", family.name);
            let distinct: HashSet<_> = answers.iter().collect();
            let commonest = distinct.iter().map(|answer| answers.iter().filter(|other| other == answer).count()).max();
            assert!(commonest.is_some_and(|count| count * 20 < each), "{}: {commonest:?} of {each}", family.name);
        }
    }

    #[test]
    fn the_tasks_are_computed_rightly() {
        let families = load().expect("families");
        let root = tempfile::tempdir().expect("a folder");
        for (family, instruction, output) in made(&families, &root.path().join("rows"), ROWS, 4, &[]) {
            let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<Vec<_>>();
            match families[family].name.as_str() {
                "sort digits" => {
                    let mut sorted = digits(&instruction);
                    sorted.sort_unstable();
                    assert_eq!(sorted, digits(&output), "{instruction}");
                }
                "reverse letters" => {
                    let backwards: String = output.chars().rev().collect();
                    assert!(instruction.contains(&backwards), "{instruction} → {output}");
                }
                "reminder" => {
                    let noon = instruction.contains("12 pm") == output.ends_with("12:00");
                    let midnight = instruction.contains("12 am") == output.ends_with("00:00");
                    assert!(noon && midnight, "{instruction} → {output}");
                }
                _ => {}
            }
        }
    }

    #[test]
    fn a_wording_is_matched_by_what_stands_between_its_variables() {
        let wording = pieces("Say {{ a }} to {{ b }}.");
        assert!(matches(&wording, "Say hello to Nora."));
        assert!(!matches(&wording, "Say hello."));
    }
}
