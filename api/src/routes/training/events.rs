//! The events of a training job: a list, and a stream that goes on where it broke off.

use std::time::Duration;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, header},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use lathe_jobs::waiting::{answered, patient};
use lathe_model::protocol::Level;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Project,
    event_hub::Subscription,
    names::names,
    parse::{Path, Query},
    problem::ApiError,
    state::AppState,
};

/// Events that one query of a stream fetches.
const BATCH: i64 = 500;

/// Between comments that keep a quiet stream alive.
const COMMENT_EVERY: Duration = Duration::from_secs(15);

/// How long a stream waits for a lost database before it looks again.
const RETRY: Duration = Duration::from_secs(1);

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_training_events))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Only events after this one.
    #[param(minimum = 0, maximum = 9223372036854775807i64)]
    after: Option<i64>,
    /// Default: 100. A stream has none.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<i64>,
    /// Server-sent events, from `after` or `Last-Event-ID` on. Default: by `Accept`.
    stream: Option<bool>,
}

names! {
    LevelName(Level),
}

/// Something that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": 3, "object": "training.event", "level": "info", "code": "job.queued", "message": "Everything that the job needs is there.", "data": {}, "created_at": 1767225600.25}))]
pub struct EventObject {
    /// 1, 2, 3 … within the job.
    pub(in crate::routes) id: i64,
    object: &'static str,
    pub(in crate::routes) level: Option<LevelName>,
    /// A word for programs.
    code: String,
    pub(in crate::routes) message: String,
    #[schema(value_type = Object)]
    pub(in crate::routes) data: Value,
    /// Unix seconds, to the millisecond.
    pub(in crate::routes) created_at: f64,
}

pub(in crate::routes) struct EventRow {
    pub id: i64,
    pub level: String,
    pub code: String,
    pub message: String,
    pub data: Value,
    pub created_at: OffsetDateTime,
}

impl From<EventRow> for EventObject {
    fn from(row: EventRow) -> EventObject {
        EventObject {
            id: row.id,
            object: "training.event",
            level: serde_json::from_value(Value::String(row.level)).ok(),
            code: row.code,
            message: row.message,
            data: row.data,
            created_at: super::milliseconds(row.created_at),
        }
    }
}

/// Events in their order.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "list", "has_more": false, "data": [{"id": 3, "object": "training.event", "level": "info", "code": "job.queued",
    "message": "Everything that the job needs is there.", "data": {}, "created_at": 1767225600.25}]}))]
pub struct EventList {
    #[schema(examples("list"))]
    object: &'static str,
    data: Vec<EventObject>,
    has_more: bool,
}

/// List or follow a training job's events
///
/// With `stream=true` or `Accept: text/event-stream` the events come as server-sent events: those
/// after `Last-Event-ID` at once, then each as it happens; the stream ends after the last event of an
/// ended job.
#[utoipa::path(
    get, path = "/v1/training/jobs/{job_id}/events", operation_id = "list_training_events", tag = "training",
    params(
        ("job_id" = String, Path),
        EventsQuery,
        ("Last-Event-ID" = Option<i64>, Header, minimum = 0, maximum = 9223372036854775807i64, description = "The last event that was received"),
    ),
    responses(
        (status = 200, description = "Events in their order", content((EventList = "application/json"), (EventObject = "text/event-stream"))),
        (status = 422, description = "A stream with a `limit`"),
    )
)]
async fn list_training_events(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut conn = state.db.acquire().await?;
    super::find(&mut conn, &project.project_id, &id).await?;
    drop(conn);
    let text = |name| headers.get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok());
    let after = match text(header::HeaderName::from_static("last-event-id")) {
        Some(last) => last
            .trim()
            .parse()
            .ok()
            .filter(|id| *id >= 0)
            .ok_or_else(|| ApiError::bad_request("Last-Event-ID", "`Last-Event-ID` must be the integer id of an event."))?,
        None => query.after.unwrap_or(0),
    };
    let accepts_stream = text(header::ACCEPT).is_some_and(|accept| accept.contains("text/event-stream"));
    if query.stream.unwrap_or(accepts_stream) {
        if query.limit.is_some() {
            return Err(ApiError::unprocessable("contradiction", "limit", "A stream has no `limit`: leave either out."));
        }
        return Ok(follow(&state, id, after));
    }
    let limit = query.limit.unwrap_or(100);
    let mut rows = events_after(&state.db, &id, after, limit + 1).await?;
    let has_more = rows.len() as i64 > limit;
    rows.truncate(limit as usize);
    Ok(Json(EventList { object: "list", data: rows.into_iter().map(EventObject::from).collect(), has_more }).into_response())
}

async fn events_after(db: &PgPool, job_id: &str, after: i64, limit: i64) -> Result<Vec<EventRow>, sqlx::Error> {
    sqlx::query_as!(
        EventRow,
        "SELECT id, level, code, message, data, created_at FROM job_events WHERE job_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        job_id,
        after,
        limit,
    )
    .fetch_all(db)
    .await
}

/// A stream of the events after `after`, in a task that ends with its client.
fn follow(state: &AppState, job_id: String, after: i64) -> Response {
    let subscription = state.events.subscribe(&state.db, &job_id);
    let (sender, receiver) = mpsc::channel(16);
    let (db, shutdown) = (state.db.clone(), state.shutdown.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = send_events(&db, &job_id, after, subscription, &sender) => {}
            () = sender.closed() => {}
            () = shutdown.cancelled() => {}
        }
    });
    let keep_alive = KeepAlive::new().interval(COMMENT_EVERY).text("waiting");
    Sse::new(ReceiverStream::new(receiver)).keep_alive(keep_alive).into_response()
}

async fn send_events(
    db: &PgPool,
    job_id: &str,
    mut after: i64,
    mut subscription: Subscription,
    sender: &mpsc::Sender<Result<Event, axum::Error>>,
) {
    loop {
        match answered(send_batch(db, job_id, &mut after, sender)).await {
            Ok(Progress::More) => {}
            Ok(Progress::CaughtUp) => subscription.changed().await,
            Ok(Progress::Ended) => return,
            Err(error) => {
                tracing::warn!(%error, "a stream of events waits for the database");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

enum Progress {
    More,
    CaughtUp,
    /// The job has ended and its last event is sent, or the client is gone.
    Ended,
}

async fn send_batch(
    db: &PgPool,
    job_id: &str,
    after: &mut i64,
    sender: &mpsc::Sender<Result<Event, axum::Error>>,
) -> Result<Progress, sqlx::Error> {
    // Asked before the events are: a job seen as ended has written its last one.
    let ended = sqlx::query_scalar!(r#"SELECT finished_at IS NOT NULL AS "ended!" FROM jobs WHERE id = $1"#, job_id)
        .fetch_one(db)
        .await?;
    let rows = events_after(db, job_id, *after, BATCH).await?;
    let count = rows.len() as i64;
    for row in rows {
        *after = row.id;
        let event = Event::default().id(row.id.to_string()).json_data(EventObject::from(row));
        // A client that is slow to read is no silent database.
        if patient(sender.send(event)).await.is_err() {
            return Ok(Progress::Ended);
        }
    }
    Ok(match (count == BATCH, ended) {
        (true, _) => Progress::More,
        (false, true) => Progress::Ended,
        (false, false) => Progress::CaughtUp,
    })
}
