//! `/v1/datasets`: rows made from files or by rule. Making one is a job; its row is there at once.
//! What is inside a dataset is in [`contents`].

pub mod contents;
mod source;

use axum::{Json, extract::State, http::StatusCode};
use lathe_jobs::{
    audit::{self, Deed},
    ids,
    queue::{self, NewJob},
    spec::{DatasetSource, Spec},
    state::ResourceState,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Project,
    idempotency::Creation,
    made::{delete_made, find_usable, list_made},
    metadata::Metadata,
    page::List,
    parse::{Body, Path, Query},
    problem::ApiError,
    resource::{self, Deleted, FailureDetail, ListQuery, StateName},
    state::AppState,
};

pub use source::SourceBody;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(create_dataset, list_datasets)).routes(routes!(get_dataset, delete_dataset))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(examples(
    json!({"name": "sums", "source": {"type": "template", "rows": 5000, "seed": 7, "templates": [
        {"instruction": "What is {{ a }} plus {{ b }}?", "output": "{{ a + b }}", "variables": {"a": {"range": [0, 99]}, "b": {"range": [0, 99]}}}]}}),
    json!({"name": "notes", "source": {"type": "files", "files": ["file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N"], "format": "auto",
        "columns": {"instruction": "q", "output": "a"}, "documents": "file", "on_bad_row": "reject"}})
))]
pub struct CreateDataset {
    #[schema(min_length = 1, max_length = 256)]
    name: String,
    source: SourceBody,
    metadata: Option<Metadata>,
}

/// A dataset.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "dataset", "name": "sums", "state": "ready", "job": "job_01J9ZQ4M7K3T5W8X2Y6C0V1B4N",
    "source": {"type": "template", "rows": 5000, "seed": 7, "exclude": [], "templates": [{"instruction": "Double {{ a }}.", "output": "{{ a * 2 }}", "variables": {"a": {"range": [0, 9999]}}}]},
    "rows": 5000, "statistics": {"rows": 5000, "conversations": 5000, "duplicates": 0, "bytes": 101230, "characters": 101230, "bad_rows": 0},
    "error": null, "metadata": {"owner": "speech"}, "created_at": 1767225600}))]
pub struct DatasetObject {
    #[schema(examples("ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N"))]
    id: String,
    #[schema(examples("dataset"))]
    object: &'static str,
    name: String,
    state: StateName,
    /// The job that makes it.
    job: String,
    /// As asked for, with defaults.
    #[schema(value_type = Object)]
    source: Value,
    /// Known once it is ready.
    rows: Option<u64>,
    statistics: Option<DatasetStatistics>,
    error: Option<FailureDetail>,
    metadata: Metadata,
    /// Unix seconds.
    created_at: i64,
}

/// What is in a dataset.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct DatasetStatistics {
    rows: u64,
    /// Rows that are conversations; the others are texts.
    conversations: u64,
    /// Rows that repeat an earlier one to the letter.
    duplicates: u64,
    /// Of the text, as UTF-8.
    bytes: u64,
    characters: u64,
    /// Rows that were skipped.
    bad_rows: u64,
}

pub(super) struct DatasetRow {
    id: String,
    name: String,
    state: ResourceState,
    job_id: String,
    source: Value,
    artifact: Option<String>,
    statistics: Option<Value>,
    error: Option<Value>,
    metadata: Value,
    created_at: OffsetDateTime,
}

impl DatasetRow {
    fn statistics(&self) -> Option<DatasetStatistics> {
        self.statistics.clone().and_then(|statistics| serde_json::from_value(statistics).ok())
    }
}

impl From<DatasetRow> for DatasetObject {
    fn from(row: DatasetRow) -> DatasetObject {
        let statistics = row.statistics();
        DatasetObject {
            id: row.id,
            object: "dataset",
            name: row.name,
            state: row.state.into(),
            job: row.job_id,
            source: row.source,
            rows: statistics.as_ref().map(|statistics| statistics.rows),
            statistics,
            error: FailureDetail::from_column(row.error),
            metadata: Metadata::from_row(row.metadata),
            created_at: resource::seconds(row.created_at),
        }
    }
}

/// `query_as!` of datasets that are not deleted; `$tail` goes on with `AND …`.
macro_rules! select_datasets {
    ($tail:literal $(+ $more:literal)* $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            DatasetRow,
            r#"SELECT id, name, state AS "state: ResourceState", job_id, source, artifact, statistics, error, metadata, created_at
               FROM datasets WHERE deleted_at IS NULL "# + $tail $(+ $more)*
            $(, $argument)*
        )
    };
}

pub(super) async fn find(conn: &mut PgConnection, project_id: &str, id: &str) -> Result<DatasetRow, ApiError> {
    select_datasets!("AND id = $1 AND project_id = $2", id, project_id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| ApiError::not_found("dataset", id))
}

/// Create a dataset
///
/// A job makes it from files or by rule; `state` says how far it is.
#[utoipa::path(
    post, path = "/v1/datasets", operation_id = "create_dataset", tag = "datasets", request_body = CreateDataset,
    responses(
        (status = 201, description = "The dataset, queued", body = DatasetObject),
        (status = 404, description = "A file or dataset that `source` names is unknown"),
        (status = 409, description = "A dataset that `source` names has failed"),
        (status = 422, description = "Fields contradict one another"),
    )
)]
async fn create_dataset(
    State(state): State<AppState>,
    project: Project,
    creation: Creation,
    Body(body): Body<CreateDataset>,
) -> Result<(StatusCode, Json<DatasetObject>), ApiError> {
    let source = body.source.resolve()?;
    let new = NewDataset { name: &body.name, source, metadata: body.metadata.unwrap_or_default(), implicit: false };
    let mut conn = state.db.acquire().await?;
    let mut tx = conn.begin().await?;
    resource::require_storage(&mut tx, &project.project_id, 1).await?;
    let id = new.insert(&mut tx, &project.project_id).await?;
    let row = find(&mut tx, &project.project_id, &id).await?;
    let dataset = DatasetObject::from(row);
    audit::record(&mut tx, project.did(Deed::DatasetCreated, &id)).await?;
    creation.commit(&state.db, tx, StatusCode::CREATED, &dataset).await?;
    Ok((StatusCode::CREATED, Json(dataset)))
}

/// A dataset to make, with the job that makes it.
pub(super) struct NewDataset<'a> {
    pub name: &'a str,
    pub source: DatasetSource,
    pub metadata: Metadata,
    /// Made for a fine-tuning job's file.
    pub implicit: bool,
}

impl NewDataset<'_> {
    /// Checks the ids of the source, then adds the rows; returns the dataset's id.
    pub async fn insert(self, conn: &mut PgConnection, project_id: &str) -> Result<String, ApiError> {
        let (files, needs) = match &self.source {
            DatasetSource::Files { files, .. } => {
                find_files(conn, project_id, files).await?;
                (files.clone(), Vec::new())
            }
            DatasetSource::Template { exclude, .. } => (Vec::new(), find_excluded(conn, project_id, exclude).await?),
        };
        let id = ids::new("ds");
        let source = serde_json::to_value(&self.source).map_err(ApiError::internal)?;
        let metadata = self.metadata.to_row();
        let job = NewJob {
            dataset_id: Some(id.clone()),
            needs,
            ..resource::light_job(project_id, Some(self.name), Spec::Ingest { source: self.source })
        };
        let job_id = job.id.clone();
        queue::enqueue(conn, job).await.map_err(resource::not_enqueued)?;
        sqlx::query!(
            "INSERT INTO datasets (id, project_id, name, state, job_id, source, implicit, metadata) VALUES ($1, $2, $3, 'queued', $4, $5, $6, $7)",
            id,
            project_id,
            self.name,
            job_id,
            source,
            self.implicit,
            metadata,
        )
        .execute(&mut *conn)
        .await?;
        sqlx::query!(
            "INSERT INTO dataset_files (dataset_id, position, file_id)
             SELECT $1, (position - 1)::integer, file_id FROM unnest($2::text[]) WITH ORDINALITY AS named (file_id, position)",
            id,
            &files,
        )
        .execute(&mut *conn)
        .await?;
        Ok(id)
    }
}

/// Locks the named files against deletion until the transaction ends.
async fn find_files(conn: &mut PgConnection, project_id: &str, files: &[String]) -> Result<(), ApiError> {
    let found = sqlx::query_scalar!(
        "SELECT id FROM files
         WHERE id = ANY($1) AND project_id = $2 AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now()) FOR KEY SHARE",
        files,
        project_id,
    )
    .fetch_all(conn)
    .await?;
    match files.iter().position(|file| !found.contains(file)) {
        Some(index) => Err(resource::unknown("file", &files[index], &format!("source.files[{index}]"))),
        None => Ok(()),
    }
}

/// The jobs that make the excluded datasets.
async fn find_excluded(conn: &mut PgConnection, project_id: &str, exclude: &[String]) -> Result<Vec<String>, ApiError> {
    let mut needs = Vec::new();
    for (index, id) in exclude.iter().enumerate() {
        needs.extend(find_usable(conn, project_id, id, &format!("source.exclude[{index}]")).await?);
    }
    Ok(needs)
}

/// The job to wait for before a dataset can be read, if it is not ready.
pub(super) async fn find_usable(
    conn: &mut PgConnection,
    project_id: &str,
    id: &str,
    param: &str,
) -> Result<Option<String>, ApiError> {
    find_usable!("dataset" in "datasets", conn, project_id, id, param)
}

/// List datasets
#[utoipa::path(get, path = "/v1/datasets", operation_id = "list_datasets", tag = "datasets", params(ListQuery), responses((status = 200, description = "A page", body = List<DatasetObject>)))]
async fn list_datasets(
    State(state): State<AppState>,
    project: Project,
    Query(query): Query<ListQuery>,
) -> Result<Json<List<DatasetObject>>, ApiError> {
    list_made!(select_datasets in "datasets" as DatasetObject, &state, project.project_id, query, 20)
}

/// Retrieve a dataset
#[utoipa::path(
    get, path = "/v1/datasets/{dataset_id}", operation_id = "get_dataset", tag = "datasets", params(("dataset_id" = String, Path)),
    responses((status = 200, description = "The dataset", body = DatasetObject))
)]
async fn get_dataset(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<DatasetObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    Ok(Json(find(&mut conn, &project.project_id, &id).await?.into()))
}

/// Delete a dataset
///
/// Refused while unfinished work needs it. One that is still being made is no longer made. Its id
/// stays in the lineage of what was made of it.
#[utoipa::path(
    delete, path = "/v1/datasets/{dataset_id}", operation_id = "delete_dataset", tag = "datasets", params(("dataset_id" = String, Path)),
    responses((status = 200, description = "Deleted", body = Deleted), (status = 409, description = "Unfinished work needs it; the message names it"))
)]
async fn delete_dataset(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    delete_made!(
        "dataset" in "datasets",
        Deed::DatasetDeleted,
        &state,
        project,
        id,
        "SELECT id FROM jobs
         WHERE finished_at IS NULL AND id <> $2
           AND (dataset_id = $1 OR validation_dataset_id = $1 OR spec #> '{source,exclude}' @> to_jsonb($1::text))
         ORDER BY created_at LIMIT 10"
    )
}
