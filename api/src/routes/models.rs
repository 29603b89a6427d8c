//! `/v1/models`: the registry, in OpenAI's shape with Lathe's lineage beside it.

use axum::{Json, extract::State, http::StatusCode};
use lathe_jobs::{
    audit::{self, Deed},
    checkpoints::{self, NamedCheckpoint},
    state::ResourceState,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgPool;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Project,
    made::list_made,
    metadata::Metadata,
    page::{List, Order},
    parse::{Path, Query},
    problem::ApiError,
    resource::{self, Deleted, FailureDetail, StateName},
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_models)).routes(routes!(get_model, delete_model))
}

/// A model and where it came from.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"id": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "model", "created": 1767225600, "owned_by": "proj_default", "name": "small",
    "state": "ready", "error": null, "parameters": 926720, "weights_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "template": null, "config": {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64, "vocabulary": 1024},
    "lineage": {"job": "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "base_model": null, "dataset": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "tokenizer": "tok_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "added_roles": [], "code_version": "0.1.0",
        "hyperparameters": {"steps": 2000, "batch_size": 12, "seed": 1}}, "metadata": {}}))]
pub struct ModelObject {
    pub id: String,
    #[schema(example = "model")]
    pub object: &'static str,
    pub created: i64,
    /// The project's id.
    pub owned_by: String,
    pub name: String,
    pub state: StateName,
    pub error: Option<FailureDetail>,
    /// Count of the trained numbers, padding and shared tables counted once.
    pub parameters: Option<i64>,
    /// Over the tensors in the order of their names.
    pub weights_sha256: Option<String>,
    /// The chat template that it was trained with.
    pub template: Option<String>,
    /// The resolved shape.
    #[schema(value_type = Object)]
    pub config: Value,
    pub lineage: Lineage,
    pub metadata: Metadata,
}

/// What made the model. Ids stay when what they name is deleted.
#[derive(Serialize, ToSchema)]
pub struct Lineage {
    pub job: String,
    pub base_model: Option<String>,
    pub dataset: Option<String>,
    pub tokenizer: Option<String>,
    /// Roles that an uploaded tokenizer lacked and gained: so many rows of the embedding are not of its
    /// own vocabulary.
    pub added_roles: Vec<String>,
    pub code_version: String,
    /// As the job resolved them.
    pub hyperparameters: Option<Value>,
}

struct Row {
    id: String,
    project_id: String,
    name: String,
    state: ResourceState,
    error: Option<Value>,
    parameters: Option<i64>,
    weights_sha256: Option<String>,
    template: Option<String>,
    config: Value,
    job_id: String,
    base_model_id: Option<String>,
    dataset_id: Option<String>,
    tokenizer_id: Option<String>,
    added_roles: Vec<String>,
    code_version: String,
    hyperparameters: Option<Value>,
    metadata: Value,
    created_at: OffsetDateTime,
}

impl From<Row> for ModelObject {
    fn from(row: Row) -> ModelObject {
        ModelObject {
            id: row.id,
            object: "model",
            created: resource::seconds(row.created_at),
            owned_by: row.project_id,
            name: row.name,
            state: row.state.into(),
            error: FailureDetail::from_column(row.error),
            parameters: row.parameters,
            weights_sha256: row.weights_sha256,
            template: row.template,
            config: row.config,
            lineage: Lineage {
                job: row.job_id,
                base_model: row.base_model_id,
                dataset: row.dataset_id,
                tokenizer: row.tokenizer_id,
                added_roles: row.added_roles,
                code_version: row.code_version,
                hyperparameters: row.hyperparameters,
            },
            metadata: Metadata::from_row(row.metadata),
        }
    }
}

/// `query_as!` of models that are not deleted; `$tail` goes on with `AND …`.
macro_rules! select_models {
    ($tail:literal $(+ $more:literal)* $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"SELECT id, project_id, name, state AS "state: ResourceState", error, parameters, weights_sha256, template, config,
                      job_id, base_model_id, dataset_id, tokenizer_id,
                      coalesce((SELECT added_roles FROM tokenizers t WHERE t.id = models.tokenizer_id), '{}') AS "added_roles!", code_version,
                      (SELECT j.spec -> 'train' FROM jobs j WHERE j.id = models.job_id) AS hyperparameters, metadata, created_at
               FROM models WHERE deleted_at IS NULL "# + $tail $(+ $more)*
            $(, $argument)*
        )
    };
}

async fn find(db: &PgPool, project_id: &str, id: &str) -> Result<Row, ApiError> {
    select_models!("AND id = $1 AND project_id = $2", id, project_id).fetch_optional(db).await?.ok_or_else(|| no_model(id))
}

fn no_model(id: &str) -> ApiError {
    ApiError::not_found("model", id).with_code("model_not_found")
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListModels {
    /// Id of the last item of the page before.
    #[param(min_length = 1)]
    after: Option<String>,
    /// All of them, for all that OpenAI's SDKs can see: they do not page through models.
    #[param(minimum = 1, maximum = 10000, default = 10000)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    /// Only those in this state.
    #[param(inline)]
    state: Option<StateName>,
    /// Only those of this name.
    name: Option<String>,
}

/// List models
///
/// Every model of the project, unready ones included (see `state`).
#[utoipa::path(get, path = "/v1/models", operation_id = "list_models", tag = "models", params(ListModels), responses((status = 200, description = "A page", body = List<ModelObject>)))]
async fn list_models(
    State(state): State<AppState>,
    project: Project,
    Query(query): Query<ListModels>,
) -> Result<Json<List<ModelObject>>, ApiError> {
    list_made!(select_models in "models" as ModelObject, &state, project.project_id, query, 10_000)
}

/// The model of that id, or that of the checkpoint of that name.
async fn find_model(state: &AppState, project_id: &str, id: &str) -> Result<(Row, Option<NamedCheckpoint>), ApiError> {
    let mut conn = state.db.acquire().await?;
    let checkpoint = checkpoints::find_named(&mut conn, id).await?;
    drop(conn);
    let model = checkpoint.as_ref().map_or(id, |checkpoint| &checkpoint.model_id);
    let row = find(&state.db, project_id, model).await.map_err(|error| match error.status {
        StatusCode::NOT_FOUND => no_model(id),
        _ => error,
    })?;
    Ok((row, checkpoint))
}

/// Get a model
///
/// Or a checkpoint of one, by its name (`…:ckpt-step-N`); its other fields are its model's.
#[utoipa::path(
    get, path = "/v1/models/{model}", operation_id = "get_model", tag = "models",
    params(("model" = String, Path, description = "The model's id")),
    responses((status = 200, description = "The model", body = ModelObject), (status = 404, description = "No such model"))
)]
async fn get_model(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<ModelObject>, ApiError> {
    let (row, checkpoint) = find_model(&state, &project.project_id, &id).await?;
    let mut found: ModelObject = row.into();
    if let Some(checkpoint) = checkpoint {
        found = ModelObject {
            id,
            created: checkpoint.created_at.unix_timestamp(),
            state: ResourceState::Ready.into(),
            error: None,
            weights_sha256: None,
            ..found
        };
    }
    Ok(Json(found))
}

/// Why there is no model to delete: a checkpoint has a model's name and goes in other ways.
async fn not_deletable(state: &AppState, project_id: &str, id: &str) -> ApiError {
    match find_model(state, project_id, id).await {
        Ok((_, Some(_))) => {
            let message = format!("`{id}` is a checkpoint: it goes with its job, or as the job's `keep_checkpoints` says.");
            ApiError::conflict(message).with_code("checkpoint")
        }
        Ok((_, None)) => no_model(id),
        Err(error) => error,
    }
}

/// Delete a model
///
/// Its row stays as a tombstone for lineage, its weights go, and streams that it serves end with an error event.
#[utoipa::path(
    delete, path = "/v1/models/{model}", operation_id = "delete_model", tag = "models",
    params(("model" = String, Path, description = "The model's id")),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 404, description = "No such model"),
        (status = 409, description = "Something unfinished needs it, which the message names; or it is a checkpoint"),
    )
)]
async fn delete_model(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    let mut transaction = state.db.begin().await?;
    let row = sqlx::query!(
        "SELECT artifact FROM models WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL FOR UPDATE",
        id,
        project.project_id
    )
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(row) = row else { return Err(not_deletable(&state, &project.project_id, &id).await) };
    let users = sqlx::query_scalar!(
        "SELECT id FROM jobs WHERE (model_id = $1 OR base_model_id = $1 OR starts_with(base_model_id, $1 || ':ckpt-step-'))
           AND finished_at IS NULL ORDER BY created_at LIMIT 5",
        id
    )
    .fetch_all(&mut *transaction)
    .await?;
    resource::refuse_users("model", &id, &users)?;
    sqlx::query!("UPDATE models SET deleted_at = now(), artifact = NULL WHERE id = $1", id).execute(&mut *transaction).await?;
    audit::record(&mut transaction, project.did(Deed::ModelDeleted, &id)).await?;
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
    resource::remove_artifacts(&state, row.artifact.into_iter().collect()).await;
    Ok(Json(Deleted { id, object: "model", deleted: true }))
}
