//! Where a dataset's rows come from, as requests say it.

use std::collections::BTreeMap;

use lathe_jobs::{
    run::ingest::{Columns, Role, TemplateSpec},
    spec::{self, DatasetSource},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::{names::names, problem::ApiError};

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FilesType {
    Files,
}

/// Uploaded files.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"type": "files", "files": ["file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N"], "columns": {"instruction": "q", "output": "a"}}))]
pub struct FilesSource {
    #[allow(dead_code, reason = "the tag of the union")]
    r#type: FilesType,
    /// Ids of files, read in this order.
    #[schema(min_items = 1, max_items = 1000)]
    files: Vec<String>,
    /// Default: auto, by content and name, file by file.
    format: Option<FormatName>,
    /// Part of a row → the file's own name for it. Absent: recognised by the keys.
    columns: Option<ColumnsBody>,
    /// Where a plain text is cut. Default: file.
    documents: Option<DocumentsName>,
    /// Default: reject.
    on_bad_row: Option<OnBadRowName>,
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TemplateType {
    Template,
}

/// Rows made by rule.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"type": "template", "rows": 100, "templates": [{"instruction": "Spell {{ w }}.", "output": "{{ w }}", "variables": {"w": {"letters": 4}}}]}))]
pub struct TemplateSource {
    #[allow(dead_code, reason = "the tag of the union")]
    r#type: TemplateType,
    #[schema(minimum = 1, maximum = 10000000)]
    rows: u64,
    /// Decides every row. Default: 0.
    #[schema(minimum = 0, maximum = 18446744073709551615u64, format = "uint64")]
    seed: Option<u64>,
    /// Datasets with which no row may be shared. One that is not ready is waited for.
    #[schema(max_items = 64)]
    exclude: Option<Vec<String>>,
    #[schema(min_items = 1, max_items = 1000)]
    templates: Vec<TemplateBody>,
}

/// Uploaded files, or rows made by rule.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum SourceBody {
    Files(FilesSource),
    Template(TemplateSource),
}

names! {
    FormatName(spec::Format),
    DocumentsName(spec::Documents),
    OnBadRowName(spec::OnBadRow),
}

/// The file's own names for the parts of a row.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ColumnsBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub instruction: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub input: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub output: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub system: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub messages: Option<String>,
}

/// How one kind of row is made: minijinja texts, rendered from drawn variables.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"instruction": "What is {{ a }} plus {{ b }}?", "output": "{{ a + b }}", "variables": {"a": {"range": [0, 99]}, "b": {"range": [0, 99]}}}))]
pub struct TemplateBody {
    /// Templates of one family are the same task in different words: their rows are compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub family: Option<String>,
    /// Renders to what identifies a row whatever its wording. Default: the variables.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 10000)]
    pub key: Option<String>,
    pub instruction: WordingsBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 10000)]
    pub input: Option<String>,
    #[schema(min_length = 1, max_length = 10000)]
    pub output: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variables: Option<BTreeMap<String, VariableBody>>,
}

/// One wording, or several of which each row takes one.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum WordingsBody {
    One(Wording),
    Several(WordingList),
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[schema(min_length = 1, max_length = 10000)]
pub struct Wording(pub String);

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[schema(min_items = 1, max_items = 1000)]
pub struct WordingList(pub Vec<Wording>);

/// What a variable is drawn from, every possibility equally often.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum VariableBody {
    Range(RangeVariable),
    Choice(ChoiceVariable),
    Sample(SampleVariable),
    Digits(DigitsVariable),
    Letters(LettersVariable),
}

/// Integers from the first to the second, both included.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RangeVariable {
    #[schema(min_items = 2, max_items = 2)]
    pub range: Vec<RangeEnd>,
}

/// One end of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, ToSchema)]
#[schema(minimum = -9223372036854775808i64, maximum = 9223372036854775807i64)]
pub struct RangeEnd(pub i64);

/// One of these values; an object's fields are reached by `{{ name.field }}`.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChoiceVariable {
    #[schema(min_items = 1, max_items = 100000)]
    pub choice: Vec<Value>,
}

/// A list of some of the values, in drawn order.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SampleVariable {
    pub sample: SampleBody,
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SampleBody {
    #[schema(min_items = 1, max_items = 100000)]
    pub from: Vec<Value>,
    #[schema(minimum = 1, maximum = 1000)]
    pub count: u32,
    /// Whether a value may be drawn more than once. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repeat: Option<bool>,
}

/// A text of this many decimal digits.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DigitsVariable {
    #[schema(minimum = 1, maximum = 1000)]
    pub digits: u32,
}

/// A text of this many letters, `a` to `z`.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LettersVariable {
    #[schema(minimum = 1, maximum = 1000)]
    pub letters: u32,
}

impl SourceBody {
    /// With its defaults.
    pub fn resolve(self) -> Result<DatasetSource, ApiError> {
        match self {
            SourceBody::Files(source) => Ok(DatasetSource::Files {
                files: source.files,
                format: source.format.map_or(spec::Format::Auto, |name| name.0),
                columns: source.columns.unwrap_or_default().resolve(),
                documents: source.documents.map_or(spec::Documents::File, |name| name.0),
                on_bad_row: source.on_bad_row.map_or(spec::OnBadRow::Reject, |name| name.0),
            }),
            SourceBody::Template(source) => {
                for (index, template) in source.templates.iter().enumerate() {
                    template.check(&format!("source.templates[{index}]"))?;
                }
                let templates =
                    source.templates.iter().map(TemplateBody::resolve).collect::<Result<_, _>>().map_err(ApiError::internal)?;
                Ok(DatasetSource::Template {
                    rows: source.rows,
                    seed: source.seed.unwrap_or(0),
                    exclude: source.exclude.unwrap_or_default(),
                    templates,
                })
            }
        }
    }
}

impl TemplateBody {
    /// The same shape, as ingestion reads it.
    fn resolve(&self) -> Result<TemplateSpec, serde_json::Error> {
        serde_json::from_value(serde_json::to_value(self)?)
    }

    /// What no schema expresses about variables.
    fn check(&self, at: &str) -> Result<(), ApiError> {
        for (name, variable) in self.variables.iter().flatten() {
            let at = format!("{at}.variables.{name}");
            match variable {
                VariableBody::Range(RangeVariable { range }) if range.first() > range.last() => {
                    return Err(ApiError::unprocessable(
                        "contradiction",
                        format!("{at}.range"),
                        format!("`{at}.range` ends before it begins."),
                    ));
                }
                VariableBody::Sample(SampleVariable { sample })
                    if sample.repeat != Some(true) && sample.count as usize > sample.from.len() =>
                {
                    let message = format!("`{at}.sample` draws more values than there are; allow `repeat` or draw fewer.");
                    return Err(ApiError::unprocessable("contradiction", format!("{at}.sample.count"), message));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl ColumnsBody {
    fn resolve(self) -> Columns {
        let columns = [
            (Role::Instruction, self.instruction),
            (Role::Input, self.input),
            (Role::Output, self.output),
            (Role::System, self.system),
            (Role::Text, self.text),
            (Role::Messages, self.messages),
        ];
        columns.into_iter().filter_map(|(part, column)| Some((part, column?))).collect()
    }
}
