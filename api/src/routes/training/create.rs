//! Creating a training job: its ids are looked up, then the job and its model are there at once.

use axum::{Json, extract::State, http::StatusCode};
use lathe_jobs::{
    audit::{self, Deed},
    checkpoints, events, ids,
    queue::{self, NewJob},
    spec::Spec,
    state::ResourceState,
};
use lathe_model::{
    config::{ModelConfig, Template, Validation},
    protocol::Level,
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use super::TrainingJobObject;
use crate::{
    auth::Project,
    generation::models::ready_model,
    idempotency::Creation,
    metadata::Metadata,
    parse::Body,
    problem::ApiError,
    resource,
    routes::{datasets, tokenizers},
    state::AppState,
    train_request::{Origin, TrainBody, TrainRequest},
};

/// Create a training job
///
/// The answer names the job's `model` at once. A dataset, tokenizer, base model or job of `after` that
/// is not ready is waited for; if it fails, so does this job.
#[utoipa::path(
    post, path = "/v1/training/jobs", operation_id = "create_training_job", tag = "training", request_body = TrainBody,
    responses(
        (status = 201, description = "The job, blocked or queued", body = TrainingJobObject),
        (status = 404, description = "Something that the body names is unknown; `param` says where"),
        (status = 409, description = "Something that the body names has failed"),
        (status = 422, description = "Fields contradict one another"),
    )
)]
pub(super) async fn create_training_job(
    State(state): State<AppState>,
    project: Project,
    creation: Creation,
    Body(body): Body<TrainBody>,
) -> Result<(StatusCode, Json<TrainingJobObject>), ApiError> {
    let stored = serde_json::to_value(&body).map_err(ApiError::internal)?;
    let request = body.resolve()?;
    if let Origin::Base { model, tokenizer: Some(tokenizer) } = &request.origin {
        check_extension(&state, &project.project_id, model, tokenizer).await?;
    }
    let mut conn = state.db.acquire().await?;
    let mut tx = conn.begin().await?;
    resource::require_storage(&mut tx, &project.project_id, 1).await?;
    let suffix = request.name.clone();
    let id = insert(&mut tx, &project.project_id, request, stored, suffix.as_deref()).await?;
    let row = super::find(&mut tx, &project.project_id, &id).await?;
    let job = TrainingJobObject::from(row);
    audit::record(&mut tx, project.did(Deed::TrainingJobCreated, &id)).await?;
    creation.commit(&state.db, tx, StatusCode::CREATED, &job).await?;
    Ok((StatusCode::CREATED, Json(job)))
}

/// What a job starts from, looked up.
struct Start {
    config: ModelConfig,
    tokenizer_id: Option<String>,
    base_model_id: Option<String>,
    /// The checkpoint that the base's name stands for.
    checkpoint_id: Option<String>,
    needs: Vec<String>,
}

/// Adds the job and the model that it makes, in the caller's transaction; returns the job's id.
/// `stored` is the body as accepted, `suffix` what a tuned model's id shows of its name.
pub(in crate::routes) async fn insert(
    conn: &mut PgConnection,
    project_id: &str,
    request: TrainRequest,
    stored: Value,
    suffix: Option<&str>,
) -> Result<String, ApiError> {
    let mut needs: Vec<String> =
        datasets::find_usable(conn, project_id, &request.dataset, "dataset").await?.into_iter().collect();
    let mut validation_dataset_id = None;
    if let Some(Validation::Dataset { dataset }) = &request.validation {
        needs.extend(datasets::find_usable(conn, project_id, dataset, "validation.dataset").await?);
        validation_dataset_id = Some(dataset.clone());
    }
    let start = match &request.origin {
        Origin::Fresh { model, tokenizer } => start_fresh(conn, project_id, model.clone(), tokenizer).await?,
        Origin::Base { model, tokenizer } => start_from(conn, project_id, model, tokenizer.as_deref()).await?,
    };
    needs.extend(start.needs.iter().cloned());
    check_after(conn, project_id, &request.after).await?;
    needs.extend(request.after.iter().cloned());

    let id = ids::new_dashed("ftjob");
    let model_id = match &start.base_model_id {
        None => ids::new_dashed("model"),
        Some(base) => {
            let project =
                sqlx::query_scalar!("SELECT name FROM projects WHERE id = $1", project_id).fetch_one(&mut *conn).await?;
            tuned_model_id(base, &project, suffix.unwrap_or_default(), &id)
        }
    };
    let spec = request.spec(start.config.clone())?;
    let template = request.method.template().map(Template::name);
    let config = serde_json::to_value(&start.config).map_err(ApiError::internal)?;
    let name = request.name.clone().unwrap_or_else(|| model_id.clone());
    let metadata = Metadata(request.metadata.clone()).to_row();
    let job = NewJob {
        id: id.clone(),
        project_id: project_id.to_owned(),
        name: request.name.clone(),
        devices: i32::try_from(spec.layout.ranks()).unwrap_or(i32::MAX),
        spec: Spec::Train(spec),
        request: stored,
        metadata: metadata.clone(),
        priority: request.priority,
        max_attempts: request.max_attempts,
        dataset_id: Some(request.dataset.clone()),
        validation_dataset_id,
        tokenizer_id: start.tokenizer_id.clone(),
        base_model_id: start.base_model_id.clone(),
        model_id: Some(model_id.clone()),
        needs,
    };
    let state = queue::enqueue(conn, job).await.map_err(resource::not_enqueued)?;
    if let Some(checkpoint_id) = start.checkpoint_id
        && !checkpoints::hold(conn, &checkpoint_id).await?
    {
        return Err(resource::unknown("model", start.base_model_id.as_deref().unwrap_or_default(), "base_model"));
    }
    sqlx::query!(
        "INSERT INTO models (id, project_id, name, state, job_id, base_model_id, dataset_id, tokenizer_id, config, template, code_version, metadata)
         VALUES ($1, $2, $3, 'queued', $4, $5, $6, $7, $8, $9, $10, $11)",
        model_id,
        project_id,
        name,
        id,
        start.base_model_id,
        request.dataset,
        start.tokenizer_id,
        config,
        template,
        env!("CARGO_PKG_VERSION"),
        metadata,
    )
    .execute(&mut *conn)
    .await?;
    let message = format!("The job was created and is {state}; it makes {model_id}.");
    events::append(conn, &id, Level::Info, "job.created", &message, &json!({ "model": model_id })).await?;
    Ok(id)
}

async fn start_fresh(
    conn: &mut PgConnection,
    project_id: &str,
    mut config: ModelConfig,
    tokenizer: &str,
) -> Result<Start, ApiError> {
    let needs = tokenizers::find_usable(conn, project_id, tokenizer, "tokenizer").await?;
    if needs.is_none() {
        config.vocabulary = vocabulary(conn, tokenizer).await?;
    }
    let needs = needs.into_iter().collect();
    Ok(Start { config, tokenizer_id: Some(tokenizer.to_owned()), base_model_id: None, checkpoint_id: None, needs })
}

/// Tokens of a ready tokenizer.
async fn vocabulary(conn: &mut PgConnection, tokenizer: &str) -> Result<i64, ApiError> {
    let vocabulary = sqlx::query_scalar!("SELECT vocabulary FROM tokenizers WHERE id = $1", tokenizer).fetch_one(conn).await?;
    Ok(vocabulary.unwrap_or(0))
}

/// 422 for a tokenizer that changes tokens of the base's. What is not ready cannot be read yet: there the job
/// finds it.
async fn check_extension(state: &AppState, project_id: &str, base: &str, tokenizer: &str) -> Result<(), ApiError> {
    let (base, tokenizer) =
        match (ready_model(state, project_id, base).await, tokenizers::ready(state, project_id, tokenizer).await) {
            (Ok(base), Ok(tokenizer)) => (base, tokenizer),
            // What is unknown or has failed is refused when the job is added.
            _ => return Ok(()),
        };
    let compared = lathe_jobs::waiting::blocking(move || tokenizer.extends(&base.tokenizer));
    compared.await.map_err(ApiError::internal)?.map_err(|reason| {
        let message = format!(
            "The tokenizer does not go with the base model: {reason}. Use the base's own, or one that only adds tokens to it."
        );
        ApiError::unprocessable("invalid_tokenizer", "tokenizer", message)
    })
}

/// Locks the base against deletion until the transaction ends. A checkpoint is ready whatever its job is.
async fn start_from(conn: &mut PgConnection, project_id: &str, base: &str, tokenizer: Option<&str>) -> Result<Start, ApiError> {
    let checkpoint = checkpoints::find_named(conn, base).await?;
    let row = sqlx::query!(
        r#"SELECT state AS "state: ResourceState", job_id, config, tokenizer_id FROM models
           WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL FOR KEY SHARE"#,
        checkpoint.as_ref().map_or(base, |checkpoint| &checkpoint.model_id),
        project_id,
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(|| resource::unknown("model", base, "base_model"))?;
    let needs = match row.state {
        _ if checkpoint.is_some() => Vec::new(),
        ResourceState::Ready => Vec::new(),
        ResourceState::Queued | ResourceState::Running => vec![row.job_id],
        ResourceState::Failed => return Err(resource::has_failed("model", base, "base_model")),
    };
    let config: ModelConfig = serde_json::from_value(row.config).map_err(ApiError::internal)?;
    let checkpoint_id = checkpoint.map(|checkpoint| checkpoint.id);
    let start = Start { config, tokenizer_id: row.tokenizer_id, base_model_id: Some(base.to_owned()), checkpoint_id, needs };
    match tokenizer.filter(|id| start.tokenizer_id.as_deref() != Some(id)) {
        Some(tokenizer) => with_tokenizer(conn, project_id, start, tokenizer).await,
        None => Ok(start),
    }
}

/// A base under another tokenizer than its own.
async fn with_tokenizer(conn: &mut PgConnection, project_id: &str, mut start: Start, tokenizer: &str) -> Result<Start, ApiError> {
    let of_base = std::mem::take(&mut start.config.vocabulary);
    match tokenizers::find_usable(conn, project_id, tokenizer, "tokenizer").await? {
        Some(job) => start.needs.push(job),
        None => start.config.vocabulary = vocabulary(conn, tokenizer).await?,
    }
    if (1..of_base).contains(&start.config.vocabulary) {
        let message = format!(
            "The tokenizer has {} tokens and the base model {of_base}: use the base's own, or one that only adds tokens to it.",
            start.config.vocabulary
        );
        return Err(ApiError::unprocessable("invalid_tokenizer", "tokenizer", message));
    }
    Ok(Start { tokenizer_id: Some(tokenizer.to_owned()), ..start })
}

async fn check_after(conn: &mut PgConnection, project_id: &str, after: &[String]) -> Result<(), ApiError> {
    let found = sqlx::query_scalar!(
        "SELECT id FROM jobs WHERE id = ANY($1) AND project_id = $2 AND deleted_at IS NULL",
        after,
        project_id
    )
    .fetch_all(conn)
    .await?;
    match after.iter().position(|id| !found.contains(id)) {
        Some(index) => Err(resource::unknown("job", &after[index], &format!("after[{index}]"))),
        None => Ok(()),
    }
}

/// `ft:base:org:suffix:id`. A base that is itself tuned gives its own base's name, a checkpoint its
/// model's.
fn tuned_model_id(base: &str, project: &str, suffix: &str, job_id: &str) -> String {
    let base = base.strip_prefix("ft:").unwrap_or(base);
    let base = base.split(':').next().unwrap_or(base);
    let tail: String = job_id.chars().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect();
    format!("ft:{base}:{}:{}:{}", plain(project), plain(suffix), tail.to_lowercase())
}

/// A name as a part of an id: lower-case letters, digits and dashes, at most 64.
fn plain(name: &str) -> String {
    name.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tuned_models_are_named_like_openai_s() {
        let id = tuned_model_id("model-1", "My project", "Sums: v2", "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N");
        assert_eq!(id, "ft:model-1:my-project:sums--v2:8x2y6c0v1b4n");
        assert_eq!(
            tuned_model_id(&id, "p", "", "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N").split(':').collect::<Vec<_>>()[..4],
            ["ft", "model-1", "p", ""]
        );
        let of_checkpoint = tuned_model_id("model-1:ckpt-step-5", "p", "x", "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N");
        assert_eq!(of_checkpoint, "ft:model-1:p:x:8x2y6c0v1b4n");
    }
}
