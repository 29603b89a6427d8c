//! What a worker reported is written once, also where nobody heard that it was.

use lathe_jobs::{
    lease::{Lease, LeaseError},
    metrics::{self, Batch, Event},
};
use lathe_model::protocol::{Level, MetricRow, Phase};
use serde_json::json;
use sqlx::PgPool;

async fn lease(db: &PgPool) -> Lease {
    for statement in [
        "INSERT INTO projects (id, name) VALUES ('proj_1', 'default')",
        "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
         VALUES ('runner_1', 'r', 'here', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
        "INSERT INTO jobs (id, project_id, kind, state, pool, spec, queued_at) VALUES ('ftjob-1', 'proj_1', 'train', 'running', 'device', '{}', now())",
        "INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at) VALUES ('ftjob-1', 1, 'runner_1', 'token', now() + interval '1 hour')",
    ] {
        sqlx::query(statement).execute(db).await.expect("an empty database");
    }
    Lease { job_id: "ftjob-1".into(), attempt: 1, token: "token".into() }
}

fn batch(first: u64, last: u64) -> Batch {
    let mut batch = Batch { phase: Some(Phase::Training), ..Batch::default() };
    for n in first..=last {
        batch.metric(MetricRow {
            step: n,
            loss: 1.0,
            learning_rate: 0.1,
            grad_norm: 1.0,
            tokens: 8,
            tokens_per_second: 1.0,
            validation_loss: None,
        });
        batch.events.push(Event { n, ..Event::new(Level::Info, "told", &n.to_string(), json!({})) });
    }
    batch
}

async fn told(db: &PgPool) -> Vec<(i64, String)> {
    sqlx::query_as("SELECT id, message FROM job_events WHERE code = 'told' ORDER BY id")
        .fetch_all(db)
        .await
        .expect("the table is there")
}

#[sqlx::test(migrations = "../migrations")]
async fn a_batch_whose_commit_went_unanswered_is_written_once(db: PgPool) {
    let lease = lease(&db).await;
    let mut conn = db.acquire().await.expect("the database is there");
    metrics::record(&mut conn, &lease, &batch(1, 2)).await.expect("the lease is live");
    let once = told(&db).await;
    metrics::record(&mut conn, &lease, &batch(1, 2)).await.expect("the lease is live");
    assert_eq!(told(&db).await, once);
    // What came meanwhile has joined it.
    metrics::record(&mut conn, &lease, &batch(1, 3)).await.expect("the lease is live");
    let messages: Vec<String> = told(&db).await.into_iter().map(|(_, message)| message).collect();
    assert_eq!(messages, ["1", "2", "3"]);
    let steps: Vec<i64> =
        sqlx::query_scalar("SELECT step FROM job_metrics ORDER BY step").fetch_all(&db).await.expect("the table is there");
    assert_eq!(steps, [1, 2, 3]);
    let numbers: Vec<i64> =
        sqlx::query_scalar("SELECT id FROM job_events ORDER BY id").fetch_all(&db).await.expect("the table is there");
    assert_eq!(numbers, (1..=numbers.len() as i64).collect::<Vec<_>>(), "without gaps");
}

/// The first writer is still committing when the batch is written again on another connection.
#[sqlx::test(migrations = "../migrations")]
async fn two_that_write_the_same_batch_at_once_write_it_once(db: PgPool) {
    let lease = lease(&db).await;
    let write = || async {
        let mut conn = db.acquire().await.expect("the database is there");
        metrics::record(&mut conn, &lease, &batch(1, 20)).await
    };
    let written: (Result<(), LeaseError>, _, _) = tokio::join!(write(), write(), write());
    assert!(written.0.is_ok() && written.1.is_ok() && written.2.is_ok(), "{written:?}");
    assert_eq!(told(&db).await.len(), 20);
}
