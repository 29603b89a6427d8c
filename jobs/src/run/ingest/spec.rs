//! What an ingestion is asked to do. The api parses requests into these shapes and the queue stores
//! them, so that the worker trusts what it reads.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use crate::spec::{Documents, Format, OnBadRow};

/// Everything that one ingestion needs; all paths are local.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IngestSpec {
    pub source: Source,
    /// The dataset's folder, made here. `errors.jsonl` stands in it too.
    pub output: PathBuf,
    /// Space reserved on the disk: neither what is decompressed nor the rows written exceed it.
    pub max_bytes: u64,
    /// How many times its size a compressed file may unfold to.
    #[serde(default = "default_max_ratio")]
    pub max_ratio: u64,
    /// The longest line, element or record that is read, and the longest document of a plain text.
    #[serde(default = "default_max_line_bytes")]
    pub max_line_bytes: usize,
}

fn default_max_ratio() -> u64 {
    100
}

fn default_max_line_bytes() -> usize {
    8 << 20
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Source {
    Files(FilesSource),
    Template(TemplateSource),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesSource {
    pub files: Vec<InputFile>,
    #[serde(default)]
    pub format: Format,
    /// Which key holds which part of a row; a part that is not named is read from the key of its
    /// own name. Empty: the shape of each row is recognised by its keys.
    #[serde(default)]
    pub columns: Columns,
    #[serde(default)]
    pub documents: Documents,
    #[serde(default)]
    pub on_bad_row: OnBadRow,
}

pub type Columns = BTreeMap<Role, String>;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputFile {
    pub id: String,
    /// As it was uploaded; its ending helps to recognise the format.
    pub name: String,
    pub path: PathBuf,
}

/// A part of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Instruction,
    Input,
    Output,
    System,
    Text,
    Messages,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Instruction => "instruction",
            Role::Input => "input",
            Role::Output => "output",
            Role::System => "system",
            Role::Text => "text",
            Role::Messages => "messages",
        }
    }
}

/// A dataset made by rule. The seed decides every row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateSource {
    /// Shared out equally among the templates, the first ones taking what is left over.
    pub rows: u64,
    pub seed: u64,
    pub templates: Vec<TemplateSpec>,
    /// Folders of datasets with which no row is shared, by content or by key.
    #[serde(default)]
    pub exclude: Vec<PathBuf>,
}

/// How one kind of row is made: texts of minijinja, rendered from drawn variables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateSpec {
    /// Templates of one family are the same task in different words: their keys are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Renders to what identifies a row's variables whatever its wording. Absent: the variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// One wording or several, of which each row takes one.
    pub instruction: Wordings,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    pub output: String,
    #[serde(default)]
    pub variables: BTreeMap<String, Variable>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Wordings {
    One(String),
    Several(Vec<String>),
}

impl Wordings {
    pub fn as_slice(&self) -> &[String] {
        match self {
            Wordings::One(text) => std::slice::from_ref(text),
            Wordings::Several(texts) => texts,
        }
    }
}

/// What a variable is drawn from, every possibility equally often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variable {
    /// Integers from the first to the second, both included.
    Range(i64, i64),
    /// One of these values; an object's fields are reached by `{{ name.field }}`.
    Choice(Vec<serde_json::Value>),
    /// A list of some of these values in drawn order.
    Sample(Sample),
    /// A text of this many decimal digits.
    Digits(u32),
    /// A text of this many letters, `a` to `z`.
    Letters(u32),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    pub from: Vec<serde_json::Value>,
    pub count: u32,
    /// Whether a value may be drawn more than once.
    #[serde(default)]
    pub repeat: bool,
}
