//! `/v1/uploads`: a file in parts, in OpenAI's shapes.
//!
//! Parts arrive in any order, also side by side; completion names their order. An upload that is not
//! completed within an hour is expired, and housekeeping sweeps its parts.

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use lathe_jobs::{
    artifacts::{ArtifactError, Written},
    audit::{self, Deed},
    ids,
};
use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tokio::io::AsyncReadExt;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::files::{self, ExpiresAfter, FileObject, FileRow, NewFile, Purpose};
use crate::{
    auth::Project,
    commit::commit,
    idempotency::Creation,
    metadata::Metadata,
    multipart::{self, Expected},
    parse::{Body, NoBody, Path},
    problem::ApiError,
    resource,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_upload))
        .routes(routes!(create_upload_part))
        .routes(routes!(complete_upload))
        .routes(routes!(cancel_upload))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"filename": "corpus.jsonl", "purpose": "fine-tune", "bytes": 2147483648u64, "mime_type": "text/jsonl"}))]
pub struct CreateUpload {
    #[schema(min_length = 1, max_length = 255)]
    filename: String,
    purpose: Purpose,
    /// Bytes of the whole file.
    #[schema(minimum = 1, maximum = 9223372036854775807i64)]
    bytes: i64,
    #[schema(min_length = 1, max_length = 255)]
    mime_type: String,
    expires_after: Option<ExpiresAfter>,
    metadata: Option<Metadata>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "upload_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "upload", "bytes": 2147483648u64, "created_at": 1767225600, "expires_at": 1767229200,
    "filename": "corpus.jsonl", "purpose": "fine-tune", "status": "pending", "file": null, "metadata": {}}))]
pub struct UploadObject {
    #[schema(examples("upload_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    id: String,
    #[schema(examples("upload"))]
    object: &'static str,
    bytes: i64,
    /// Unix seconds.
    created_at: i64,
    expires_at: i64,
    filename: String,
    #[schema(value_type = Purpose)]
    purpose: String,
    /// `pending`, `completed`, `cancelled` or `expired`.
    #[schema(examples("pending"))]
    status: String,
    /// Once completed.
    file: Option<FileObject>,
    metadata: Metadata,
}

struct UploadRow {
    id: String,
    bytes: i64,
    created_at: OffsetDateTime,
    expires_at: OffsetDateTime,
    filename: String,
    purpose: String,
    /// `pending` with its time over reads as `expired`.
    state: String,
    file_id: Option<String>,
    file_expires_after: Option<i64>,
    metadata: Value,
}

impl UploadRow {
    fn object(self, file: Option<FileRow>) -> UploadObject {
        UploadObject {
            id: self.id,
            object: "upload",
            bytes: self.bytes,
            created_at: self.created_at.unix_timestamp(),
            expires_at: self.expires_at.unix_timestamp(),
            filename: self.filename,
            purpose: self.purpose,
            status: self.state,
            file: file.map(FileObject::from),
            metadata: Metadata::from_row(self.metadata),
        }
    }
}

/// Begin an upload in parts
#[utoipa::path(
    post, path = "/v1/uploads", operation_id = "create_upload", tag = "files", request_body = CreateUpload,
    responses((status = 200, description = "The upload, pending", body = UploadObject))
)]
async fn create_upload(
    State(state): State<AppState>,
    caller: Project,
    creation: Creation,
    Body(request): Body<CreateUpload>,
) -> Result<Json<UploadObject>, ApiError> {
    if request.bytes.unsigned_abs() > state.config.file_limit {
        return Err(ApiError::too_large("The file", state.config.file_limit).with_param("bytes"));
    }
    let mut tx = state.db.begin().await?;
    let row = sqlx::query_as!(
        UploadRow,
        "INSERT INTO uploads (id, project_id, filename, purpose, mime_type, bytes, state, file_expires_after, metadata, expires_at)
         VALUES ($1, $2, $3, $4, $5, $6, 'pending', $7, $8, now() + interval '1 hour')
         RETURNING id, bytes, created_at, expires_at, filename, purpose, state, file_id, file_expires_after, metadata",
        ids::new("upload"),
        caller.project_id,
        multipart::plain_filename(&request.filename),
        request.purpose.as_str(),
        request.mime_type,
        request.bytes,
        request.expires_after.map(|expiry| expiry.seconds),
        request.metadata.unwrap_or_default().to_row(),
    )
    .fetch_one(&mut *tx)
    .await?;
    let upload = row.object(None);
    audit::record(&mut tx, caller.did(Deed::UploadCreated, &upload.id)).await?;
    resource::require_storage(&mut tx, &caller.project_id, 0).await?;
    creation.commit(&state.db, tx, StatusCode::OK, &upload).await?;
    Ok(Json(upload))
}

async fn find_upload(db: &PgPool, project_id: &str, id: &str) -> Result<UploadRow, ApiError> {
    sqlx::query_as!(
        UploadRow,
        r#"SELECT id, bytes, created_at, expires_at, filename, purpose,
                  CASE WHEN state = 'pending' AND expires_at <= now() THEN 'expired' ELSE state END AS "state!",
                  file_id, file_expires_after, metadata
           FROM uploads WHERE id = $1 AND project_id = $2"#,
        id,
        project_id,
    )
    .fetch_optional(db)
    .await?
    .ok_or_else(|| ApiError::not_found("upload", id))
}

fn require_pending(upload: &UploadRow) -> Result<(), ApiError> {
    if upload.state == "pending" {
        return Ok(());
    }
    Err(ApiError::conflict(format!("The upload `{}` is {}; begin a new one.", upload.id, upload.state)))
}

/// The form of a part.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "describes the form, which is read as a stream")]
pub struct CreateUploadPart {
    #[schema(value_type = String, format = Binary, content_media_type = "application/octet-stream", min_length = 1)]
    data: Vec<u8>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "part_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "upload.part", "created_at": 1767225600, "upload_id": "upload_01J9ZQ4M7K3T5W8X2Y6C0V1B4N"}))]
pub struct UploadPart {
    #[schema(examples("part_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"))]
    id: String,
    #[schema(examples("upload.part"))]
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    upload_id: String,
}

/// Add a part
///
/// At most 64 MiB, unless configured otherwise; all parts together at most what a file may have.
#[utoipa::path(
    post, path = "/v1/uploads/{upload_id}/parts", operation_id = "create_upload_part", tag = "files",
    request_body(content = CreateUploadPart, content_type = "multipart/form-data"), params(("upload_id" = String, Path)),
    responses(
        (status = 200, description = "The part", body = UploadPart), (status = 409, description = "The upload is not pending"),
        (status = 507, description = "The disk or the project's quota on storage is full"),
    )
)]
async fn create_upload_part(
    State(state): State<AppState>,
    caller: Project,
    Path(upload_id): Path<String>,
    creation: Creation,
    request: Request,
) -> Result<Json<UploadPart>, ApiError> {
    require_pending(&find_upload(&state.db, &caller.project_id, &upload_id).await?)?;
    let (id, retried) = (ids::new("part"), files::is_retry(request.headers()));
    let key = format!("parts/{id}");
    let expected = Expected { file_field: "data", texts: &[], key: &key, limit: state.config.part_limit };
    let written = multipart::receive(&state, request, expected).await?.upload.finish().await?;
    let new = NewPart { id: &id, project_id: &caller.project_id, upload_id: &upload_id, written: &written, retried };
    let added = add_part(&state, &creation, new).await;
    let has_row = added.as_ref().map_or_else(ApiError::may_have_taken_effect, |part| part.id == id);
    if !has_row {
        resource::remove_artifacts(&state, vec![key]).await;
    }
    added.map(Json)
}

/// A part whose bytes lie in the store.
struct NewPart<'a> {
    id: &'a str,
    project_id: &'a str,
    upload_id: &'a str,
    written: &'a Written,
    /// Sent before, perhaps, by the same client.
    retried: bool,
}

/// Adds the part; for an SDK's retry, the upload's part with the same bytes is the answer.
async fn add_part(state: &AppState, creation: &Creation, new: NewPart<'_>) -> Result<UploadPart, ApiError> {
    let NewPart { id, project_id, upload_id, written, retried } = new;
    let answer = |id: &str, created_at: OffsetDateTime| UploadPart {
        id: id.to_owned(),
        object: "upload.part",
        created_at: created_at.unix_timestamp(),
        upload_id: upload_id.to_owned(),
    };
    let mut transaction = state.db.begin().await?;
    // Parts that arrive side by side are counted one after the other.
    let pending = sqlx::query_scalar!(
        "SELECT id FROM uploads WHERE id = $1 AND state = 'pending' AND expires_at > now() FOR UPDATE",
        upload_id
    )
    .fetch_optional(&mut *transaction)
    .await?;
    if pending.is_none() {
        return Err(ApiError::conflict(format!("The upload `{upload_id}` is no longer pending; begin a new one.")));
    }
    if retried {
        let earlier = sqlx::query!(
            "SELECT id, created_at FROM upload_parts WHERE upload_id = $1 AND sha256 = $2 ORDER BY created_at DESC LIMIT 1",
            upload_id,
            written.sha256,
        )
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some(part) = earlier {
            return Ok(answer(&part.id, part.created_at));
        }
    }
    let before = sqlx::query_scalar!(
        r#"SELECT coalesce(sum(bytes), 0)::bigint AS "sum!" FROM upload_parts WHERE upload_id = $1"#,
        upload_id
    )
    .fetch_one(&mut *transaction)
    .await?;
    if before.unsigned_abs() + written.bytes > state.config.file_limit {
        return Err(ApiError::too_large("The parts of an upload together", state.config.file_limit));
    }
    let created_at = sqlx::query_scalar!(
        "INSERT INTO upload_parts (id, upload_id, bytes, sha256, artifact) VALUES ($1, $2, $3, $4, $5) RETURNING created_at",
        id,
        upload_id,
        i64::try_from(written.bytes).unwrap_or(i64::MAX),
        written.sha256,
        format!("parts/{id}"),
    )
    .fetch_one(&mut *transaction)
    .await?;
    // Parts beyond what the upload was begun for.
    resource::require_storage(&mut transaction, project_id, 0).await?;
    let part = answer(id, created_at);
    creation.commit(&state.db, transaction, StatusCode::OK, &part).await?;
    Ok(part)
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"part_ids": ["part_01J8Z0M5V4Q1X7Y2K3N6R9T0WB"]}))]
pub struct CompleteUpload {
    /// In the order in which they make the file. A part whose bytes occur several times in it may be named as often.
    #[schema(min_items = 1, max_items = 10000)]
    part_ids: Vec<String>,
    /// Of the whole file, in hex; checked if given.
    #[schema(min_length = 32, max_length = 32)]
    md5: Option<String>,
}

/// Make the file
///
/// Completing twice is completing.
#[utoipa::path(
    post, path = "/v1/uploads/{upload_id}/complete", operation_id = "complete_upload", tag = "files", request_body = CompleteUpload,
    params(("upload_id" = String, Path)),
    responses(
        (status = 200, description = "The upload with its file", body = UploadObject), (status = 409, description = "The upload is cancelled or expired"),
        (status = 422, description = "The bytes or the md5 differ from what was promised"), (status = 507, description = "The disk is full"),
    )
)]
async fn complete_upload(
    State(state): State<AppState>,
    caller: Project,
    Path(upload_id): Path<String>,
    Body(request): Body<CompleteUpload>,
) -> Result<Json<UploadObject>, ApiError> {
    let upload = find_upload(&state.db, &caller.project_id, &upload_id).await?;
    if let (Some(file_id), "completed") = (&upload.file_id, upload.state.as_str()) {
        let file = files::find_file(&state.db, &caller.project_id, file_id).await.ok();
        return Ok(Json(upload.object(file)));
    }
    require_pending(&upload)?;
    let keys = ordered_parts(&state.db, &upload, &request.part_ids).await?;
    let file_id = ids::new_dashed("file");
    let (written, md5) = concatenate(&state, &keys, &files::artifact_key(&file_id)).await?;
    let completed = match request.md5 {
        Some(promised) if !promised.eq_ignore_ascii_case(&md5) => Err(ApiError::unprocessable(
            "md5_mismatch",
            "md5",
            format!("The parts have the md5 {md5}; send the damaged ones again."),
        )),
        _ => register(&state.db, &caller, &upload, &file_id, &written).await,
    };
    match completed {
        Ok((file, parts)) => {
            resource::remove_artifacts(&state, parts).await;
            let upload = find_upload(&state.db, &caller.project_id, &upload_id).await?;
            Ok(Json(upload.object(Some(file))))
        }
        Err(error) => {
            if !error.may_have_taken_effect() {
                resource::remove_artifacts(&state, vec![files::artifact_key(&file_id)]).await;
            }
            Err(error)
        }
    }
}

/// The store's keys of the named parts, which must be this upload's and add up. A retried part is one with
/// an earlier part of the same bytes, so one may stand in several places.
async fn ordered_parts(db: &PgPool, upload: &UploadRow, part_ids: &[String]) -> Result<Vec<String>, ApiError> {
    let rows = sqlx::query!("SELECT id, bytes, artifact FROM upload_parts WHERE upload_id = $1", upload.id).fetch_all(db).await?;
    let parts: std::collections::HashMap<String, (i64, String)> =
        rows.into_iter().map(|row| (row.id, (row.bytes, row.artifact))).collect();
    let (mut keys, mut bytes) = (Vec::with_capacity(part_ids.len()), 0_i64);
    for (index, id) in part_ids.iter().enumerate() {
        let found = parts.get(id).ok_or_else(|| ApiError::not_found("part", id).with_param(format!("part_ids[{index}]")));
        let (size, key) = found?;
        bytes = bytes.saturating_add(*size);
        keys.push(key.clone());
    }
    if bytes != upload.bytes {
        let message = format!(
            "The parts have {bytes} bytes and the upload was begun for {}; name every part, or begin a new upload.",
            upload.bytes
        );
        return Err(ApiError::unprocessable("bytes_mismatch", "part_ids", message));
    }
    Ok(keys)
}

/// Writes the parts one after the other under `key`; returns what was written and its md5 in hex.
async fn concatenate(state: &AppState, parts: &[String], key: &str) -> Result<(Written, String), ApiError> {
    let mut whole = state.artifacts.create(key).await?;
    let mut md5 = Md5::new();
    let mut buffer = vec![0; 1 << 20];
    for part in parts {
        let failed = |source| ArtifactError::Io { key: part.clone(), source };
        let missing = || failed(std::io::ErrorKind::NotFound.into());
        let path = state.artifacts.fetch(part).await?.ok_or_else(missing)?;
        let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
        loop {
            let read = file.read(&mut buffer).await.map_err(failed)?;
            if read == 0 {
                break;
            }
            md5.update(&buffer[..read]);
            whole.write(&buffer[..read]).await?;
        }
    }
    Ok((whole.finish().await?, hex::encode(md5.finalize())))
}

/// Makes the file's row and completes the upload, which frees the parts; returns their keys.
async fn register(
    db: &PgPool,
    caller: &Project,
    upload: &UploadRow,
    file_id: &str,
    written: &Written,
) -> Result<(FileRow, Vec<String>), ApiError> {
    let mut transaction = db.begin().await?;
    let file = NewFile {
        id: file_id,
        caller,
        filename: &upload.filename,
        purpose: &upload.purpose,
        written,
        metadata: &Metadata::from_row(upload.metadata.clone()),
        expires_after: upload.file_expires_after,
    };
    let file = files::insert_file(&mut transaction, file).await?;
    let completed = sqlx::query!(
        "UPDATE uploads SET state = 'completed', file_id = $2 WHERE id = $1 AND state = 'pending'",
        upload.id,
        file_id
    )
    .execute(&mut *transaction)
    .await?;
    if completed.rows_affected() != 1 {
        return Err(ApiError::conflict(format!("The upload `{}` was completed or cancelled meanwhile.", upload.id)));
    }
    let parts = drop_parts(&mut transaction, &upload.id).await?;
    commit(db, transaction).await?;
    Ok((file, parts))
}

async fn drop_parts(conn: &mut PgConnection, upload_id: &str) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar!("DELETE FROM upload_parts WHERE upload_id = $1 RETURNING artifact", upload_id).fetch_all(conn).await
}

/// Cancel an upload
///
/// Cancelling twice is cancelling.
#[utoipa::path(
    post, path = "/v1/uploads/{upload_id}/cancel", operation_id = "cancel_upload", tag = "files", params(("upload_id" = String, Path)),
    responses((status = 200, description = "The upload, cancelled", body = UploadObject), (status = 409, description = "The upload is completed or expired"))
)]
async fn cancel_upload(
    State(state): State<AppState>,
    caller: Project,
    Path(upload_id): Path<String>,
    _: NoBody,
) -> Result<Json<UploadObject>, ApiError> {
    let upload = find_upload(&state.db, &caller.project_id, &upload_id).await?;
    if upload.state == "cancelled" {
        return Ok(Json(upload.object(None)));
    }
    require_pending(&upload)?;
    let mut transaction = state.db.begin().await?;
    let cancelled = sqlx::query!("UPDATE uploads SET state = 'cancelled' WHERE id = $1 AND state = 'pending'", upload_id)
        .execute(&mut *transaction)
        .await?;
    if cancelled.rows_affected() != 1 {
        return Err(ApiError::conflict(format!("The upload `{upload_id}` was completed or cancelled meanwhile.")));
    }
    audit::record(&mut transaction, caller.did(Deed::UploadCancelled, &upload_id)).await?;
    let parts = drop_parts(&mut transaction, &upload_id).await?;
    transaction.commit().await?;
    resource::remove_artifacts(&state, parts).await;
    Ok(Json(find_upload(&state.db, &caller.project_id, &upload_id).await?.object(None)))
}
