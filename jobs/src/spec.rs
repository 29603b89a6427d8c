//! What a job is to do, as the column `jobs.spec` holds it.
//!
//! A request is parsed into a [`Spec`] once, at POST; runners trust it. `kind` in the JSON is the
//! column `jobs.kind` too, except that an import is a job of kind `tokenizer`. A job outlives the binary
//! that stored it: [`Spec::read`] reads every earlier version.

use lathe_model::{
    config::{JobSpec, SPEC_VERSION},
    listed_enum,
};
use serde::{Deserialize, Serialize};

use crate::{
    run::ingest::{Columns, TemplateSpec},
    state::Kind,
};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[allow(clippy::large_enum_variant, reason = "a spec is made once and stored; it is never kept in numbers")]
pub enum Spec {
    /// Builds the dataset whose row names this job.
    Ingest {
        source: DatasetSource,
    },
    /// Trains the tokenizer whose row names this job, on `jobs.dataset_id`.
    Tokenizer {
        vocabulary: i64,
    },
    /// Reads an uploaded `tokenizer.json`.
    TokenizerImport {
        /// A file's id.
        file: String,
    },
    /// Counts tokens of `jobs.dataset_id` under `jobs.tokenizer_id`.
    Statistics {},
    Train(JobSpec),
}

/// A column that this binary does not read.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("it is of version {stored} and this binary reads up to {SPEC_VERSION}: start the newer one")]
    Newer { stored: u64 },
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

impl Spec {
    /// Reads the column. What a later version has added has a default in these types, so version 1 is read
    /// by the same ones.
    pub fn read(column: serde_json::Value) -> Result<Spec, SpecError> {
        match column["spec_version"].as_u64() {
            Some(stored) if stored > u64::from(SPEC_VERSION) => Err(SpecError::Newer { stored }),
            _ => Ok(serde_json::from_value(column)?),
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Spec::Ingest { .. } => Kind::Ingest,
            Spec::Tokenizer { .. } | Spec::TokenizerImport { .. } => Kind::Tokenizer,
            Spec::Statistics {} => Kind::Statistics,
            Spec::Train(_) => Kind::Train,
        }
    }
}

/// Where a dataset's rows come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum DatasetSource {
    Files {
        /// Ids of files, read in this order.
        files: Vec<String>,
        format: Format,
        /// Which key of the files holds which part of a row.
        columns: Columns,
        documents: Documents,
        on_bad_row: OnBadRow,
    },
    /// Rows made by rule.
    Template {
        rows: u64,
        seed: u64,
        /// Ids of datasets that must share no row with this one.
        exclude: Vec<String>,
        templates: Vec<TemplateSpec>,
    },
}

listed_enum! {
    #[derive(Default)]
    Format {
        /// Decided by name and content, file by file.
        #[default]
        Auto,
        Text,
        Jsonl,
        Json,
        Csv,
        Parquet,
    }
}

listed_enum! {
    /// Where a plain text is cut into documents.
    #[derive(Default)]
    Documents {
        #[default]
        File,
        BlankLine,
        Line,
    }
}

listed_enum! {
    #[derive(Default)]
    OnBadRow {
        /// One bad row fails the dataset.
        #[default]
        Reject,
        Skip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::ingest::Role;

    #[test]
    fn a_spec_is_read_back_from_its_column() {
        let source = DatasetSource::Files {
            files: vec!["file-1".into()],
            format: Format::Auto,
            columns: Columns::from([(Role::Instruction, "q".into())]),
            documents: Documents::BlankLine,
            on_bad_row: OnBadRow::Skip,
        };
        for spec in [Spec::Ingest { source }, Spec::Tokenizer { vocabulary: 512 }, Spec::Statistics {}] {
            let column = serde_json::to_value(&spec).expect("a spec is JSON");
            assert_eq!(serde_json::from_value::<Spec>(column).expect("it was written by this version"), spec);
        }
    }
}
