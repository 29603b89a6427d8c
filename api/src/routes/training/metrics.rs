//! The metrics of a training job, as JSON or CSV.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Project,
    parse::{Path, Query},
    problem::ApiError,
    state::AppState,
};

pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_training_metrics))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MetricsFormat {
    Json,
    Csv,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct MetricsQuery {
    /// Only rows of this step and later ones.
    #[param(minimum = 0, maximum = 9223372036854775807i64)]
    from_step: Option<i64>,
    /// About so many rows, evenly spread; the last one and those with a validation loss are always
    /// there.
    #[param(minimum = 1, maximum = 100000, default = 10000)]
    points: Option<i64>,
    /// Default: by `Accept`, else json.
    #[param(inline)]
    format: Option<MetricsFormat>,
}

/// One step.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"step": 100, "loss": 2.31, "learning_rate": 0.001, "grad_norm": 0.8, "tokens": 768, "tokens_per_second": 21000.0}))]
pub struct MetricObject {
    step: i64,
    loss: f64,
    learning_rate: f64,
    grad_norm: f64,
    /// Supervised tokens of this step.
    tokens: i64,
    tokens_per_second: f64,
    /// Absent where it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    validation_loss: Option<f64>,
}

/// Rows by step.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"object": "list", "data": [{"step": 100, "loss": 2.31, "learning_rate": 0.001, "grad_norm": 0.8, "tokens": 768, "tokens_per_second": 21000.0}]}))]
pub struct MetricList {
    #[schema(examples("list"))]
    object: &'static str,
    data: Vec<MetricObject>,
}

/// List a training job's metrics
#[utoipa::path(
    get, path = "/v1/training/jobs/{job_id}/metrics", operation_id = "list_training_metrics", tag = "training", params(("job_id" = String, Path), MetricsQuery),
    responses((status = 200, description = "Rows by step", content((MetricList = "application/json"), (String = "text/csv"))))
)]
async fn list_training_metrics(
    State(state): State<AppState>,
    project: Project,
    Path(id): Path<String>,
    Query(query): Query<MetricsQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut conn = state.db.acquire().await?;
    super::find(&mut conn, &project.project_id, &id).await?;
    let data = sqlx::query_as!(
        MetricObject,
        r#"SELECT step AS "step!", loss AS "loss!", learning_rate AS "learning_rate!", grad_norm AS "grad_norm!", tokens AS "tokens!",
                  tokens_per_second AS "tokens_per_second!", validation_loss
           FROM (SELECT *, row_number() OVER (ORDER BY step) AS n, count(*) OVER () AS total FROM job_metrics WHERE job_id = $1 AND step >= $2) rows
           WHERE (n - 1) % greatest(1, (total + $3 - 1) / $3) = 0 OR n = total OR validation_loss IS NOT NULL
           ORDER BY step"#,
        id,
        query.from_step.unwrap_or(0),
        query.points.unwrap_or(10_000),
    )
    .fetch_all(&mut *conn)
    .await?;
    let accepts_csv =
        headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).is_some_and(|accept| accept.starts_with("text/csv"));
    let csv = query.format.map_or(accepts_csv, |format| format == MetricsFormat::Csv);
    if csv {
        return Ok(([(header::CONTENT_TYPE, "text/csv; charset=utf-8")], csv_of(&data)).into_response());
    }
    Ok(Json(MetricList { object: "list", data }).into_response())
}

fn csv_of(rows: &[MetricObject]) -> String {
    let mut csv = "step,loss,learning_rate,grad_norm,tokens,tokens_per_second,validation_loss\n".to_owned();
    for row in rows {
        let validation_loss = row.validation_loss.map(|loss| loss.to_string()).unwrap_or_default();
        csv += &format!(
            "{},{},{},{},{},{},{validation_loss}\n",
            row.step, row.loss, row.learning_rate, row.grad_norm, row.tokens, row.tokens_per_second
        );
    }
    csv
}
