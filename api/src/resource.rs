//! What the resources that jobs make have in common: states, failures, listings.

use axum::http::StatusCode;
use lathe_jobs::{
    ids,
    queue::{self, NewJob, QueueError, TransitionError},
    quota,
    spec::Spec,
    state::ResourceState,
};
use lathe_model::protocol::FailureCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::{
    IntoParams, ToSchema,
    openapi::{
        RefOr,
        schema::{ObjectBuilder, Schema, Type},
    },
};

use crate::{names::names, page::Order, problem::ApiError, state::AppState, train_request::MAX_ATTEMPTS};

names! {
    /// Where a dataset, tokenizer or model stands.
    StateName(ResourceState),
}

/// Why a job or what it was to make failed.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[schema(example = json!({"code": "no_valid_rows", "message": "No row of the files is valid. Look at the dataset's errors.", "param": null}))]
pub struct FailureDetail {
    #[schema(schema_with = failure_codes)]
    pub code: String,
    /// What happened and what to do.
    pub message: String,
    /// The field of the request that it comes from, where there is one.
    #[serde(default)]
    pub param: Option<String>,
}

/// The closed list of reasons; a row of another version may hold one that this version lacks.
fn failure_codes() -> impl Into<RefOr<Schema>> {
    let names = FailureCode::ALL.iter().map(|code| json!(code));
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)).description(Some("A word of a closed list."))
}

impl FailureDetail {
    pub fn from_column(column: Option<Value>) -> Option<FailureDetail> {
        column.and_then(|column| serde_json::from_value(column).ok())
    }
}

/// A deleted resource.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "dataset", "deleted": true}))]
pub struct Deleted {
    pub id: String,
    pub object: &'static str,
    pub deleted: bool,
}

/// Which part of a list of datasets or tokenizers.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Id of the last item of the page before.
    #[param(min_length = 1)]
    pub after: Option<String>,
    /// Items a page.
    #[param(minimum = 1, maximum = 100, default = 20)]
    pub limit: Option<i64>,
    #[param(inline)]
    pub order: Option<Order>,
    /// Only those in this state.
    #[param(inline)]
    pub state: Option<StateName>,
    /// Only those of this name.
    pub name: Option<String>,
}

/// Unix seconds.
pub fn seconds(time: OffsetDateTime) -> i64 {
    time.unix_timestamp()
}

/// 409 for something that unfinished work needs; `users` are their ids.
pub fn in_use(what: &str, id: &str, users: &[String]) -> ApiError {
    let message = format!("The {what} `{id}` is needed by {}: wait until they end, or cancel them.", users.join(", "));
    ApiError::conflict(message).with_code("in_use")
}

/// 409 where `users` need it.
pub fn refuse_users(what: &str, id: &str, users: &[String]) -> Result<(), ApiError> {
    if users.is_empty() { Ok(()) } else { Err(in_use(what, id, users)) }
}

/// 409 for something that is named before it could serve: it failed.
pub fn has_failed(what: &str, id: &str, param: &str) -> ApiError {
    ApiError::conflict(format!("The {what} `{id}` has failed, so nothing can be made of it. Its `error` says why."))
        .with_code("dependency_failed")
        .with_param(param)
}

/// 404 for an id in a field of the body.
pub fn unknown(what: &str, id: &str, param: &str) -> ApiError {
    ApiError::not_found(what, id).with_param(param)
}

/// The status of an answer about something still being computed.
pub fn computed_or_not(state: StateName) -> StatusCode {
    match state.0 {
        ResourceState::Queued | ResourceState::Running => StatusCode::ACCEPTED,
        ResourceState::Ready | ResourceState::Failed => StatusCode::OK,
    }
}

/// A job that cannot be added, at the edge.
pub fn not_enqueued(error: QueueError) -> ApiError {
    match error {
        QueueError::NeedNotFound(id) => ApiError::not_found("job", &id),
        QueueError::NeedFailed(id) => {
            ApiError::conflict(format!("The job `{id}` has failed or was cancelled, so nothing can wait for it."))
                .with_code("dependency_failed")
        }
        QueueError::Spec(error) => ApiError::internal(error),
        QueueError::Database(error) => error.into(),
    }
}

/// Cancels the job that makes something which is being deleted; an ended one is left alone.
pub async fn stop_making(conn: &mut PgConnection, job_id: &str) -> Result<(), ApiError> {
    match queue::cancel(conn, job_id).await {
        Ok(_) | Err(TransitionError::Illegal { .. } | TransitionError::InUse { .. } | TransitionError::NotFound) => Ok(()),
        Err(TransitionError::Database(error)) => Err(error.into()),
    }
}

/// 507 where so many bytes more are too many for the project. In the transaction that adds them, after or
/// before it does.
pub async fn require_storage(conn: &mut PgConnection, project_id: &str, more: i64) -> Result<(), ApiError> {
    match quota::exceeded_storage(conn, project_id, more).await? {
        Some(quota) => Err(ApiError::storage_quota(quota)),
        None => Ok(()),
    }
}

/// Removes what no row names any more. What cannot be removed now is left to housekeeping.
pub async fn remove_artifacts(state: &AppState, keys: Vec<String>) {
    if let Err(error) = state.artifacts.remove_all(keys).await {
        tracing::warn!(%error, "artifacts could not be removed");
    }
}

/// 409 for something that is asked to serve before it is ready.
pub fn not_ready(what: &str, id: &str, state: ResourceState) -> ApiError {
    ApiError::conflict(format!("The {what} `{id}` is {state}, not ready.")).with_code("not_ready")
}

/// A job of the light pool that nothing but what it makes or reads tells apart.
pub fn light_job(project_id: &str, name: Option<&str>, spec: Spec) -> NewJob {
    NewJob {
        id: ids::new("job"),
        project_id: project_id.to_owned(),
        name: name.map(str::to_owned),
        spec,
        request: json!({}),
        metadata: json!({}),
        priority: 0,
        max_attempts: MAX_ATTEMPTS,
        devices: 0,
        dataset_id: None,
        validation_dataset_id: None,
        tokenizer_id: None,
        base_model_id: None,
        model_id: None,
        needs: Vec::new(),
    }
}
