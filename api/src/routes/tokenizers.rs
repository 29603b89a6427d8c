//! `/v1/tokenizers`: byte-level BPE, trained by a job on a dataset, or uploaded as `tokenizer.json`.
//!
//! Encoding runs off tokio's threads, with tokenizers kept in memory once loaded (they never change).
//! Text is always text: no spelling of a special token becomes its id.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use lathe_jobs::{
    audit::{self, Deed},
    ids,
    queue::{self, NewJob},
    spec::Spec,
    state::ResourceState,
};
use lathe_model::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::datasets;
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

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(create_tokenizer, list_tokenizers))
        .routes(routes!(get_tokenizer, delete_tokenizer))
        .routes(routes!(encode_text))
        .routes(routes!(decode_ids))
        .routes(routes!(count_tokens))
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainableType {
    Bpe,
}

/// Trains a tokenizer.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "small", "type": "bpe", "dataset": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "vocab_size": 1024}))]
pub struct TrainTokenizer {
    #[schema(min_length = 1, max_length = 256)]
    name: String,
    #[allow(dead_code, reason = "the tag of the union; there is one kind so far")]
    r#type: TrainableType,
    /// Id of a dataset. One that is not ready is waited for.
    dataset: String,
    /// Ids in all: 256 bytes, 16 reserved ones and what is learned.
    #[schema(minimum = 272, maximum = 1000000)]
    vocab_size: i64,
    metadata: Option<Metadata>,
}

/// Takes an uploaded `tokenizer.json`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "theirs", "file": "file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N"}))]
pub struct ImportTokenizer {
    #[schema(min_length = 1, max_length = 256)]
    name: String,
    file: String,
    metadata: Option<Metadata>,
}

/// A tokenizer to train or to take.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum CreateTokenizer {
    Train(TrainTokenizer),
    Import(ImportTokenizer),
}

/// A tokenizer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "tok_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "tokenizer", "name": "small", "state": "ready", "job": "job_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "type": "bpe", "dataset": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "file": null,
    "vocab_size": 1024, "added_roles": [], "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "error": null, "metadata": {}, "created_at": 1767225600}))]
pub struct TokenizerObject {
    #[schema(examples("tok_01J9ZQ4M7K3T5W8X2Y6C0V1B4N"))]
    id: String,
    #[schema(examples("tokenizer"))]
    object: &'static str,
    name: String,
    state: StateName,
    /// The job that makes it.
    job: String,
    /// `bpe` (trained here) or `imported`.
    r#type: String,
    dataset: Option<String>,
    file: Option<String>,
    /// Asked for, then as made.
    vocab_size: Option<i64>,
    /// Roles that an uploaded tokenizer lacked and gained.
    added_roles: Vec<String>,
    sha256: Option<String>,
    error: Option<FailureDetail>,
    metadata: Metadata,
    /// Unix seconds.
    created_at: i64,
}

pub(super) struct TokenizerRow {
    id: String,
    name: String,
    state: ResourceState,
    job_id: String,
    r#type: String,
    dataset_id: Option<String>,
    file_id: Option<String>,
    vocabulary: Option<i64>,
    added_roles: Vec<String>,
    artifact: Option<String>,
    sha256: Option<String>,
    error: Option<Value>,
    metadata: Value,
    created_at: OffsetDateTime,
}

impl From<TokenizerRow> for TokenizerObject {
    fn from(row: TokenizerRow) -> TokenizerObject {
        TokenizerObject {
            id: row.id,
            object: "tokenizer",
            name: row.name,
            state: row.state.into(),
            job: row.job_id,
            r#type: row.r#type,
            dataset: row.dataset_id,
            file: row.file_id,
            vocab_size: row.vocabulary,
            added_roles: row.added_roles,
            sha256: row.sha256,
            error: FailureDetail::from_column(row.error),
            metadata: Metadata::from_row(row.metadata),
            created_at: resource::seconds(row.created_at),
        }
    }
}

/// `query_as!` of tokenizers that are not deleted; `$tail` goes on with `AND …`.
macro_rules! select_tokenizers {
    ($tail:literal $(+ $more:literal)* $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            TokenizerRow,
            r#"SELECT id, name, state AS "state: ResourceState", job_id, type, dataset_id, file_id, vocabulary, added_roles, artifact, sha256,
                      error, metadata, created_at
               FROM tokenizers WHERE deleted_at IS NULL "# + $tail $(+ $more)*
            $(, $argument)*
        )
    };
}

pub(super) async fn find(conn: &mut PgConnection, project_id: &str, id: &str) -> Result<TokenizerRow, ApiError> {
    select_tokenizers!("AND id = $1 AND project_id = $2", id, project_id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| ApiError::not_found("tokenizer", id))
}

/// The job to wait for before a tokenizer can be used, if it is not ready.
pub(super) async fn find_usable(
    conn: &mut PgConnection,
    project_id: &str,
    id: &str,
    param: &str,
) -> Result<Option<String>, ApiError> {
    find_usable!("tokenizer" in "tokenizers", conn, project_id, id, param)
}

/// Create a tokenizer
///
/// A job trains it on a dataset, or checks an uploaded `tokenizer.json` and adds the reserved roles
/// that it lacks.
#[utoipa::path(
    post, path = "/v1/tokenizers", operation_id = "create_tokenizer", tag = "tokenizers", request_body = CreateTokenizer,
    responses(
        (status = 201, description = "The tokenizer, queued", body = TokenizerObject),
        (status = 404, description = "The dataset or file is unknown"),
        (status = 409, description = "The dataset has failed"),
    )
)]
async fn create_tokenizer(
    State(state): State<AppState>,
    project: Project,
    creation: Creation,
    Body(body): Body<CreateTokenizer>,
) -> Result<(StatusCode, Json<TokenizerObject>), ApiError> {
    let mut conn = state.db.acquire().await?;
    let mut tx = conn.begin().await?;
    resource::require_storage(&mut tx, &project.project_id, 1).await?;
    let id = match body {
        CreateTokenizer::Train(body) => insert_trained(&mut tx, &project.project_id, body).await?,
        CreateTokenizer::Import(body) => insert_imported(&mut tx, &project.project_id, body).await?,
    };
    let row = find(&mut tx, &project.project_id, &id).await?;
    let tokenizer = TokenizerObject::from(row);
    audit::record(&mut tx, project.did(Deed::TokenizerCreated, &id)).await?;
    creation.commit(&state.db, tx, StatusCode::CREATED, &tokenizer).await?;
    Ok((StatusCode::CREATED, Json(tokenizer)))
}

async fn insert_trained(conn: &mut PgConnection, project_id: &str, body: TrainTokenizer) -> Result<String, ApiError> {
    let needs = datasets::find_usable(conn, project_id, &body.dataset, "dataset").await?;
    let id = ids::new("tok");
    let spec = Spec::Tokenizer { vocabulary: body.vocab_size };
    let job = NewJob {
        dataset_id: Some(body.dataset.clone()),
        tokenizer_id: Some(id.clone()),
        needs: needs.into_iter().collect(),
        ..resource::light_job(project_id, Some(&body.name), spec)
    };
    let job_id = job.id.clone();
    queue::enqueue(conn, job).await.map_err(resource::not_enqueued)?;
    sqlx::query!(
        "INSERT INTO tokenizers (id, project_id, name, state, job_id, type, dataset_id, vocabulary, metadata)
         VALUES ($1, $2, $3, 'queued', $4, 'bpe', $5, $6, $7)",
        id,
        project_id,
        body.name,
        job_id,
        body.dataset,
        body.vocab_size,
        body.metadata.unwrap_or_default().to_row(),
    )
    .execute(conn)
    .await?;
    Ok(id)
}

async fn insert_imported(conn: &mut PgConnection, project_id: &str, body: ImportTokenizer) -> Result<String, ApiError> {
    sqlx::query_scalar!(
        "SELECT id FROM files WHERE id = $1 AND project_id = $2 AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now()) FOR KEY SHARE",
        body.file,
        project_id,
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(|| resource::unknown("file", &body.file, "file"))?;
    let id = ids::new("tok");
    let spec = Spec::TokenizerImport { file: body.file.clone() };
    let job = NewJob { tokenizer_id: Some(id.clone()), ..resource::light_job(project_id, Some(&body.name), spec) };
    let job_id = job.id.clone();
    queue::enqueue(conn, job).await.map_err(resource::not_enqueued)?;
    sqlx::query!(
        "INSERT INTO tokenizers (id, project_id, name, state, job_id, type, file_id, metadata) VALUES ($1, $2, $3, 'queued', $4, 'imported', $5, $6)",
        id,
        project_id,
        body.name,
        job_id,
        body.file,
        body.metadata.unwrap_or_default().to_row(),
    )
    .execute(conn)
    .await?;
    Ok(id)
}

/// List tokenizers
#[utoipa::path(get, path = "/v1/tokenizers", operation_id = "list_tokenizers", tag = "tokenizers", params(ListQuery), responses((status = 200, description = "A page", body = List<TokenizerObject>)))]
async fn list_tokenizers(
    State(state): State<AppState>,
    project: Project,
    Query(query): Query<ListQuery>,
) -> Result<Json<List<TokenizerObject>>, ApiError> {
    list_made!(select_tokenizers in "tokenizers" as TokenizerObject, &state, project.project_id, query, 20)
}

/// Retrieve a tokenizer
#[utoipa::path(
    get, path = "/v1/tokenizers/{tokenizer_id}", operation_id = "get_tokenizer", tag = "tokenizers", params(("tokenizer_id" = String, Path)),
    responses((status = 200, description = "The tokenizer", body = TokenizerObject))
)]
async fn get_tokenizer(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<TokenizerObject>, ApiError> {
    let mut conn = state.db.acquire().await?;
    Ok(Json(find(&mut conn, &project.project_id, &id).await?.into()))
}

/// Delete a tokenizer
///
/// Refused while unfinished work needs it. Models trained with it keep their own copy.
#[utoipa::path(
    delete, path = "/v1/tokenizers/{tokenizer_id}", operation_id = "delete_tokenizer", tag = "tokenizers", params(("tokenizer_id" = String, Path)),
    responses((status = 200, description = "Deleted", body = Deleted), (status = 409, description = "Unfinished work needs it; the message names it"))
)]
async fn delete_tokenizer(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    delete_made!(
        "tokenizer" in "tokenizers",
        Deed::TokenizerDeleted,
        &state,
        project,
        id,
        "SELECT id FROM jobs WHERE finished_at IS NULL AND id <> $2 AND tokenizer_id = $1 ORDER BY created_at LIMIT 10"
    )
}

/// One text.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"text": "What is 2 plus 3?"}))]
pub struct OneText {
    text: String,
}

/// Several texts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"texts": ["What is 2", "plus 3?"]}))]
pub struct SeveralTexts {
    #[schema(min_items = 1, max_items = 10000)]
    texts: Vec<String>,
}

/// One text or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum TextBody {
    One(OneText),
    Several(SeveralTexts),
}

impl TextBody {
    fn into_texts(self) -> (Vec<String>, bool) {
        match self {
            TextBody::One(OneText { text }) => (vec![text], true),
            TextBody::Several(SeveralTexts { texts }) => (texts, false),
        }
    }
}

/// `ids` and `tokens` of one text; lists of them for several.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Encoding {
    One(OneEncoding),
    Several(EncodingList),
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"ids": [303, 50], "tokens": ["What", "?"]}))]
pub struct OneEncoding {
    ids: Vec<u32>,
    /// How each token is shown by itself.
    tokens: Vec<String>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"data": [{"ids": [303, 50], "tokens": ["What", "?"]}]}))]
pub struct EncodingList {
    /// One for each text.
    data: Vec<OneEncoding>,
}

/// Encode text
///
/// Special tokens in the text are text.
#[utoipa::path(
    post, path = "/v1/tokenizers/{tokenizer_id}/encode", operation_id = "encode_text", tag = "tokenizers", params(("tokenizer_id" = String, Path)),
    request_body = TextBody,
    responses((status = 200, description = "Token ids", body = Encoding), (status = 409, description = "The tokenizer is not ready"))
)]
async fn encode_text(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Body(body): Body<TextBody>,
) -> Result<Json<Encoding>, ApiError> {
    let (texts, one) = body.into_texts();
    let mut encodings = with_tokenizer(&state, &project, &id, move |tokenizer| {
        let all = tokenizer.encode_batch(&texts).into_iter();
        all.map(|ids| OneEncoding { tokens: ids.iter().map(|&id| tokenizer.token_name(id)).collect(), ids }).collect::<Vec<_>>()
    })
    .await?;
    Ok(Json(match encodings.pop() {
        Some(encoding) if one => Encoding::One(encoding),
        last => {
            encodings.extend(last);
            Encoding::Several(EncodingList { data: encodings })
        }
    }))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"ids": [72, 101, 108, 108, 111]}))]
pub struct DecodeBody {
    #[schema(max_items = 1000000)]
    ids: Vec<TokenId>,
}

#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[schema(minimum = 0, maximum = 4294967295u32)]
pub struct TokenId(pub u32);

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"text": "Hello"}))]
pub struct Decoding {
    text: String,
}

/// Decode token ids
///
/// Reserved ids have no text; bytes that are not UTF-8 become U+FFFD.
#[utoipa::path(
    post, path = "/v1/tokenizers/{tokenizer_id}/decode", operation_id = "decode_ids", tag = "tokenizers", params(("tokenizer_id" = String, Path)),
    request_body = DecodeBody,
    responses(
        (status = 200, description = "The text", body = Decoding),
        (status = 409, description = "The tokenizer is not ready"),
        (status = 422, description = "An id is not in the vocabulary"),
    )
)]
async fn decode_ids(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Body(body): Body<DecodeBody>,
) -> Result<Json<Decoding>, ApiError> {
    let decoded = with_tokenizer(&state, &project, &id, move |tokenizer| {
        let vocabulary = tokenizer.vocabulary();
        let ids: Vec<u32> = body.ids.iter().map(|id| id.0).collect();
        match ids.iter().position(|&id| i64::from(id) >= vocabulary) {
            Some(index) => Err(ApiError::unprocessable(
                "unknown_token",
                format!("ids[{index}]"),
                format!("The vocabulary has {vocabulary} ids, so {} is none of them.", ids[index]),
            )),
            None => Ok(tokenizer.decode(&ids)),
        }
    });
    Ok(Json(Decoding { text: decoded.await?? }))
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"count": 7, "counts": [7]}))]
pub struct TokenCount {
    /// Tokens in all.
    count: usize,
    /// One for each text.
    counts: Vec<usize>,
}

/// Count tokens
#[utoipa::path(
    post, path = "/v1/tokenizers/{tokenizer_id}/count", operation_id = "count_tokens", tag = "tokenizers", params(("tokenizer_id" = String, Path)),
    request_body = TextBody,
    responses((status = 200, description = "How many tokens", body = TokenCount), (status = 409, description = "The tokenizer is not ready"))
)]
async fn count_tokens(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Body(body): Body<TextBody>,
) -> Result<Json<TokenCount>, ApiError> {
    let (texts, _) = body.into_texts();
    let counts = with_tokenizer(&state, &project, &id, move |tokenizer| {
        tokenizer.encode_batch(&texts).iter().map(Vec::len).collect::<Vec<_>>()
    })
    .await?;
    Ok(Json(TokenCount { count: counts.iter().sum(), counts }))
}

/// Runs `work` with a ready tokenizer of the project, on a thread that may block.
async fn with_tokenizer<T: Send + 'static>(
    state: &AppState,
    project: &Project,
    id: &str,
    work: impl FnOnce(&Tokenizer) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let tokenizer = ready(state, &project.project_id, id).await?;
    lathe_jobs::waiting::blocking(move || work(&tokenizer)).await.map_err(ApiError::internal)
}

/// The project's tokenizer of that id; 404 where there is none, 409 while it is not ready.
pub(super) async fn ready(state: &AppState, project_id: &str, id: &str) -> Result<Arc<Tokenizer>, ApiError> {
    let mut conn = state.db.acquire().await?;
    let row = find(&mut conn, project_id, id).await?;
    drop(conn);
    let (ResourceState::Ready, Some(artifact)) = (row.state, row.artifact) else {
        return Err(resource::not_ready("tokenizer", id, row.state));
    };
    // Deleted since its row was read.
    let gone = || ApiError::not_found("tokenizer", id);
    state.tokenizers.load(&state.artifacts, &artifact).await?.ok_or_else(gone)
}
