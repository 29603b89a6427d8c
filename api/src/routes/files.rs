//! `/v1/files`: uploaded bytes, in OpenAI's shapes.
//!
//! A file is streamed to the artifact store and registered when it is whole, so a row always has its
//! bytes. A deleted file's row stays as a tombstone for lineage; its bytes go.

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use lathe_jobs::{
    artifacts::Written,
    audit::{self, Deed},
    ids,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tokio_util::io::ReaderStream;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Project,
    idempotency::Creation,
    metadata::Metadata,
    multipart::{self, Expected},
    page::{List, Order, Page, fetch_page},
    parse::{self, Path, Query},
    problem::ApiError,
    resource::{self, Deleted},
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_file, list_files))
        .routes(routes!(get_file, delete_file))
        .routes(routes!(get_file_content))
}

/// What a file is for. Lathe treats all alike; the set is OpenAI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    Assistants,
    Batch,
    #[serde(rename = "fine-tune")]
    FineTune,
    Vision,
    UserData,
    Evals,
}

impl Purpose {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Purpose::Assistants => "assistants",
            Purpose::Batch => "batch",
            Purpose::FineTune => "fine-tune",
            Purpose::Vision => "vision",
            Purpose::UserData => "user_data",
            Purpose::Evals => "evals",
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Anchor {
    CreatedAt,
}

/// When the file deletes itself. In a form: `expires_after[anchor]` and `expires_after[seconds]`, or as JSON
/// text.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"anchor": "created_at", "seconds": 86400}))]
pub struct ExpiresAfter {
    #[allow(dead_code, reason = "its one value says all")]
    anchor: Anchor,
    #[schema(minimum = 3600, maximum = 2592000)]
    pub(super) seconds: i64,
}

/// The form's fields besides the file.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct FileFields {
    #[schema(inline)]
    purpose: Purpose,
    #[schema(inline)]
    expires_after: Option<ExpiresAfter>,
    #[schema(inline)]
    metadata: Option<Metadata>,
}

/// The form of an upload.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "describes the form, which is read as a stream")]
pub struct CreateFile {
    #[schema(value_type = String, format = Binary, content_media_type = "application/octet-stream", min_length = 1)]
    file: Vec<u8>,
    purpose: Purpose,
    #[schema(value_type = ExpiresAfter, required = false)]
    expires_after: Option<ExpiresAfter>,
    /// As JSON text.
    #[schema(value_type = Metadata, required = false)]
    metadata: Option<Metadata>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "file", "bytes": 120000, "created_at": 1767225600, "expires_at": null,
    "filename": "rows.jsonl", "purpose": "fine-tune", "status": "processed", "status_details": null,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "metadata": {}}))]
pub struct FileObject {
    #[schema(examples("file-01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    pub id: String,
    #[schema(examples("file"))]
    pub object: &'static str,
    pub bytes: i64,
    /// Unix seconds.
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub filename: String,
    #[schema(value_type = Purpose)]
    pub purpose: String,
    #[schema(examples("processed"))]
    pub status: &'static str,
    pub status_details: Option<String>,
    /// Of the content, in hex.
    pub sha256: String,
    pub metadata: Metadata,
}

/// A row of `files` as it is answered.
pub(super) struct FileRow {
    pub id: String,
    pub bytes: i64,
    pub created_at: OffsetDateTime,
    pub expires_at: Option<OffsetDateTime>,
    pub filename: String,
    pub purpose: String,
    pub sha256: String,
    pub metadata: Value,
}

impl From<FileRow> for FileObject {
    fn from(row: FileRow) -> FileObject {
        FileObject {
            id: row.id,
            object: "file",
            bytes: row.bytes,
            created_at: row.created_at.unix_timestamp(),
            expires_at: row.expires_at.map(OffsetDateTime::unix_timestamp),
            filename: row.filename,
            purpose: row.purpose,
            status: "processed",
            status_details: None,
            sha256: row.sha256,
            metadata: Metadata::from_row(row.metadata),
        }
    }
}

/// A file about to be registered; its bytes lie in the store already.
pub(super) struct NewFile<'a> {
    pub id: &'a str,
    pub caller: &'a Project,
    pub filename: &'a str,
    pub purpose: &'a str,
    pub written: &'a Written,
    pub metadata: &'a Metadata,
    pub expires_after: Option<i64>,
}

pub(super) fn artifact_key(file_id: &str) -> String {
    format!("files/{file_id}")
}

/// Adds the row, and the audit log's entry.
pub(super) async fn insert_file(conn: &mut PgConnection, file: NewFile<'_>) -> Result<FileRow, sqlx::Error> {
    audit::record(conn, file.caller.did(Deed::FileCreated, file.id)).await?;
    sqlx::query_as!(
        FileRow,
        "INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, artifact, metadata, expires_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now() + make_interval(secs => $9::bigint))
         RETURNING id, bytes, created_at, expires_at, filename, purpose, sha256, metadata",
        file.id,
        file.caller.project_id,
        file.filename,
        file.purpose,
        i64::try_from(file.written.bytes).unwrap_or(i64::MAX),
        file.written.sha256,
        artifact_key(file.id),
        file.metadata.to_row(),
        file.expires_after,
    )
    .fetch_one(conn)
    .await
}

/// Upload a file
///
/// Streamed to disk; at most 8 GiB unless configured otherwise. For more than that connection can
/// carry at once, see `uploads`.
#[utoipa::path(
    post, path = "/v1/files", operation_id = "create_file", tag = "files",
    request_body(content = CreateFile, content_type = "multipart/form-data"),
    responses((status = 200, description = "The file", body = FileObject), (status = 507, description = "The disk or the project's quota on storage is full"))
)]
async fn create_file(
    State(state): State<AppState>,
    caller: Project,
    creation: Creation,
    request: Request,
) -> Result<Json<FileObject>, ApiError> {
    let retried = is_retry(request.headers());
    if let Some(least) = multipart::least_bytes(request.headers()) {
        resource::require_storage(&mut *state.db.acquire().await?, &caller.project_id, least).await?;
    }
    let id = ids::new_dashed("file");
    let expected = Expected {
        file_field: "file",
        texts: &["purpose", "expires_after", "expires_after[anchor]", "expires_after[seconds]", "metadata"],
        key: &artifact_key(&id),
        limit: state.config.file_limit,
    };
    let received = multipart::receive(&state, request, expected).await?;
    let fields: FileFields = parse::typed(form_value(received.texts)?)?;
    let written = received.upload.finish().await?;
    let file = NewFile {
        id: &id,
        caller: &caller,
        filename: &received.filename,
        purpose: fields.purpose.as_str(),
        written: &written,
        metadata: &fields.metadata.unwrap_or_default(),
        expires_after: fields.expires_after.map(|expiry| expiry.seconds),
    };
    let registered = register(&state.db, &creation, file, retried).await;
    let has_row = registered.as_ref().map_or_else(ApiError::may_have_taken_effect, |file| file.id == id);
    if !has_row {
        resource::remove_artifacts(&state, vec![artifact_key(&id)]).await;
    }
    registered.map(Json)
}

/// Inserts the row; for an SDK's retry, the file that its earlier attempt made is the answer.
async fn register(db: &PgPool, creation: &Creation, file: NewFile<'_>, retried: bool) -> Result<FileObject, ApiError> {
    let mut conn = db.acquire().await?;
    if retried {
        let earlier = sqlx::query_as!(
            FileRow,
            "SELECT id, bytes, created_at, expires_at, filename, purpose, sha256, metadata FROM files
             WHERE project_id = $1 AND filename = $2 AND purpose = $3 AND sha256 = $4 AND metadata = $5
               AND deleted_at IS NULL AND created_at > now() - interval '10 minutes'
             ORDER BY created_at DESC LIMIT 1",
            file.caller.project_id,
            file.filename,
            file.purpose,
            file.written.sha256,
            file.metadata.to_row(),
        )
        .fetch_optional(&mut *conn)
        .await?;
        if let Some(row) = earlier {
            return Ok(row.into());
        }
    }
    drop(conn);
    let mut tx = db.begin().await?;
    let project_id = &file.caller.project_id;
    let file = FileObject::from(insert_file(&mut tx, file).await?);
    resource::require_storage(&mut tx, project_id, 0).await?;
    creation.commit(db, tx, StatusCode::OK, &file).await?;
    Ok(file)
}

pub(super) fn is_retry(headers: &HeaderMap) -> bool {
    let count =
        headers.get("x-stainless-retry-count").and_then(|count| count.to_str().ok()).and_then(|count| count.parse::<u32>().ok());
    count.is_some_and(|count| count > 0)
}

/// The form's texts as the JSON object that they stand for.
fn form_value(texts: std::collections::BTreeMap<String, String>) -> Result<Value, ApiError> {
    let mut object = serde_json::Map::new();
    let mut expiry = serde_json::Map::new();
    for (name, text) in texts {
        match name.as_str() {
            "expires_after[anchor]" => drop(expiry.insert("anchor".to_owned(), text.into())),
            "expires_after[seconds]" => {
                drop(expiry.insert("seconds".to_owned(), text.parse::<i64>().map_or_else(|_| text.into(), Value::from)))
            }
            "metadata" | "expires_after" => {
                let value = parse::json_text(&format!("`{name}`"), &text).map_err(|error| error.within(&name))?;
                if value.is_null() {
                    let message = format!("`{name}` must be an object, not null: leave it out.");
                    return Err(ApiError::bad_request(name, message));
                }
                object.insert(name, value);
            }
            _ => drop(object.insert(name, text.into())),
        }
    }
    if !expiry.is_empty() && object.insert("expires_after".to_owned(), expiry.into()).is_some() {
        let message = "`expires_after` is given twice, as JSON and field by field: give one of them.";
        return Err(ApiError::bad_request("expires_after", message));
    }
    Ok(object.into())
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListFiles {
    /// The id of the last item of the page before.
    #[param(min_length = 1)]
    after: Option<String>,
    #[param(minimum = 1, maximum = 10000, default = 10000)]
    limit: Option<i64>,
    #[param(inline)]
    order: Option<Order>,
    #[param(inline)]
    purpose: Option<Purpose>,
}

/// List files
#[utoipa::path(get, path = "/v1/files", operation_id = "list_files", tag = "files", params(ListFiles), responses((status = 200, description = "A page", body = List<FileObject>)))]
async fn list_files(
    State(state): State<AppState>,
    caller: Project,
    Query(query): Query<ListFiles>,
) -> Result<Json<List<FileObject>>, ApiError> {
    let page = Page::asked(query.limit.unwrap_or(10_000), query.order, query.after, async |id| {
        sqlx::query_scalar!("SELECT created_at FROM files WHERE id = $1 AND project_id = $2", id, caller.project_id)
            .fetch_optional(&state.db)
            .await
    })
    .await?;
    let rows = fetch_page!(
        FileRow,
        &state.db,
        &page,
        "SELECT id, bytes, created_at, expires_at, filename, purpose, sha256, metadata FROM files
         WHERE project_id = $4 AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now())
           AND ($5::text IS NULL OR purpose = $5)",
        caller.project_id,
        query.purpose.map(Purpose::as_str),
    )?;
    Ok(Json(List::of(rows.into_iter().map(FileObject::from).collect(), &page, |file| &file.id)))
}

pub(super) async fn find_file(db: &PgPool, project_id: &str, id: &str) -> Result<FileRow, ApiError> {
    sqlx::query_as!(
        FileRow,
        "SELECT id, bytes, created_at, expires_at, filename, purpose, sha256, metadata FROM files
         WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now())",
        id,
        project_id,
    )
    .fetch_optional(db)
    .await?
    .ok_or_else(|| ApiError::not_found("file", id))
}

/// Get a file
#[utoipa::path(get, path = "/v1/files/{file_id}", operation_id = "get_file", tag = "files", params(("file_id" = String, Path)), responses((status = 200, description = "The file", body = FileObject)))]
async fn get_file(State(state): State<AppState>, caller: Project, Path(id): Path<String>) -> Result<Json<FileObject>, ApiError> {
    Ok(Json(find_file(&state.db, &caller.project_id, &id).await?.into()))
}

/// Delete a file
///
/// Refused while a dataset or tokenizer that is still being made needs it.
#[utoipa::path(
    delete, path = "/v1/files/{file_id}", operation_id = "delete_file", tag = "files", params(("file_id" = String, Path)),
    responses((status = 200, description = "Deleted", body = Deleted), (status = 409, description = "Something unfinished needs it; the message names what"))
)]
async fn delete_file(State(state): State<AppState>, caller: Project, Path(id): Path<String>) -> Result<Json<Deleted>, ApiError> {
    let mut transaction = state.db.begin().await?;
    // The lock waits for, and then shuts out, whoever is about to refer to the file.
    let artifact = sqlx::query_scalar!(
        "SELECT artifact FROM files WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL FOR UPDATE",
        id,
        caller.project_id
    )
    .fetch_optional(&mut *transaction)
    .await?
    .ok_or_else(|| ApiError::not_found("file", &id))?;
    let users = sqlx::query_scalar!(
        r#"SELECT d.id AS "id!" FROM datasets d JOIN dataset_files f ON f.dataset_id = d.id
           WHERE f.file_id = $1 AND d.state IN ('queued', 'running') AND d.deleted_at IS NULL
           UNION
           SELECT id FROM tokenizers WHERE file_id = $1 AND state IN ('queued', 'running') AND deleted_at IS NULL
           LIMIT 10"#,
        id,
    )
    .fetch_all(&mut *transaction)
    .await?;
    resource::refuse_users("file", &id, &users)?;
    sqlx::query!("UPDATE files SET deleted_at = now() WHERE id = $1", id).execute(&mut *transaction).await?;
    audit::record(&mut transaction, caller.did(Deed::FileDeleted, &id)).await?;
    transaction.commit().await?;
    resource::remove_artifacts(&state, vec![artifact]).await;
    Ok(Json(Deleted { id, object: "file", deleted: true }))
}

/// Bytes.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary, content_media_type = "application/octet-stream")]
#[allow(dead_code, reason = "describes the answer, which is read as a stream")]
struct FileContent(Vec<u8>);

/// Get a file's content
#[utoipa::path(
    get, path = "/v1/files/{file_id}/content", operation_id = "get_file_content", tag = "files", params(("file_id" = String, Path)),
    responses((status = 200, description = "The bytes as they were uploaded", content_type = "application/octet-stream", body = inline(FileContent)))
)]
async fn get_file_content(State(state): State<AppState>, caller: Project, Path(id): Path<String>) -> Result<Response, ApiError> {
    let file = find_file(&state.db, &caller.project_id, &id).await?;
    // Deleted meanwhile, perhaps between the two lines.
    let gone = || ApiError::not_found("file", &id);
    let path = state.artifacts.fetch(&artifact_key(&id)).await?.ok_or_else(gone)?;
    let content = match tokio::fs::File::open(path).await {
        Ok(content) => content,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(gone()),
        Err(error) => return Err(ApiError::internal(error)),
    };
    let mut response = Response::new(Body::from_stream(ReaderStream::with_capacity(content, 256 << 10)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    // Whatever was uploaded, no browser shall render it as a page of this origin.
    headers.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}
