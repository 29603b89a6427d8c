//! Datasets made by rule: rows rendered from templates and drawn variables.
//!
//! The seed decides every row. Rows differ from each other by content, and from the excluded
//! datasets by content and by key; a key names a row's variables whatever its wording, and stands
//! in `keys.bin` of the dataset: 16 bytes a row, in their order. Templates run on fuel, so that none
//! runs for long or makes a large text.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use lathe_model::{
    data::rows::{Dataset, Row, Turn},
    protocol::{Failure, FailureCode},
};
use minijinja::{Environment, UndefinedBehavior};
use sha2::{Digest, Sha256};

use super::{
    errors::shown,
    sink::Sink,
    source::{fail, read_failure, write_failure},
    space::{Permutation, Point, Space},
    spec::{TemplateSource, TemplateSpec},
};

pub const KEYS_FILE: &str = "keys.bin";

/// For one rendering: about so many instructions, or 64 times as many bytes.
const FUEL: u64 = 50_000;

/// Points that may be passed over beyond those that other datasets have, before the search for
/// another row is given up.
const PATIENCE: u64 = 1_000_000;

type Hash = [u8; 16];

/// Refuses templates that do not parse and variables that draw from nothing. What shows only when
/// a row is rendered is found by the job.
pub fn check(templates: &[TemplateSpec]) -> Result<(), Failure> {
    compile(templates).map(|_| ())
}

pub fn make(source: &TemplateSource, output: &Path, sink: &mut Sink<'_>) -> Result<(), Failure> {
    sink.total = source.rows;
    let (environment, spaces) = compile(&source.templates)?;
    let mut taken = Taken::default();
    for folder in &source.exclude {
        taken.exclude(folder).map_err(read_failure)?;
    }
    let excluded = taken.keys.len() as u64;
    let count = source.templates.len() as u64;
    let mut makers: Vec<Maker<'_>> = Vec::new();
    for (index, (template, space)) in (0..).zip(source.templates.iter().zip(spaces)) {
        let quota = source.rows / count + u64::from(index < source.rows % count);
        let order = Permutation::new(space.size, source.seed, index);
        let patience = PATIENCE + 50 * quota + 50 * excluded;
        makers.push(Maker {
            environment: &environment,
            template,
            space,
            order,
            index: index as usize,
            quota,
            cursor: 0,
            made: 0,
            patience,
            excluded: 0,
        });
    }
    let mut keys = BufWriter::new(File::create(output.join(KEYS_FILE)).map_err(write_failure)?);
    for row in 0..source.rows {
        let maker = &mut makers[(row % count) as usize];
        let (row, key) = maker.next(&mut taken)?;
        keys.write_all(&key).map_err(write_failure)?;
        sink.position.set(sink.position.get() + 1);
        sink.row(&row)?;
    }
    keys.flush().and_then(|()| keys.get_ref().sync_all()).map_err(write_failure)
}

fn compile(templates: &[TemplateSpec]) -> Result<(Environment<'_>, Vec<Space<'_>>), Failure> {
    if templates.is_empty() {
        return Err(bad_template("source.templates".to_owned(), "must hold at least one template".to_owned()));
    }
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("pad", pad);
    let mut spaces = Vec::new();
    for (index, template) in templates.iter().enumerate() {
        let space =
            Space::new(template).map_err(|(field, what)| bad_template(format!("source.templates[{index}].{field}"), what))?;
        for (field, text) in texts(template) {
            let path = format!("source.templates[{index}].{field}");
            environment.add_template_owned(name(index, &field), text).map_err(|error| bad_template(path, explain(&error)))?;
        }
        spaces.push(space);
    }
    Ok((environment, spaces))
}

/// The template's texts by field; only wordings of a list are numbered.
fn texts(template: &TemplateSpec) -> Vec<(String, &str)> {
    let wordings = template.instruction.as_slice();
    let instruction = |index: usize| if wordings.len() == 1 { "instruction".to_owned() } else { format!("instruction[{index}]") };
    let wordings = wordings.iter().enumerate().map(|(index, text)| (instruction(index), text.as_str()));
    let others =
        [("input", template.input.as_deref()), ("output", Some(template.output.as_str())), ("key", template.key.as_deref())];
    wordings.chain(others.into_iter().filter_map(|(field, text)| text.map(|text| (field.to_owned(), text)))).collect()
}

fn name(index: usize, field: &str) -> String {
    format!("{index}.{field}")
}

fn context(point: &Point) -> minijinja::Value {
    minijinja::Value::from_pairs(point.values.iter().map(|(name, value)| (name.clone(), converted(value))))
}

/// By hand, because minijinja's own conversion gives a meaning to certain keys of objects.
fn converted(value: &serde_json::Value) -> minijinja::Value {
    match value {
        serde_json::Value::Null => minijinja::Value::from(()),
        serde_json::Value::Bool(value) => minijinja::Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => minijinja::Value::from(integer),
            (None, Some(integer)) => minijinja::Value::from(integer),
            (None, None) => minijinja::Value::from(number.as_f64().unwrap_or_default()),
        },
        serde_json::Value::String(text) => minijinja::Value::from(text.as_str()),
        serde_json::Value::Array(values) => minijinja::Value::from(values.iter().map(converted).collect::<Vec<_>>()),
        serde_json::Value::Object(object) => {
            minijinja::Value::from_pairs(object.iter().map(|(key, value)| (key.clone(), converted(value))))
        }
    }
}

/// `{{ 7|pad(3) }}` is `007`; a second argument names another character than `0`.
fn pad(value: &minijinja::Value, width: usize, with: Option<char>) -> Result<String, minijinja::Error> {
    let text = value.to_string();
    if width > 1_000 {
        return Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, "pad: at most 1000 characters"));
    }
    let missing = width.saturating_sub(text.chars().count());
    Ok(std::iter::repeat_n(with.unwrap_or('0'), missing).chain(text.chars()).collect())
}

fn explain(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

fn bad_template(param: String, what: String) -> Failure {
    let message =
        format!("{param}: {}", what.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect::<String>());
    Failure { param: Some(param), ..fail(FailureCode::BadTemplate, message) }
}

/// What a new row must not be: the rows of excluded datasets and those already made.
#[derive(Default)]
struct Taken {
    contents: HashSet<Hash>,
    keys: HashSet<Hash>,
}

impl Taken {
    fn exclude(&mut self, folder: &Path) -> io::Result<()> {
        for row in Dataset::open(folder)?.iter()? {
            self.contents.insert(content(&row?)?);
        }
        match fs::read(folder.join(KEYS_FILE)) {
            Ok(keys) => self.keys.extend(keys.as_chunks::<16>().0),
            // A dataset from files has no keys; its contents are excluded all the same.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn content(row: &Row) -> io::Result<Hash> {
    Ok(hash(&[&serde_json::to_vec(row)?]))
}

fn hash(parts: &[&[u8]]) -> Hash {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    let digest: [u8; 32] = digest.finalize().into();
    std::array::from_fn(|index| digest[index])
}

/// Makes the rows of one template, one after another.
struct Maker<'a> {
    environment: &'a Environment<'a>,
    template: &'a TemplateSpec,
    space: Space<'a>,
    order: Permutation,
    index: usize,
    /// Rows wanted and made.
    quota: u64,
    made: u64,
    /// Points visited, of which so many gave a row of an excluded dataset.
    cursor: u128,
    excluded: u64,
    patience: u64,
}

impl Maker<'_> {
    /// The next row that is not taken, with its key.
    fn next(&mut self, taken: &mut Taken) -> Result<(Row, Hash), Failure> {
        while self.cursor < self.space.size && self.patience > 0 {
            let point = self.space.point(self.order.at(self.cursor));
            self.cursor += 1;
            let key = self.key(&point)?;
            if taken.keys.contains(&key) {
                self.excluded += 1;
                self.patience -= 1;
                continue;
            }
            let row = self.row(&point)?;
            if taken.contents.insert(content(&row).map_err(write_failure)?) {
                self.made += 1;
                return Ok((row, key));
            }
            self.patience -= 1;
        }
        Err(self.exhausted())
    }

    fn key(&self, point: &Point) -> Result<Hash, Failure> {
        let key = match &self.template.key {
            Some(_) => self.render("key", point)?,
            None => serde_json::to_string(&point.values).map_err(|error| write_failure(error.into()))?,
        };
        Ok(hash(&[self.template.family.as_deref().unwrap_or_default().as_bytes(), key.as_bytes()]))
    }

    fn row(&self, point: &Point) -> Result<Row, Failure> {
        let several = self.template.instruction.as_slice().len() > 1;
        let wording = if several { format!("instruction[{}]", point.wording) } else { "instruction".to_owned() };
        let instruction = self.render(&wording, point)?;
        let input = self.template.input.as_ref().map(|_| self.render("input", point)).transpose()?.unwrap_or_default();
        let output = self.render("output", point)?;
        for (field, empty) in
            [(wording.as_str(), instruction.trim().is_empty() && input.trim().is_empty()), ("output", output.trim().is_empty())]
        {
            if empty {
                let what =
                    format!("renders to nothing for the variables {}", shown(&serde_json::json!(point.values).to_string()));
                return Err(bad_template(self.path(field), what));
            }
        }
        Ok(Row::Conversation { system: None, turns: vec![Turn { instruction, input, output }] })
    }

    fn render(&self, field: &str, point: &Point) -> Result<String, Failure> {
        let template = self.environment.get_template(&name(self.index, field));
        template
            .and_then(|template| template.render(context(point)))
            .map_err(|error| bad_template(self.path(field), explain(&error)))
    }

    fn path(&self, field: &str) -> String {
        format!("source.templates[{}].{field}", self.index)
    }

    fn exhausted(&self) -> Failure {
        let Maker { quota, made, excluded, .. } = self;
        let family = self.template.family.as_ref().map_or(String::new(), |family| format!(" ({})", shown(family)));
        let searched = if self.cursor == self.space.size { "all" } else { "the search was given up after" };
        let message = format!(
            "template {}{family} gives only {made} of the {quota} distinct rows wanted from it: {searched} {} combinations of its variables were \
             tried, of which {excluded} belong to excluded datasets; give its variables more values or ask for fewer rows",
            self.index + 1,
            self.cursor,
        );
        Failure { param: Some(format!("source.templates[{}]", self.index)), ..fail(FailureCode::NotEnoughDistinctRows, message) }
    }
}
