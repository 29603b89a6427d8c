//! Training a tokenizer on a dataset, or reading an uploaded one.

use std::path::Path;

use lathe_model::protocol::{Task, TokenizerTask};

use super::{PrepareError, dataset_folder, fetched, gone};
use crate::{context::Context, lease::Claimed};

/// Where the worker writes the tokenizer's folder.
const FOLDER: &str = "tokenizer";

pub async fn training(context: &Context, claimed: &Claimed, vocabulary: i64, staging: &Path) -> Result<Task, PrepareError> {
    let dataset = dataset_folder(context, claimed.dataset_id.as_deref()).await?.folder;
    Ok(Task::Tokenizer(TokenizerTask { dataset: Some(dataset), file: None, vocabulary, output: staging.join(FOLDER) }))
}

pub async fn import(context: &Context, file_id: &str, staging: &Path) -> Result<Task, PrepareError> {
    let artifact = sqlx::query_scalar!("SELECT artifact FROM files WHERE id = $1 AND deleted_at IS NULL", file_id)
        .fetch_optional(&context.db)
        .await?
        .ok_or_else(|| gone("file", file_id))?;
    let file = fetched(context, &artifact).await?;
    Ok(Task::Tokenizer(TokenizerTask { dataset: None, file: Some(file), vocabulary: 0, output: staging.join(FOLDER) }))
}
