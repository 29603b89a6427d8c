//! The model that a request names: its shape, its template and its tokenizer.
//!
//! The row is read on every request, so a deleted model or another project's is never served from
//! memory; only the tokenizer, whose folder never changes, is kept.

use std::sync::Arc;

use lathe_model::{
    config::{ModelConfig, Template},
    tokenizer::Tokenizer,
};

use crate::{problem::ApiError, state::AppState};

/// A ready model as generation needs it.
pub struct Model {
    pub id: String,
    /// Key of the folder in the artifact store.
    pub artifact: String,
    pub bytes: i64,
    pub config: ModelConfig,
    /// `None`: answers chat with 400 `no_chat_template`.
    pub template: Option<Template>,
    pub tokenizer: Arc<Tokenizer>,
}

/// The project's model of that id.
///
/// # Errors
/// 404 where there is none, 409 while it is not ready (it names the state and the job).
pub async fn ready_model(state: &AppState, project_id: &str, id: &str) -> Result<Arc<Model>, ApiError> {
    let row = sqlx::query!(
        r#"SELECT state, artifact, config, template, bytes, job_id FROM models
           WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL"#,
        id,
        project_id
    )
    .fetch_optional(&state.db)
    .await?
    .ok_or_else(|| ApiError::not_found("model", id).with_code("model_not_found"))?;
    let artifact = match (row.state.as_str(), row.artifact) {
        ("ready", Some(artifact)) => artifact,
        (other, _) => {
            let message = format!("The model '{id}' is {other}, not ready: see its job {}.", row.job_id);
            return Err(ApiError::conflict(message).with_code("model_not_ready"));
        }
    };
    let config: ModelConfig = serde_json::from_value(row.config).map_err(ApiError::internal)?;
    let template = row.template.map(|name| serde_json::from_value(name.into())).transpose().map_err(ApiError::internal)?;
    let (tokenizers, folder, key) = (state.tokenizers.clone(), state.artifacts.path(&artifact), artifact.clone());
    let tokenizer = tokio::task::spawn_blocking(move || tokenizers.get_or_load(&key, || Tokenizer::load(&folder)))
        .await
        .map_err(ApiError::internal)?
        .map_err(ApiError::internal)?;
    Ok(Arc::new(Model { id: id.to_owned(), artifact, bytes: row.bytes.unwrap_or(0), config, template, tokenizer }))
}
