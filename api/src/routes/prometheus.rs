//! `/metrics`, in Prometheus' text format. For an admin key or the token of its own.

use std::fmt::Write;

use axum::{
    extract::State,
    http::{HeaderMap, HeaderValue, Uri, header, request::Parts},
    response::{IntoResponse, Response},
};
use sqlx::PgPool;
use subtle::ConstantTimeEq;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::{self, Admin},
    parse,
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(get_metrics))
}

/// Whoever may read the metrics.
struct Scraper;

impl axum::extract::FromRequestParts<AppState> for Scraper {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        if is_token(&parts.headers, state.config.metrics_token.as_deref()) {
            return Ok(Scraper);
        }
        Admin::from_request_parts(parts, state).await.map(|_| Scraper)
    }
}

fn is_token(headers: &HeaderMap, token: Option<&str>) -> bool {
    match (auth::bearer(headers), token) {
        (Some(given), Some(token)) => given.as_bytes().ct_eq(token.as_bytes()).into(),
        _ => false,
    }
}

/// Metrics for Prometheus
#[utoipa::path(
    get, path = "/metrics", operation_id = "get_metrics", tag = "operating",
    responses((status = 200, description = "Text", content_type = "text/plain", body = String))
)]
async fn get_metrics(State(state): State<AppState>, _: Scraper, uri: Uri) -> Result<Response, ApiError> {
    parse::refuse_query(&uri)?;
    let mut response = render(&state).await?.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    Ok(response)
}

/// One family of gauges or counters.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    /// Labels as written between the braces, and the value.
    samples: Vec<(String, f64)>,
}

impl Family {
    fn gauge(name: &'static str, help: &'static str, samples: Vec<(String, f64)>) -> Family {
        Family { name, kind: "gauge", help, samples }
    }
}

async fn render(state: &AppState) -> Result<String, ApiError> {
    let mut families = jobs(&state.db).await?;
    families.extend([runners(&state.db).await?, replicas(&state.db).await?]);
    families.extend(disk(state).await?);
    families.push(requests(state));
    Ok(families.iter().map(family_text).collect())
}

async fn jobs(db: &PgPool) -> Result<Vec<Family>, sqlx::Error> {
    let jobs = sqlx::query!(
        r#"SELECT kind, state, count(*) AS "count!" FROM jobs WHERE deleted_at IS NULL GROUP BY kind, state ORDER BY kind, state"#
    )
    .fetch_all(db)
    .await?;
    let queued = sqlx::query!(
        r#"SELECT pool, count(*) AS "count!", coalesce(extract(epoch FROM now() - min(queued_at)), 0)::float8 AS "oldest!"
           FROM jobs WHERE state = 'queued' AND finished_at IS NULL GROUP BY pool ORDER BY pool"#
    )
    .fetch_all(db)
    .await?;
    Ok(vec![
        Family::gauge(
            "lathe_jobs",
            "Jobs by kind and state.",
            jobs.iter().map(|row| (format!(r#"kind="{}",state="{}""#, row.kind, row.state), row.count as f64)).collect(),
        ),
        Family::gauge(
            "lathe_queue_depth",
            "Jobs that wait for a slot, by pool.",
            queued.iter().map(|row| (format!(r#"pool="{}""#, row.pool), row.count as f64)).collect(),
        ),
        Family::gauge(
            "lathe_queue_oldest_seconds",
            "Age of the oldest waiting job, by pool.",
            queued.iter().map(|row| (format!(r#"pool="{}""#, row.pool), row.oldest)).collect(),
        ),
    ])
}

async fn runners(db: &PgPool) -> Result<Family, sqlx::Error> {
    let runners = sqlx::query!(
        r#"SELECT count(*) FILTER (WHERE expires_at > now()) AS "live!", count(*) FILTER (WHERE expires_at <= now()) AS "lost!"
           FROM runners WHERE stopped_at IS NULL"#
    )
    .fetch_one(db)
    .await?;
    let samples = vec![(r#"state="live""#.to_owned(), runners.live as f64), (r#"state="lost""#.to_owned(), runners.lost as f64)];
    Ok(Family::gauge("lathe_runners", "Runners that have not stopped, by whether their lease holds.", samples))
}

async fn replicas(db: &PgPool) -> Result<Family, sqlx::Error> {
    let replicas = sqlx::query!(
        r#"SELECT state, count(*) AS "count!" FROM replicas WHERE state <> 'stopped' GROUP BY state ORDER BY state"#
    )
    .fetch_all(db)
    .await?;
    let samples = replicas.iter().map(|row| (format!(r#"state="{}""#, row.state), row.count as f64)).collect();
    Ok(Family::gauge("lathe_replicas", "Replicas of models by state.", samples))
}

async fn disk(state: &AppState) -> Result<[Family; 2], ApiError> {
    let free = state.free_bytes().await.map_err(ApiError::internal)?;
    let one = |bytes: u64| vec![(String::new(), bytes as f64)];
    let low_mark = one(state.config.disk_low_bytes);
    Ok([
        Family::gauge("lathe_disk_free_bytes", "Free bytes on the artifacts' file system.", one(free)),
        Family::gauge("lathe_disk_low_mark_bytes", "Below this many free bytes, jobs pause.", low_mark),
    ])
}

fn requests(state: &AppState) -> Family {
    let requests = state.requests.snapshot();
    let samples = requests
        .iter()
        .map(|((method, route, status), count)| {
            (format!(r#"method="{method}",route="{route}",status="{status}""#), *count as f64)
        })
        .collect();
    Family { name: "lathe_http_requests_total", kind: "counter", help: "Answers of this process since it started.", samples }
}

fn family_text(family: &Family) -> String {
    let mut text = format!("# HELP {0} {1}\n# TYPE {0} {2}\n", family.name, family.help, family.kind);
    for (labels, value) in &family.samples {
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}{labels} {value}", family.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_in_prometheus_format() {
        let family = Family {
            name: "x",
            kind: "gauge",
            help: "Things.",
            samples: vec![(String::new(), 1.5), (r#"a="b""#.to_owned(), 2.0)],
        };
        assert_eq!(family_text(&family), "# HELP x Things.\n# TYPE x gauge\nx 1.5\nx{a=\"b\"} 2\n");
    }
}
