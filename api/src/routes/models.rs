//! `/v1/models`: the registry, in OpenAI's shape with Lathe's lineage beside it.

use axum::{Json, extract::State};
use lathe_jobs::checkpoints;
use serde::Serialize;
use serde_json::Value;
use sqlx::PgPool;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{auth::Project, parse::Path, problem::ApiError, state::AppState};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_models)).routes(routes!(get_model, delete_model))
}

/// A model and where it came from.
#[derive(Serialize, ToSchema)]
pub struct ModelObject {
    pub id: String,
    #[schema(example = "model")]
    pub object: &'static str,
    pub created: i64,
    /// The project's id.
    pub owned_by: String,
    pub name: String,
    /// `queued`, `running`, `ready` or `failed`.
    pub state: String,
    /// Why it failed, in a sentence with what to do.
    pub error: Option<Value>,
    /// Count of the trained numbers, padding and shared tables counted once.
    pub parameters: Option<i64>,
    /// Over the tensors in the order of their names.
    pub weights_sha256: Option<String>,
    /// The chat template that it was trained with.
    pub template: Option<String>,
    /// The resolved shape.
    pub config: Value,
    pub lineage: Lineage,
    pub metadata: Value,
}

/// What made the model. Ids stay when what they name is deleted.
#[derive(Serialize, ToSchema)]
pub struct Lineage {
    pub job: String,
    pub base_model: Option<String>,
    pub dataset: Option<String>,
    pub tokenizer: Option<String>,
    pub code_version: String,
    /// As the job resolved them.
    pub hyperparameters: Option<Value>,
}

#[derive(Serialize, ToSchema)]
pub struct ModelList {
    #[schema(example = "list")]
    pub object: &'static str,
    pub data: Vec<ModelObject>,
    pub has_more: bool,
}

#[derive(Serialize, ToSchema)]
pub struct ModelDeleted {
    pub id: String,
    #[schema(example = "model")]
    pub object: &'static str,
    pub deleted: bool,
}

struct Row {
    id: String,
    project_id: String,
    name: String,
    state: String,
    error: Option<Value>,
    parameters: Option<i64>,
    weights_sha256: Option<String>,
    template: Option<String>,
    config: Value,
    job_id: String,
    base_model_id: Option<String>,
    dataset_id: Option<String>,
    tokenizer_id: Option<String>,
    code_version: String,
    hyperparameters: Option<Value>,
    metadata: Value,
    created: i64,
}

impl From<Row> for ModelObject {
    fn from(row: Row) -> ModelObject {
        ModelObject {
            id: row.id,
            object: "model",
            created: row.created,
            owned_by: row.project_id,
            name: row.name,
            state: row.state,
            error: row.error,
            parameters: row.parameters,
            weights_sha256: row.weights_sha256,
            template: row.template,
            config: row.config,
            lineage: Lineage {
                job: row.job_id,
                base_model: row.base_model_id,
                dataset: row.dataset_id,
                tokenizer: row.tokenizer_id,
                code_version: row.code_version,
                hyperparameters: row.hyperparameters,
            },
            metadata: row.metadata,
        }
    }
}

/// The project's models, newest first, or the one of that id.
async fn rows(db: &PgPool, project_id: &str, id: Option<&str>) -> Result<Vec<Row>, ApiError> {
    let rows = sqlx::query_as!(
        Row,
        r#"SELECT m.id, m.project_id, m.name, m.state, m.error, m.parameters, m.weights_sha256, m.template, m.config, m.job_id,
                  m.base_model_id, m.dataset_id, m.tokenizer_id, m.code_version, j.spec -> 'train' AS hyperparameters, m.metadata,
                  extract(epoch FROM m.created_at)::bigint AS "created!"
           FROM models m JOIN jobs j ON j.id = m.job_id
           WHERE m.project_id = $1 AND ($2::text IS NULL OR m.id = $2) AND m.deleted_at IS NULL
           ORDER BY m.created_at DESC, m.id DESC"#,
        project_id,
        id
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// List the models
///
/// Every model of the project, newest first, unready ones included (see `state`).
#[utoipa::path(get, path = "/v1/models", operation_id = "list_models", tag = "models", responses((status = 200, body = ModelList)))]
async fn list_models(State(state): State<AppState>, project: Project) -> Result<Json<ModelList>, ApiError> {
    let rows = rows(&state.db, &project.project_id, None).await?;
    Ok(Json(ModelList { object: "list", data: rows.into_iter().map(Into::into).collect(), has_more: false }))
}

/// Get a model
///
/// Or a checkpoint of one, by its name (`…:ckpt-step-N`); its other fields are its model's.
#[utoipa::path(
    get, path = "/v1/models/{model}", operation_id = "get_model", tag = "models",
    params(("model" = String, Path, description = "The model's id")),
    responses((status = 200, body = ModelObject), (status = 404, description = "No such model"))
)]
async fn get_model(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<ModelObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let checkpoint = checkpoints::find_named(&mut conn, &id).await?;
    drop(conn);
    let model = checkpoint.as_ref().map_or(&id, |checkpoint| &checkpoint.model_id);
    let row = rows(&state.db, &project.project_id, Some(model)).await?.pop();
    let mut found: ModelObject = row.ok_or_else(|| ApiError::not_found("model", &id).with_code("model_not_found"))?.into();
    if let Some(checkpoint) = checkpoint {
        found = ModelObject {
            id,
            created: checkpoint.created_at.unix_timestamp(),
            state: "ready".into(),
            error: None,
            weights_sha256: None,
            ..found
        };
    }
    Ok(Json(found))
}

/// Delete a model
///
/// Its row stays as a tombstone for lineage, its weights go, and streams that it serves end with an error event.
#[utoipa::path(
    delete, path = "/v1/models/{model}", operation_id = "delete_model", tag = "models",
    params(("model" = String, Path, description = "The model's id")),
    responses(
        (status = 200, body = ModelDeleted),
        (status = 404, description = "No such model"),
        (status = 409, description = "Something unfinished needs it; the message names what"),
    )
)]
async fn delete_model(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<ModelDeleted>, ApiError> {
    let mut transaction = state.db.begin().await?;
    let row = sqlx::query!(
        "SELECT artifact FROM models WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL FOR UPDATE",
        id,
        project.project_id
    )
    .fetch_optional(&mut *transaction)
    .await?
    .ok_or_else(|| ApiError::not_found("model", &id).with_code("model_not_found"))?;
    let users = sqlx::query_scalar!(
        "SELECT id FROM jobs WHERE (model_id = $1 OR base_model_id = $1 OR starts_with(base_model_id, $1 || ':ckpt-step-'))
           AND finished_at IS NULL ORDER BY created_at LIMIT 5",
        id
    )
    .fetch_all(&mut *transaction)
    .await?;
    if !users.is_empty() {
        let message = format!("The model '{id}' is needed by unfinished jobs: {}. Cancel them first.", users.join(", "));
        return Err(ApiError::conflict(message).with_code("in_use"));
    }
    sqlx::query!("UPDATE models SET deleted_at = now(), artifact = NULL WHERE id = $1", id).execute(&mut *transaction).await?;
    let replicas = sqlx::query_scalar!(
        "UPDATE replicas SET state = CASE WHEN state = 'queued' THEN 'stopped' ELSE 'stopping' END,
             stopped_at = CASE WHEN state = 'queued' THEN now() END
         WHERE model_id = $1 AND state IN ('queued', 'starting', 'ready') RETURNING id",
        id
    )
    .fetch_all(&mut *transaction)
    .await?;
    for replica in replicas {
        sqlx::query!("SELECT pg_notify('lathe_replicas', $1)", replica).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    if let Some(artifact) = row.artifact {
        let artifacts = state.artifacts.clone();
        tokio::task::spawn_blocking(move || artifacts.remove(&artifact))
            .await
            .map_err(ApiError::internal)?
            .map_err(ApiError::internal)?;
    }
    Ok(Json(ModelDeleted { id, object: "model", deleted: true }))
}
