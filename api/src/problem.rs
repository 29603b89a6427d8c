//! Every refusal of the API, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
//!
//! Messages say what to do and hold nothing of the inside: what went wrong within (an SQL error, a
//! path) goes to the log, under the same request id. A lost database is a 503 with `Retry-After`,
//! never a 500, and a violated constraint is the refusal that its name stands for.

use std::borrow::Cow;

use axum::{
    extract::rejection::{PathRejection, QueryRejection},
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use lathe_jobs::artifacts::ArtifactError;
use serde::Serialize;
use utoipa::ToSchema;

/// Tells OpenAI's SDKs whether to try again, whatever they make of the status.
pub const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The body of every answer that is not a success.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(example = json!({"error": {"message": "`limit` must be at least 1 and at most 100, not 0.", "type": "invalid_request_error", "param": "limit", "code": null}}))]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// A sentence that says what is wrong and what to do.
    pub message: String,
    /// The class of the error, such as `invalid_request_error`.
    pub r#type: Cow<'static, str>,
    /// The path of the offending field, such as `hyperparameters.optimizer.betas[1]`.
    pub param: Option<String>,
    /// A word for programs, where one exists.
    pub code: Option<Cow<'static, str>>,
}

/// A refusal on its way to the client.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{status}: {}", body.error.message)]
pub struct ApiError {
    pub status: StatusCode,
    pub body: Box<ErrorBody>,
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, class: &'static str, message: impl Into<String>) -> ApiError {
        let error = ErrorDetail { message: message.into(), r#type: class.into(), param: None, code: None };
        ApiError { status, body: Box::new(ErrorBody { error }), retry_after: None }
    }

    fn invalid(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError::new(status, "invalid_request_error", message)
    }

    pub fn with_code(mut self, code: impl Into<Cow<'static, str>>) -> ApiError {
        self.body.error.code = Some(code.into());
        self
    }

    /// An empty `param` stands for the request itself and is sent as null.
    pub fn with_param(mut self, param: impl Into<String>) -> ApiError {
        self.body.error.param = Some(param.into()).filter(|param| !param.is_empty());
        self
    }

    /// With `param`, a path within the field `at`, as the path from the body.
    pub fn within(self, at: &str) -> ApiError {
        let param = self.body.error.param.as_deref().map_or_else(|| at.to_owned(), |inner| format!("{at}.{inner}"));
        self.with_param(param)
    }

    /// 400: malformed or out of bounds. `param` is the full path of the field, or empty.
    pub fn bad_request(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::invalid(StatusCode::BAD_REQUEST, message).with_param(param)
    }

    pub fn unauthorized() -> ApiError {
        let message = "No valid API key was given. Send `Authorization: Bearer <key>`; `lathe key create` makes a key.";
        ApiError::invalid(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key")
    }

    pub fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message).with_code("insufficient_permissions")
    }

    /// 404 for what does not exist and for what another project owns alike.
    pub fn not_found(what: &str, id: &str) -> ApiError {
        ApiError::invalid(StatusCode::NOT_FOUND, format!("There is no {what} `{id}` in this project.")).with_code("not_found")
    }

    /// 404 for the item after which a page is asked for.
    pub fn no_such_item(id: &str) -> ApiError {
        ApiError::invalid(StatusCode::NOT_FOUND, format!("There is no `{id}` in this list to go on after."))
            .with_code("not_found")
            .with_param("after")
    }

    /// 404 for a project, which is in no other.
    pub fn no_project(id: &str) -> ApiError {
        ApiError::invalid(StatusCode::NOT_FOUND, format!("There is no project `{id}`.")).with_code("not_found")
    }

    pub fn no_route(method: &str, path: &str) -> ApiError {
        let message = format!("There is no route {method} {path}. See /docs for those there are.");
        ApiError::invalid(StatusCode::NOT_FOUND, message).with_code("unknown_url")
    }

    pub fn method_not_allowed(method: &str, path: &str) -> ApiError {
        let message = format!("{path} does not take {method}.");
        ApiError::invalid(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed")
    }

    pub fn request_timeout() -> ApiError {
        let message = "The request's body stopped arriving; send it again.";
        ApiError::invalid(StatusCode::REQUEST_TIMEOUT, message).with_code("request_timeout")
    }

    /// 409: the state of a resource, or its users, stand against it. The same request again will
    /// not help.
    pub fn conflict(message: impl Into<String>) -> ApiError {
        ApiError::invalid(StatusCode::CONFLICT, message).with_code("conflict")
    }

    /// 409 of a request whose first copy is still being answered; a retry helps.
    pub fn in_flight() -> ApiError {
        let message = "The first request with this key is still being answered; send it again in a moment.";
        let mut error = ApiError::invalid(StatusCode::CONFLICT, message).with_code("request_in_flight");
        error.retry_after = Some(1);
        error
    }

    /// 413. `limit` is in bytes.
    pub fn too_large(what: &str, limit: u64) -> ApiError {
        ApiError::invalid(StatusCode::PAYLOAD_TOO_LARGE, format!("{what} may have at most {limit} bytes.")).with_code("too_large")
    }

    pub fn unsupported_media_type(message: impl Into<String>) -> ApiError {
        ApiError::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, message).with_code("unsupported_media_type")
    }

    /// 422: valid by the schema, impossible here.
    pub fn unprocessable(code: impl Into<Cow<'static, str>>, param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::invalid(StatusCode::UNPROCESSABLE_ENTITY, message).with_code(code).with_param(param)
    }

    /// 429 with `Retry-After` in seconds.
    pub fn rate_limited(retry_after: u32, message: impl Into<String>) -> ApiError {
        let mut error =
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message).with_code("rate_limit_exceeded");
        error.retry_after = Some(retry_after);
        error
    }

    /// 503 with `Retry-After` in seconds.
    pub fn unavailable(code: impl Into<Cow<'static, str>>, retry_after: u32, message: impl Into<String>) -> ApiError {
        let mut error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).with_code(code);
        error.retry_after = Some(retry_after);
        error
    }

    /// 504: an answer took longer than the operator allows; the same again would too.
    pub fn generation_deadline(limit: std::time::Duration) -> ApiError {
        let message = format!(
            "The answer was not finished within the {} seconds that this server allows: ask for fewer tokens.",
            limit.as_secs()
        );
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "server_error", message).with_code("generation_deadline")
    }

    pub fn insufficient_storage() -> ApiError {
        let message =
            "The disk is full. Delete files, datasets or models that are no longer needed, or give the data directory more room.";
        ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", message).with_code("disk_full")
    }

    /// 507: a project may store no more. `quota` is in bytes.
    pub fn storage_quota(quota: i64) -> ApiError {
        let message = format!(
            "The project may store {quota} bytes, and this would exceed them. Delete files, datasets, models or jobs that are no longer needed, or ask an admin for more."
        );
        ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "insufficient_quota", message).with_code("storage_quota_exceeded")
    }

    /// 500. The cause goes to the log only.
    pub fn internal(cause: impl std::fmt::Display) -> ApiError {
        tracing::error!(error = %cause, "a request failed inside");
        let message = "Something failed inside the server. Its log has the cause under this answer's x-request-id.";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message).with_code("internal_error")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(&*self.body)).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        } else if [StatusCode::CONFLICT, StatusCode::INSUFFICIENT_STORAGE, StatusCode::GATEWAY_TIMEOUT].contains(&self.status) {
            // SDKs retry these statuses by themselves unless told that it is of no use.
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> ApiError {
        if let sqlx::Error::Database(cause) = &error {
            return from_database(cause.as_ref());
        }
        if is_connection_loss(&error) {
            tracing::warn!(%error, "the database cannot be reached");
            return database_lost();
        }
        ApiError::internal(error)
    }
}

impl ApiError {
    /// Whether what was asked for may have happened in spite of this answer: the database was lost in the
    /// middle of it. What no row names in the end is swept by housekeeping.
    pub fn may_have_taken_effect(&self) -> bool {
        self.status == StatusCode::SERVICE_UNAVAILABLE
    }
}

fn database_lost() -> ApiError {
    ApiError::unavailable("database_unavailable", 2, "The database cannot be reached just now; try again in a few seconds.")
}

/// Whether the connection is lost, and with it what the database would have answered.
pub(crate) fn is_connection_loss(error: &sqlx::Error) -> bool {
    matches!(
        error,
        sqlx::Error::Io(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::Protocol(_)
            | sqlx::Error::Tls(_)
    )
}

/// Classes are SQLSTATE's: 08 connection, 53 resources, 57P shutdown, 57014 a deadline, 22021 a NUL byte in
/// text.
fn from_database(cause: &dyn sqlx::error::DatabaseError) -> ApiError {
    let code = cause.code().unwrap_or_default();
    match (code.as_ref(), cause.constraint()) {
        ("53100", _) => ApiError::insufficient_storage(),
        ("25006", _) => database_lost(),
        (lost, _) if ["08", "53", "57P"].iter().any(|class| lost.starts_with(class)) => {
            tracing::warn!(error = %cause, "the database cannot be reached");
            database_lost()
        }
        ("22021" | "22P05", _) => ApiError::bad_request("", "Text may not hold the character U+0000."),
        ("40001" | "40P01" | "55P03", _) => {
            ApiError::unavailable("database_busy", 1, "Another request changed the same thing at the same time; try again.")
        }
        ("57014", _) => {
            tracing::warn!(error = %cause, "a query was given up");
            ApiError::unavailable("database_busy", 2, "The database took too long to answer; try again in a few seconds.")
        }
        (_, Some("projects_name_unique")) => ApiError::conflict("There is a project of this name already.").with_param("name"),
        (_, Some("api_keys_hash_unique")) => ApiError::conflict("This key exists already."),
        ("23505", Some(constraint)) => {
            tracing::warn!(constraint, "a unique constraint refused a request");
            ApiError::conflict("This exists already.")
        }
        ("23503", Some(constraint)) => {
            tracing::warn!(constraint, "a foreign key refused a request");
            ApiError::unprocessable("reference_gone", "", "Something that this request names was deleted meanwhile.")
        }
        _ => ApiError::internal(cause),
    }
}

impl From<ArtifactError> for ApiError {
    fn from(error: ArtifactError) -> ApiError {
        if error.is_disk_full() {
            return ApiError::insufficient_storage();
        }
        if error.is_away() {
            tracing::warn!(%error, "the artifact store cannot be reached");
            let message = "The artifact store cannot be reached just now; try again in a few seconds.";
            return ApiError::unavailable("artifact_store_unavailable", 2, message);
        }
        ApiError::internal(error)
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> ApiError {
        ApiError::bad_request("", format!("The path cannot be read: {}.", rejection.body_text().trim_end_matches('.')))
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> ApiError {
        ApiError::bad_request("", format!("The query cannot be read: {}.", rejection.body_text().trim_end_matches('.')))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_conflicts_tell_clients_not_to_retry() {
        let response = ApiError::conflict("no").into_response();
        assert_eq!(response.headers()["x-should-retry"], "false");
        let response = ApiError::in_flight().into_response();
        assert!(response.headers().get("x-should-retry").is_none());
    }

    #[test]
    fn a_lost_database_is_a_503_with_retry_after() {
        for error in [sqlx::Error::PoolTimedOut, sqlx::Error::Io(std::io::ErrorKind::ConnectionRefused.into())] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(response.headers().contains_key(header::RETRY_AFTER));
        }
    }
}
