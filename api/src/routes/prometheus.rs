//! `/metrics`, in Prometheus' text format. For an admin key or the token of its own.

use std::fmt::Write;

use axum::{
    extract::State,
    http::{HeaderMap, HeaderValue, Uri, header, request::Parts},
    response::{IntoResponse, Response},
};
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

async fn render(state: &AppState) -> Result<String, ApiError> {
    let jobs = sqlx::query!(
        r#"SELECT kind, state, count(*) AS "count!" FROM jobs WHERE deleted_at IS NULL GROUP BY kind, state ORDER BY kind, state"#
    )
    .fetch_all(&state.db)
    .await?;
    let queued = sqlx::query!(
        r#"SELECT pool, count(*) AS "count!", coalesce(extract(epoch FROM now() - min(queued_at)), 0)::float8 AS "oldest!"
           FROM jobs WHERE state = 'queued' AND finished_at IS NULL GROUP BY pool ORDER BY pool"#
    )
    .fetch_all(&state.db)
    .await?;
    let runners = sqlx::query!(
        r#"SELECT count(*) FILTER (WHERE expires_at > now()) AS "live!", count(*) FILTER (WHERE expires_at <= now()) AS "lost!"
           FROM runners WHERE stopped_at IS NULL"#
    )
    .fetch_one(&state.db)
    .await?;
    let replicas = sqlx::query!(
        r#"SELECT state, count(*) AS "count!" FROM replicas WHERE state <> 'stopped' GROUP BY state ORDER BY state"#
    )
    .fetch_all(&state.db)
    .await?;
    let free = state.free_bytes().await.map_err(ApiError::internal)?;
    let requests = state.requests.snapshot();
    let one = |value: f64| vec![(String::new(), value)];
    let families = [
        Family {
            name: "lathe_jobs",
            kind: "gauge",
            help: "Jobs by kind and state.",
            samples: jobs.iter().map(|row| (format!(r#"kind="{}",state="{}""#, row.kind, row.state), row.count as f64)).collect(),
        },
        Family {
            name: "lathe_queue_depth",
            kind: "gauge",
            help: "Jobs that wait for a slot, by pool.",
            samples: queued.iter().map(|row| (format!(r#"pool="{}""#, row.pool), row.count as f64)).collect(),
        },
        Family {
            name: "lathe_queue_oldest_seconds",
            kind: "gauge",
            help: "Age of the oldest waiting job, by pool.",
            samples: queued.iter().map(|row| (format!(r#"pool="{}""#, row.pool), row.oldest)).collect(),
        },
        Family {
            name: "lathe_runners",
            kind: "gauge",
            help: "Runners that have not stopped, by whether their lease holds.",
            samples: vec![
                (r#"state="live""#.to_owned(), runners.live as f64),
                (r#"state="lost""#.to_owned(), runners.lost as f64),
            ],
        },
        Family {
            name: "lathe_replicas",
            kind: "gauge",
            help: "Replicas of models by state.",
            samples: replicas.iter().map(|row| (format!(r#"state="{}""#, row.state), row.count as f64)).collect(),
        },
        Family {
            name: "lathe_disk_free_bytes",
            kind: "gauge",
            help: "Free bytes on the artifacts' file system.",
            samples: one(free as f64),
        },
        Family {
            name: "lathe_disk_low_mark_bytes",
            kind: "gauge",
            help: "Below this many free bytes, jobs pause.",
            samples: one(state.config.disk_low_bytes as f64),
        },
        Family {
            name: "lathe_http_requests_total",
            kind: "counter",
            help: "Answers of this process since it started.",
            samples: requests
                .iter()
                .map(|((method, route, status), count)| {
                    (format!(r#"method="{method}",route="{route}",status="{status}""#), *count as f64)
                })
                .collect(),
        },
    ];
    Ok(families.iter().map(family_text).collect())
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
