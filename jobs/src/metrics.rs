//! What a worker reports while it runs, written about once a second: metrics, progress, events.
//!
//! One fenced transaction a batch, never one insert a step. Metrics are upserted by (job, step), so a
//! resumed attempt writes over the steps that it repeats. Events are numbered within their attempt, whose
//! row says how many of them are written; so a batch whose commit went unanswered may be written again, with
//! what has come since, and nothing of it is there twice.

use std::collections::BTreeMap;

use lathe_model::{
    config::JobSpec,
    protocol::{Level, MetricRow, Numerics, Phase},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::{
    events,
    lease::{self, Lease, LeaseError},
    spec::Spec,
};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// 1, 2, 3 … within the attempt; given by the outbox.
    #[serde(default)]
    pub n: u64,
    pub level: Level,
    pub code: String,
    pub message: String,
    pub data: Value,
}

impl Event {
    /// Not numbered yet. What the database would not take is replaced.
    pub fn new(level: Level, code: &str, message: &str, data: Value) -> Event {
        let data = match data.to_string() {
            text if text.contains("\\u0000") => serde_json::from_str(&text.replace("\\u0000", "\\ufffd")).unwrap_or_default(),
            _ => data,
        };
        Event { n: 0, level, code: events::clean(code), message: events::clean(message), data }
    }
}

/// Reports that wait to be written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// By step; a later report of a step replaces an earlier one but keeps its validation loss.
    pub rows: BTreeMap<u64, MetricRow>,
    pub events: Vec<Event>,
    pub step: Option<u64>,
    #[serde(default)]
    pub seconds_per_step: Option<f64>,
    pub phase: Option<Phase>,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.events.is_empty() && self.step.is_none() && self.phase.is_none()
    }

    pub fn metric(&mut self, row: MetricRow) {
        self.step = Some(row.step);
        let kept = self.rows.get(&row.step).and_then(|earlier| earlier.validation_loss);
        let validation_loss = row.validation_loss.or(kept);
        self.rows.insert(row.step, MetricRow { validation_loss, ..row });
    }

    /// Adds what came after this batch.
    pub fn append(&mut self, later: Batch) {
        later.rows.into_values().for_each(|row| self.metric(row));
        self.events.extend(later.events);
        self.step = later.step.or(self.step);
        self.seconds_per_step = later.seconds_per_step.or(self.seconds_per_step);
        self.phase = later.phase.or(self.phase);
    }
}

/// Writes a batch under the lease.
pub async fn record(conn: &mut PgConnection, lease: &Lease, batch: &Batch) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    lease::fence(&mut tx, lease).await?;
    upsert(&mut tx, &lease.job_id, &batch.rows).await?;
    let last = batch.rows.values().next_back();
    sqlx::query!(
        "UPDATE jobs SET step = coalesce($2, step), loss = coalesce($3, loss), tokens_per_second = coalesce($4, tokens_per_second),
             seconds_per_step = coalesce($6, seconds_per_step),
             phase = CASE WHEN state = 'running' THEN coalesce($5, phase) ELSE phase END,
             first_step_at = CASE WHEN $2 > 0 THEN coalesce(first_step_at, now()) ELSE first_step_at END
         WHERE id = $1",
        lease.job_id,
        batch.step.map(signed),
        last.map(|row| row.loss),
        last.map(|row| row.tokens_per_second),
        batch.phase.map(phase_name),
        batch.seconds_per_step,
    )
    .execute(&mut *tx)
    .await?;
    announce(&mut tx, &lease.job_id, &batch.rows).await?;
    append_new(&mut tx, lease, &batch.events).await?;
    events::wake(&mut tx, &lease.job_id).await?;
    tx.commit().await?;
    Ok(())
}

/// Adds the events that the attempt has not written yet.
async fn append_new(tx: &mut PgConnection, lease: &Lease, batch: &[Event]) -> Result<(), sqlx::Error> {
    let Some(newest) = batch.iter().map(|event| event.n).max() else { return Ok(()) };
    let written = sqlx::query_scalar!("SELECT events FROM job_attempts WHERE lease_token = $1", lease.token);
    let written = written.fetch_one(&mut *tx).await?;
    for event in batch.iter().filter(|event| signed(event.n) > written) {
        events::append(tx, &lease.job_id, event.level, &event.code, &event.message, &event.data).await?;
    }
    sqlx::query!("UPDATE job_attempts SET events = greatest(events, $2) WHERE lease_token = $1", lease.token, signed(newest))
        .execute(tx)
        .await
        .map(drop)
}

/// The code of the events that carry metrics.
pub const METRICS_EVENT: &str = "metrics";

/// How many events with metrics a job has, about, besides those of its evaluations, and how many of
/// these at most: a long job's metrics are in `/metrics`, not among its events.
const ANNOUNCEMENTS: i64 = 20;
const EVALUATIONS: i64 = 1000;

fn is_announced(row: &MetricRow, steps: Option<i64>) -> bool {
    let falls_on = |share: i64| row.step.is_multiple_of(steps.map_or(1, |steps| (steps / share).max(1)).unsigned_abs());
    row.step > 0 && (falls_on(ANNOUNCEMENTS) || row.validation_loss.is_some() && falls_on(EVALUATIONS))
}

/// Adds an event for evaluations and for every twentieth of the steps, once, also where a resumed
/// attempt repeats steps. For clients that follow events and know no metrics (OpenAI's).
async fn announce(tx: &mut PgConnection, job_id: &str, rows: &BTreeMap<u64, MetricRow>) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let steps = sqlx::query_scalar!("SELECT steps FROM jobs WHERE id = $1", job_id).fetch_one(&mut *tx).await?;
    for row in rows.values().filter(|row| is_announced(row, steps)) {
        let known = sqlx::query_scalar!(
            r#"SELECT EXISTS (SELECT FROM job_events WHERE job_id = $1 AND code = $2 AND data -> 'step' = to_jsonb($3::bigint)) AS "known!""#,
            job_id,
            METRICS_EVENT,
            signed(row.step),
        )
        .fetch_one(&mut *tx)
        .await?;
        if known {
            continue;
        }
        let total = steps.map_or_else(String::new, |steps| format!("/{steps}"));
        let validation = row.validation_loss.map_or_else(String::new, |loss| format!(", validation loss={loss:.4}"));
        let message = format!("Step {}{total}: training loss={:.4}{validation}", row.step, row.loss);
        let data = json!({"step": row.step, "total_steps": steps, "train_loss": row.loss, "valid_loss": row.validation_loss});
        events::append(tx, job_id, Level::Info, METRICS_EVENT, &message, &data).await?;
    }
    Ok(())
}

async fn upsert(tx: &mut PgConnection, job_id: &str, rows: &BTreeMap<u64, MetricRow>) -> Result<(), sqlx::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    fn column<T>(rows: &BTreeMap<u64, MetricRow>, value: impl Fn(&MetricRow) -> T) -> Vec<T> {
        rows.values().map(value).collect()
    }
    sqlx::query!(
        "INSERT INTO job_metrics (job_id, step, loss, learning_rate, grad_norm, tokens, tokens_per_second, validation_loss)
         SELECT $1, * FROM unnest($2::bigint[], $3::float8[], $4::float8[], $5::float8[], $6::bigint[], $7::float8[], $8::float8[])
         ON CONFLICT (job_id, step) DO UPDATE SET loss = excluded.loss, learning_rate = excluded.learning_rate,
             grad_norm = excluded.grad_norm, tokens = excluded.tokens, tokens_per_second = excluded.tokens_per_second,
             validation_loss = coalesce(excluded.validation_loss, job_metrics.validation_loss)",
        job_id,
        &column(rows, |row| signed(row.step)),
        &column(rows, |row| row.loss),
        &column(rows, |row| row.learning_rate),
        &column(rows, |row| row.grad_norm),
        &column(rows, |row| signed(row.tokens)),
        &column(rows, |row| row.tokens_per_second),
        &column(rows, |row| row.validation_loss) as &[Option<f64>],
    )
    .execute(tx)
    .await
    .map(drop)
}

/// Notes what the attempt's bits depend on.
pub async fn started(conn: &mut PgConnection, lease: &Lease, numerics: &Numerics) -> Result<(), LeaseError> {
    let numerics = serde_json::to_value(numerics).unwrap_or_default();
    let noted =
        sqlx::query!("UPDATE job_attempts SET numerics = $2 WHERE lease_token = $1 AND ended_at IS NULL", lease.token, numerics)
            .execute(conn)
            .await?;
    if noted.rows_affected() == 1 { Ok(()) } else { Err(LeaseError::Lost) }
}

/// Writes what the first attempt found for the open fields of a training job's spec; a spec with no
/// open field stays as it is.
pub async fn resolved(conn: &mut PgConnection, lease: &Lease, found: &JobSpec) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    lease::fence(&mut tx, lease).await?;
    let column = sqlx::query_scalar!("SELECT spec FROM jobs WHERE id = $1 FOR UPDATE", lease.job_id).fetch_one(&mut *tx).await?;
    if let Ok(Spec::Train(spec)) = serde_json::from_value::<Spec>(column)
        && spec.is_open()
    {
        let spec = serde_json::to_value(Spec::Train(found.clone())).unwrap_or_default();
        sqlx::query!("UPDATE jobs SET spec = $2 WHERE id = $1", lease.job_id, spec).execute(&mut *tx).await?;
        let config = serde_json::to_value(&found.model).unwrap_or_default();
        sqlx::query!("UPDATE models SET config = $2 WHERE job_id = $1", lease.job_id, config).execute(&mut *tx).await?;
    }
    sqlx::query!(
        "UPDATE jobs SET steps = $2 WHERE id = $1 AND steps IS DISTINCT FROM $2",
        lease.job_id,
        found.train.steps.map(signed)
    )
    .execute(&mut *tx)
    .await?;
    events::wake(&mut tx, &lease.job_id).await?;
    tx.commit().await?;
    Ok(())
}

pub(crate) fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Preparing => "preparing",
        Phase::Training => "training",
        Phase::Evaluating => "evaluating",
        Phase::Publishing => "publishing",
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64, loss: f64, validation_loss: Option<f64>) -> MetricRow {
        MetricRow { step, loss, learning_rate: 1e-3, grad_norm: 1.0, tokens: 8, tokens_per_second: 100.0, validation_loss }
    }

    #[test]
    fn events_carry_a_bounded_share_of_the_metrics() {
        let announced = |steps: i64, validated: bool| {
            let rows = (0..=steps.unsigned_abs()).map(|step| row(step, 1.0, validated.then_some(1.0)));
            rows.filter(|row| is_announced(row, Some(steps))).map(|row| row.step).collect::<Vec<_>>()
        };
        assert_eq!(announced(5, false), [1, 2, 3, 4, 5]);
        assert_eq!(announced(200, false), (1..=20).map(|n| n * 10).collect::<Vec<_>>());
        assert_eq!(announced(100, true).len(), 100);
        assert_eq!(announced(50_000, true).len(), 1000);
    }

    #[test]
    fn a_batch_keeps_one_row_a_step() {
        let mut batch = Batch::default();
        batch.metric(row(1, 3.0, Some(2.5)));
        let mut later = Batch::default();
        later.metric(row(1, 2.9, None));
        later.metric(row(2, 2.8, None));
        batch.append(later);
        assert_eq!(batch.rows.values().cloned().collect::<Vec<_>>(), [row(1, 2.9, Some(2.5)), row(2, 2.8, None)]);
        assert_eq!(batch.step, Some(2));
    }
}
