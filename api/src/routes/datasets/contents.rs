//! What is inside a dataset: its rows, its bad rows, its statistics.

use axum::{Json, extract::State, http::StatusCode};
use lathe_jobs::{
    queue::{self, NewJob},
    run::ingest::RowCode,
    spec::Spec,
    state::{JobState, ResourceState},
};
use lathe_model::data::rows::{Dataset, Row};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use utoipa::{
    IntoParams, ToSchema,
    openapi::{
        RefOr,
        schema::{ObjectBuilder, Schema, SchemaType, Type},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::DatasetStatistics;
use crate::{
    auth::Project,
    parse::{Path, Query},
    problem::ApiError,
    resource::{self, FailureDetail, StateName},
    routes::tokenizers,
    state::AppState,
};

/// An answer holds at least one row and stops before its text passes so many bytes.
const PREVIEW_BYTES: usize = 4 << 20;

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_dataset_rows))
        .routes(routes!(list_dataset_errors))
        .routes(routes!(get_dataset_statistics))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PreviewQuery {
    /// Index of the last row of the page before.
    #[param(minimum = 0, maximum = 9223372036854775807i64)]
    after: Option<i64>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    limit: Option<u64>,
}

impl PreviewQuery {
    fn first(&self) -> u64 {
        self.after.map_or(0, |after| after.unsigned_abs() + 1)
    }
}

/// A row: `text`, or `turns` with their `system` text if there is one.
#[derive(Debug, Serialize, ToSchema)]
pub struct RowObject {
    /// From 0.
    index: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    turns: Option<Vec<TurnObject>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TurnObject {
    instruction: String,
    input: String,
    output: String,
}

impl RowObject {
    fn new(index: u64, row: Row) -> RowObject {
        match row {
            Row::Text { text } => RowObject { index, text: Some(text), system: None, turns: None },
            Row::Conversation { system, turns } => {
                let turns = turns.into_iter().map(|turn| TurnObject {
                    instruction: turn.instruction,
                    input: turn.input,
                    output: turn.output,
                });
                RowObject { index, text: None, system, turns: Some(turns.collect()) }
            }
        }
    }
}

/// Rows in their order.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "list", "data": [{"index": 0, "turns": [{"instruction": "Double 21.", "input": "", "output": "42"}]}], "total": 5000, "has_more": true}))]
pub struct RowList {
    #[schema(examples("list"))]
    object: &'static str,
    data: Vec<RowObject>,
    /// Rows of the whole dataset.
    total: u64,
    has_more: bool,
}

/// Preview a dataset's rows
///
/// A page may hold fewer rows than asked for where they are long.
#[utoipa::path(
    get, path = "/v1/datasets/{dataset_id}/rows", operation_id = "list_dataset_rows", tag = "datasets", params(("dataset_id" = String, Path), PreviewQuery),
    responses((status = 200, description = "A page", body = RowList), (status = 409, description = "The dataset is not ready"))
)]
async fn list_dataset_rows(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<PreviewQuery>,
) -> Result<Json<RowList>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let dataset = super::find(&mut conn, &project.project_id, &id).await?;
    drop(conn);
    let (ResourceState::Ready, Some(artifact)) = (dataset.state, dataset.artifact) else {
        return Err(resource::not_ready("dataset", &id, dataset.state));
    };
    let gone = || ApiError::not_found("dataset", &id);
    let folder = state.artifacts.fetch(&artifact).await?.ok_or_else(gone)?;
    let (first, limit) = (query.first(), query.limit.unwrap_or(20));
    let read = lathe_jobs::waiting::blocking(move || preview(&folder, first, limit));
    let (total, data) = read.await.map_err(ApiError::internal)?.map_err(ApiError::internal)?;
    let has_more = data.last().is_some_and(|row| row.index + 1 < total);
    Ok(Json(RowList { object: "list", data, total, has_more }))
}

/// Rows from `first` on, at most `limit`, with the number of all rows. Blocks.
fn preview(folder: &std::path::Path, first: u64, limit: u64) -> std::io::Result<(u64, Vec<RowObject>)> {
    let mut dataset = Dataset::open(folder)?;
    let (mut rows, mut bytes) = (Vec::new(), 0);
    for index in first..first.saturating_add(limit) {
        let Some(row) = dataset.slice(index, 1)?.pop() else { break };
        bytes += row.document().len();
        if bytes > PREVIEW_BYTES && !rows.is_empty() {
            break;
        }
        rows.push(RowObject::new(index, row));
    }
    Ok((dataset.manifest.rows, rows))
}

/// A row that could not be read.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"index": 0, "file": "file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "filename": "rows.jsonl", "line": 7, "code": "missing_field", "field": "output", "message": "The field is missing.", "keys": ["q", "a"]}))]
pub struct BadRowObject {
    /// From 0.
    index: i64,
    /// The file's id.
    file: Option<String>,
    filename: Option<String>,
    /// From 1; in a JSON array or a Parquet file the number of the row.
    line: Option<i64>,
    #[schema(schema_with = row_codes)]
    code: Option<String>,
    field: Option<String>,
    message: String,
    /// The keys that the row has.
    keys: Vec<String>,
}

fn row_codes() -> impl Into<RefOr<Schema>> {
    let words = RowCode::ALL.map(|code| Some(code.as_str())).into_iter().chain([None]);
    ObjectBuilder::new()
        .schema_type(SchemaType::Array(vec![Type::String, Type::Null]))
        .enum_values(Some(words))
        .description(Some("What is wrong. Null in a dataset of an earlier version."))
}

/// Bad rows in their order.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "list", "has_more": false, "data": [
    {"index": 0, "file": "file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "filename": "rows.jsonl", "line": 7, "code": "missing_field", "field": "output", "message": "The field is missing.", "keys": ["q", "a"]}]}))]
pub struct BadRowList {
    #[schema(examples("list"))]
    object: &'static str,
    data: Vec<BadRowObject>,
    has_more: bool,
}

/// List a dataset's bad rows
///
/// With the line, the field and the keys that were found. The first 10,000 are kept.
#[utoipa::path(
    get, path = "/v1/datasets/{dataset_id}/errors", operation_id = "list_dataset_errors", tag = "datasets", params(("dataset_id" = String, Path), PreviewQuery),
    responses((status = 200, description = "A page", body = BadRowList))
)]
async fn list_dataset_errors(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<PreviewQuery>,
) -> Result<Json<BadRowList>, ApiError> {
    let mut conn = state.db.acquire().await?;
    super::find(&mut conn, &project.project_id, &id).await?;
    let limit = query.limit.unwrap_or(20) as usize;
    let mut data = sqlx::query_as!(
        BadRowObject,
        r#"SELECT n - 1 AS "index!", file, filename AS "filename?", line, code, field, message, keys
           FROM dataset_errors e LEFT JOIN files f ON f.id = e.file
           WHERE dataset_id = $1 AND n > $2 ORDER BY n LIMIT $3"#,
        id,
        i64::try_from(query.first()).unwrap_or(i64::MAX),
        limit as i64 + 1,
    )
    .fetch_all(&mut *conn)
    .await?;
    let has_more = data.len() > limit;
    data.truncate(limit);
    Ok(Json(BadRowList { object: "list", data, has_more }))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StatisticsQuery {
    /// Count the tokens under this tokenizer too.
    tokenizer: Option<String>,
}

/// What is in a dataset, with its tokens where a tokenizer was named.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "dataset.statistics", "dataset": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "tokenizer": "tok_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "state": "ready",
    "statistics": {"rows": 5000, "conversations": 5000, "duplicates": 0, "bytes": 101230, "characters": 101230, "bad_rows": 0},
    "tokens": {"tokens": 61200, "length": {"p50": 12, "p90": 14, "p99": 15, "max": 16}}, "error": null}))]
pub struct StatisticsObject {
    #[schema(examples("dataset.statistics"))]
    object: &'static str,
    dataset: String,
    tokenizer: Option<String>,
    state: StateName,
    statistics: Option<DatasetStatistics>,
    tokens: Option<TokenStatistics>,
    error: Option<FailureDetail>,
}

/// Tokens of the rows as documents.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct TokenStatistics {
    tokens: u64,
    length: LengthPercentiles,
}

/// Tokens of a row: the median, two percentiles and the longest.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct LengthPercentiles {
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
}

/// Retrieve a dataset's statistics
///
/// Tokens are counted once by a job: the answer is 202 until they are, and then 200.
#[utoipa::path(
    get, path = "/v1/datasets/{dataset_id}/statistics", operation_id = "get_dataset_statistics", tag = "datasets",
    params(("dataset_id" = String, Path), StatisticsQuery),
    responses((status = 200, description = "All there is", body = StatisticsObject), (status = 202, description = "Still being made", body = StatisticsObject),
        (status = 409, description = "The dataset or tokenizer has failed"))
)]
async fn get_dataset_statistics(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<StatisticsQuery>,
) -> Result<(StatusCode, Json<StatisticsObject>), ApiError> {
    let mut conn = state.db.acquire().await?;
    let dataset = super::find(&mut conn, &project.project_id, &id).await?;
    let mut object = StatisticsObject {
        object: "dataset.statistics",
        dataset: id,
        tokenizer: query.tokenizer,
        state: dataset.state.into(),
        statistics: dataset.statistics(),
        tokens: None,
        error: FailureDetail::from_column(dataset.error),
    };
    if let Some(tokenizer) = object.tokenizer.as_deref() {
        if object.state == StateName(ResourceState::Failed) {
            tokenizers::find(&mut conn, &project.project_id, tokenizer).await.map_err(|error| error.with_param("tokenizer"))?;
            return Ok((StatusCode::OK, Json(object)));
        }
        let counted = count_tokens(&mut conn, &project.project_id, &object.dataset, tokenizer).await?;
        object.state = counted.state.into();
        object.tokens = counted.statistics.and_then(|statistics| serde_json::from_value(statistics).ok());
        object.error = counted.error;
    }
    Ok((resource::computed_or_not(object.state), Json(object)))
}

struct Counted {
    state: ResourceState,
    statistics: Option<Value>,
    error: Option<FailureDetail>,
}

/// What the counting job has found, adding that job if there is none.
async fn count_tokens(conn: &mut PgConnection, project_id: &str, dataset: &str, tokenizer: &str) -> Result<Counted, ApiError> {
    let mut tx = conn.begin().await?;
    // Two requests at the same time add one job. The row itself stays free: jobs are locked below.
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtextextended($1, 0)) AS locked", format!("statistics/{dataset}/{tokenizer}"))
        .fetch_one(&mut *tx)
        .await?;
    let tokenizer_job = tokenizers::find_usable(&mut tx, project_id, tokenizer, "tokenizer").await?;
    let known = sqlx::query!(
        r#"SELECT s.statistics, j.state AS "state: JobState", j.error FROM dataset_token_statistics s JOIN jobs j ON j.id = s.job_id
           WHERE s.dataset_id = $1 AND s.tokenizer_id = $2"#,
        dataset,
        tokenizer,
    )
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(known) = known {
        let state = match known.state {
            JobState::Succeeded => ResourceState::Ready,
            JobState::Failed | JobState::Cancelled => ResourceState::Failed,
            JobState::Running | JobState::Pausing | JobState::Cancelling => ResourceState::Running,
            JobState::Blocked | JobState::Queued | JobState::Paused => ResourceState::Queued,
        };
        return Ok(Counted { state, statistics: known.statistics, error: FailureDetail::from_column(known.error) });
    }
    let needs = super::find_usable(&mut tx, project_id, dataset, "dataset_id").await?.into_iter().chain(tokenizer_job);
    let job = NewJob {
        dataset_id: Some(dataset.to_owned()),
        tokenizer_id: Some(tokenizer.to_owned()),
        needs: needs.collect(),
        ..resource::light_job(project_id, None, Spec::Statistics {})
    };
    let job_id = job.id.clone();
    queue::enqueue(&mut tx, job).await.map_err(resource::not_enqueued)?;
    sqlx::query!(
        "INSERT INTO dataset_token_statistics (dataset_id, tokenizer_id, job_id) VALUES ($1, $2, $3)",
        dataset,
        tokenizer,
        job_id
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Counted { state: ResourceState::Queued, statistics: None, error: None })
}
