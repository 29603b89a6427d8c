//! `/v1/projects` and their keys. Admin keys only.

use axum::{Json, extract::State, http::StatusCode};
use lathe_jobs::{
    audit::{self, Deed, Entry},
    ids,
    quota::{self, Quotas},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::{self, Admin, Scope},
    idempotency::Creation,
    metadata::Metadata,
    page::{List, Order, Page, fetch_page},
    parse::{Body, OptionalBody, Path, Query},
    problem::ApiError,
    resource::Deleted,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_project, list_projects))
        .routes(routes!(get_project, update_project))
        .routes(routes!(get_project_usage))
        .routes(routes!(create_key, list_keys))
        .routes(routes!(delete_key))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "research", "metadata": {"team": "nlp"}, "quotas": {"storage_bytes": 1099511627776_i64}}))]
pub struct CreateProject {
    #[schema(min_length = 1, max_length = 64)]
    name: String,
    metadata: Option<Metadata>,
    /// None: no limits.
    quotas: Option<ProjectQuotas>,
}

/// What a project may take; null: as much as there is.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"storage_bytes": 1099511627776_i64, "running_jobs": 2}))]
pub struct ProjectQuotas {
    /// Bytes of files, uploads, datasets, tokenizers, models and checkpoints together. What would exceed them is refused
    /// with a 507; what a job makes in the end counts, but is not cut off.
    #[schema(minimum = 0, maximum = 9223372036854775807_i64)]
    #[serde(default)]
    storage_bytes: Option<i64>,
    /// Jobs of any kind that run at a time. Others wait in the queue, and say so in `waiting_for`.
    #[schema(minimum = 0, maximum = 2147483647)]
    #[serde(default)]
    running_jobs: Option<i32>,
}

impl ProjectQuotas {
    fn quotas(&self) -> Quotas {
        Quotas { storage_bytes: self.storage_bytes, running_jobs: self.running_jobs }
    }
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "proj_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "project", "name": "research", "metadata": {"team": "nlp"}, "quotas": {"storage_bytes": null, "running_jobs": 2}, "created_at": 1767225600}))]
pub struct ProjectObject {
    #[schema(examples("proj_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    id: String,
    #[schema(examples("project"))]
    object: &'static str,
    name: String,
    metadata: Metadata,
    quotas: ProjectQuotas,
    /// Unix seconds.
    created_at: i64,
}

struct ProjectRow {
    id: String,
    name: String,
    metadata: Value,
    storage_quota_bytes: Option<i64>,
    running_jobs_quota: Option<i32>,
    created_at: OffsetDateTime,
}

impl From<ProjectRow> for ProjectObject {
    fn from(row: ProjectRow) -> ProjectObject {
        ProjectObject {
            id: row.id,
            object: "project",
            name: row.name,
            metadata: Metadata::from_row(row.metadata),
            quotas: ProjectQuotas { storage_bytes: row.storage_quota_bytes, running_jobs: row.running_jobs_quota },
            created_at: row.created_at.unix_timestamp(),
        }
    }
}

/// Create a project
#[utoipa::path(
    post, path = "/v1/projects", operation_id = "create_project", tag = "projects", request_body = CreateProject,
    responses((status = 200, description = "The project", body = ProjectObject), (status = 409, description = "The name is taken"))
)]
async fn create_project(
    State(state): State<AppState>,
    Admin(caller): Admin,
    creation: Creation,
    Body(request): Body<CreateProject>,
) -> Result<Json<ProjectObject>, ApiError> {
    let quotas = request.quotas.unwrap_or_default();
    let mut tx = state.db.begin().await?;
    let row = sqlx::query_as!(
        ProjectRow,
        "INSERT INTO projects (id, name, metadata, storage_quota_bytes, running_jobs_quota) VALUES ($1, $2, $3, $4, $5)
         RETURNING id, name, metadata, storage_quota_bytes, running_jobs_quota, created_at",
        ids::new("proj"),
        request.name,
        request.metadata.unwrap_or_default().to_row(),
        quotas.storage_bytes,
        quotas.running_jobs,
    )
    .fetch_one(&mut *tx)
    .await?;
    let project = ProjectObject::from(row);
    audit::record(&mut tx, Entry { project_id: &project.id, ..caller.did(Deed::ProjectCreated, &project.id) }).await?;
    creation.commit(&state.db, tx, StatusCode::OK, &project).await?;
    Ok(Json(project))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListProjects {
    /// The id of the last item of the page before.
    #[param(min_length = 1)]
    after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    /// Only the project of this name.
    name: Option<String>,
}

/// List projects
#[utoipa::path(get, path = "/v1/projects", operation_id = "list_projects", tag = "projects", params(ListProjects), responses((status = 200, description = "A page", body = List<ProjectObject>)))]
async fn list_projects(
    State(state): State<AppState>,
    _: Admin,
    Query(query): Query<ListProjects>,
) -> Result<Json<List<ProjectObject>>, ApiError> {
    let page = Page::asked(query.limit.unwrap_or(20), query.order, query.after, async |id| {
        sqlx::query_scalar!("SELECT created_at FROM projects WHERE id = $1", id).fetch_optional(&state.db).await
    })
    .await?;
    let rows = fetch_page!(
        ProjectRow,
        &state.db,
        &page,
        "SELECT id, name, metadata, storage_quota_bytes, running_jobs_quota, created_at FROM projects WHERE ($4::text IS NULL OR name = $4)",
        query.name,
    )?;
    let projects = rows.into_iter().map(ProjectObject::from);
    Ok(Json(List::of(projects.collect(), &page, |project| &project.id)))
}

/// Retrieve a project
#[utoipa::path(
    get, path = "/v1/projects/{project_id}", operation_id = "get_project", tag = "projects", params(("project_id" = String, Path)),
    responses((status = 200, description = "The project", body = ProjectObject))
)]
async fn get_project(State(state): State<AppState>, _: Admin, Path(id): Path<String>) -> Result<Json<ProjectObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    find(&mut conn, &id).await.map(Json)
}

async fn find(conn: &mut PgConnection, id: &str) -> Result<ProjectObject, ApiError> {
    let row = sqlx::query_as!(
        ProjectRow,
        "SELECT id, name, metadata, storage_quota_bytes, running_jobs_quota, created_at FROM projects WHERE id = $1",
        id
    )
    .fetch_optional(conn)
    .await?;
    row.map(ProjectObject::from).ok_or_else(|| ApiError::no_project(id))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"quotas": {"storage_bytes": 1099511627776_i64, "running_jobs": 2}}))]
pub struct UpdateProject {
    /// All of them: one that is missing in it is lifted.
    quotas: ProjectQuotas,
}

/// Set a project's quotas
///
/// They hold from now on: what is stored stays, and jobs that run go on.
#[utoipa::path(
    post, path = "/v1/projects/{project_id}", operation_id = "update_project", tag = "projects", request_body = UpdateProject,
    params(("project_id" = String, Path)), responses((status = 200, description = "The project", body = ProjectObject))
)]
async fn update_project(
    State(state): State<AppState>,
    Admin(caller): Admin,
    Path(id): Path<String>,
    Body(request): Body<UpdateProject>,
) -> Result<Json<ProjectObject>, ApiError> {
    let mut tx = state.db.begin().await?;
    let changed = quota::set(&mut tx, &id, request.quotas.quotas()).await?.ok_or_else(|| ApiError::no_project(&id))?;
    if changed {
        audit::record(&mut tx, Entry { project_id: &id, ..caller.did(Deed::QuotasChanged, &id) }).await?;
    }
    let project = find(&mut tx, &id).await?;
    tx.commit().await?;
    Ok(Json(project))
}

/// What a project takes. Deleted things do not count; a pending upload counts with the bytes that it was begun for.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "project.usage", "project_id": "proj_default", "running_jobs": 1, "storage_bytes": 1300,
    "files": 1000, "uploads": 0, "datasets": 300, "tokenizers": 0, "models": 0, "checkpoints": 0}))]
pub struct UsageObject {
    #[schema(examples("project.usage"))]
    object: &'static str,
    project_id: String,
    running_jobs: i64,
    /// Of all that follow together.
    storage_bytes: i64,
    /// Bytes.
    files: i64,
    uploads: i64,
    datasets: i64,
    tokenizers: i64,
    models: i64,
    checkpoints: i64,
}

/// Retrieve what a project takes
#[utoipa::path(
    get, path = "/v1/projects/{project_id}/usage", operation_id = "get_project_usage", tag = "projects", params(("project_id" = String, Path)),
    responses((status = 200, description = "Bytes and running jobs", body = UsageObject))
)]
async fn get_project_usage(
    State(state): State<AppState>,
    _: Admin,
    Path(project_id): Path<String>,
) -> Result<Json<UsageObject>, ApiError> {
    require_project(&state.db, &project_id).await?;
    let usage = quota::usage(&mut *state.db.acquire().await?, &project_id).await?;
    Ok(Json(UsageObject {
        object: "project.usage",
        project_id,
        running_jobs: usage.running_jobs,
        storage_bytes: usage.storage_bytes(),
        files: usage.files,
        uploads: usage.uploads,
        datasets: usage.datasets,
        tokenizers: usage.tokenizers,
        models: usage.models,
        checkpoints: usage.checkpoints,
    }))
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "ci", "scope": "project"}))]
pub struct CreateKey {
    #[schema(min_length = 1, max_length = 64)]
    name: Option<String>,
    /// `project` if absent.
    scope: Option<Scope>,
    metadata: Option<Metadata>,
}

/// A key without its secret.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "key_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "project.key", "name": "ci", "scope": "project", "hint": "x7Qa", "created_at": 1767225600, "revoked_at": null, "metadata": {}}))]
pub struct KeyObject {
    #[schema(examples("key_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    id: String,
    #[schema(examples("project.key"))]
    object: &'static str,
    name: Option<String>,
    #[schema(value_type = Scope)]
    scope: String,
    /// The secret's last four characters.
    hint: String,
    /// Unix seconds.
    created_at: i64,
    revoked_at: Option<i64>,
    metadata: Metadata,
    /// The secret, in the answer that makes the key and never again.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

struct KeyRow {
    id: String,
    name: Option<String>,
    scope: String,
    hint: String,
    metadata: Value,
    created_at: OffsetDateTime,
    revoked_at: Option<OffsetDateTime>,
}

impl From<KeyRow> for KeyObject {
    fn from(row: KeyRow) -> KeyObject {
        KeyObject {
            id: row.id,
            object: "project.key",
            name: row.name,
            scope: row.scope,
            hint: row.hint,
            created_at: row.created_at.unix_timestamp(),
            revoked_at: row.revoked_at.map(OffsetDateTime::unix_timestamp),
            metadata: Metadata::from_row(row.metadata),
            key: None,
        }
    }
}

/// Create a key
///
/// The answer is the only one that holds the secret, `key`.
#[utoipa::path(
    post, path = "/v1/projects/{project_id}/keys", operation_id = "create_key", tag = "projects", request_body = Option<CreateKey>,
    params(("project_id" = String, Path)),
    responses((status = 200, description = "The key with its secret", body = KeyObject))
)]
async fn create_key(
    State(state): State<AppState>,
    Admin(caller): Admin,
    Path(project): Path<String>,
    OptionalBody(request): OptionalBody<CreateKey>,
) -> Result<Json<KeyObject>, ApiError> {
    require_project(&state.db, &project).await?;
    let scope = request.scope.unwrap_or(Scope::Project);
    let mut tx = state.db.begin().await?;
    let made = auth::create_key(&mut tx, &project, request.name.as_deref(), scope).await?;
    let row = sqlx::query_as!(
        KeyRow,
        "UPDATE api_keys SET metadata = $2 WHERE id = $1 RETURNING id, name, scope, hint, metadata, created_at, revoked_at",
        made.id,
        request.metadata.unwrap_or_default().to_row(),
    )
    .fetch_one(&mut *tx)
    .await?;
    audit::record(&mut tx, Entry { project_id: &project, ..caller.did(Deed::KeyCreated, &made.id) }).await?;
    tx.commit().await?;
    Ok(Json(KeyObject { key: Some(made.secret), ..row.into() }))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListKeys {
    /// The id of the last item of the page before.
    #[param(min_length = 1)]
    after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    /// Only those in this state.
    #[param(inline)]
    state: Option<KeyState>,
    /// Only those of this name.
    name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum KeyState {
    Active,
    Revoked,
}

impl KeyState {
    fn as_str(self) -> &'static str {
        match self {
            KeyState::Active => "active",
            KeyState::Revoked => "revoked",
        }
    }
}

/// List keys, revoked ones too
#[utoipa::path(
    get, path = "/v1/projects/{project_id}/keys", operation_id = "list_keys", tag = "projects",
    params(("project_id" = String, Path), ListKeys),
    responses((status = 200, description = "A page", body = List<KeyObject>))
)]
async fn list_keys(
    State(state): State<AppState>,
    _: Admin,
    Path(project): Path<String>,
    Query(query): Query<ListKeys>,
) -> Result<Json<List<KeyObject>>, ApiError> {
    require_project(&state.db, &project).await?;
    let page = Page::asked(query.limit.unwrap_or(20), query.order, query.after, async |id| {
        sqlx::query_scalar!("SELECT created_at FROM api_keys WHERE id = $1 AND project_id = $2", id, project)
            .fetch_optional(&state.db)
            .await
    })
    .await?;
    let rows = fetch_page!(
        KeyRow,
        &state.db,
        &page,
        "SELECT id, name, scope, hint, metadata, created_at, revoked_at FROM api_keys
         WHERE project_id = $4 AND ($5::text IS NULL OR name = $5) AND ($6::text IS NULL OR ($6 = 'revoked') = (revoked_at IS NOT NULL))",
        project,
        query.name,
        query.state.map(KeyState::as_str),
    )?;
    let keys = rows.into_iter().map(KeyObject::from);
    Ok(Json(List::of(keys.collect(), &page, |key| &key.id)))
}

/// Revoke a key
///
/// It stops working within two seconds. Revoking twice is revoking.
#[utoipa::path(
    delete, path = "/v1/projects/{project_id}/keys/{key_id}", operation_id = "delete_key", tag = "projects",
    params(("project_id" = String, Path), ("key_id" = String, Path)),
    responses((status = 200, description = "Revoked", body = Deleted))
)]
async fn delete_key(
    State(state): State<AppState>,
    Admin(caller): Admin,
    Path((project, key)): Path<(String, String)>,
) -> Result<Json<Deleted>, ApiError> {
    let mut tx = state.db.begin().await?;
    let found = sqlx::query!(
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = $1 AND project_id = $2",
        key,
        project
    )
    .execute(&mut *tx)
    .await?;
    if found.rows_affected() == 0 {
        return Err(ApiError::not_found("key", &key));
    }
    audit::record(&mut tx, Entry { project_id: &project, ..caller.did(Deed::KeyRevoked, &key) }).await?;
    tx.commit().await?;
    state.keys.forget(&key);
    Ok(Json(Deleted { id: key, object: "project.key.deleted", deleted: true }))
}

async fn require_project(db: &PgPool, id: &str) -> Result<(), ApiError> {
    let found = sqlx::query_scalar!("SELECT id FROM projects WHERE id = $1", id).fetch_optional(db).await?;
    found.map(drop).ok_or_else(|| ApiError::no_project(id))
}
