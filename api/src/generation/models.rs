//! The model that a request names: its shape, its template and its tokenizer. A checkpoint is one too.
//!
//! The row is read on every request, so a deleted model or another project's is never served from
//! memory; only the tokenizer, whose folder never changes, is kept.

use std::sync::Arc;

use lathe_jobs::checkpoints;
use lathe_model::{
    config::{ModelConfig, Template},
    tokenizer::Tokenizer,
};

use crate::{problem::ApiError, state::AppState};

/// A ready model as generation needs it.
pub struct Model {
    /// As the request names it.
    pub id: String,
    /// The model whose row stands behind it; another id only for a checkpoint.
    pub model_id: String,
    pub checkpoint_id: Option<String>,
    /// Key of the folder in the artifact store.
    pub artifact: String,
    pub config: ModelConfig,
    /// `None`: answers chat with 400 `no_chat_template`.
    pub template: Option<Template>,
    pub tokenizer: Arc<Tokenizer>,
}

/// The project's model of that id, or its checkpoint of that name.
///
/// # Errors
/// 404 where there is none, 409 while it is not ready (it names the state and the job).
pub async fn ready_model(state: &AppState, project_id: &str, id: &str) -> Result<Arc<Model>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let checkpoint = checkpoints::find_named(&mut conn, id).await?;
    let row = sqlx::query!(
        r#"SELECT id, state, artifact, config, template, job_id FROM models
           WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL"#,
        checkpoint.as_ref().map_or(id, |checkpoint| &checkpoint.model_id),
        project_id
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(|| no_model(id))?;
    drop(conn);
    let (checkpoint_id, artifact) = match (checkpoint, row.state.as_str(), row.artifact) {
        (Some(checkpoint), _, _) => (Some(checkpoint.id), checkpoint.artifact),
        (None, "ready", Some(artifact)) => (None, artifact),
        (None, other, _) => {
            let message = format!("The model '{id}' is {other}, not ready: see its job {}.", row.job_id);
            return Err(ApiError::conflict(message).with_code("model_not_ready").with_param("model"));
        }
    };
    let config: ModelConfig = serde_json::from_value(row.config).map_err(ApiError::internal)?;
    let template = row.template.map(|name| serde_json::from_value(name.into())).transpose().map_err(ApiError::internal)?;
    let gone = || match checkpoint_id {
        // Pruned since its row was read.
        Some(_) => no_model(id),
        None => ApiError::internal(format!("the artifact {artifact} is missing from {}", state.artifacts.described())),
    };
    // The tokenizer may be in memory still when the folder is gone.
    if state.artifacts.is_missing_here(&format!("{artifact}/config.json")).await {
        return Err(gone());
    }
    let tokenizer = state.tokenizers.load(&state.artifacts, &artifact).await?.ok_or_else(gone)?;
    Ok(Arc::new(Model { id: id.to_owned(), model_id: row.id, checkpoint_id, artifact, config, template, tokenizer }))
}

/// 404 for the field `model`.
pub fn no_model(id: &str) -> ApiError {
    ApiError::not_found("model", id).with_code("model_not_found").with_param("model")
}
