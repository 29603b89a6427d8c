//! Jobs of several ranks against a real Postgres: claimed as one, and in their turn.

use lathe_jobs::{
    lease::{self, Claimant, Claimed},
    queue::{self, NewJob},
    spec::Spec,
    state::Pool,
};
use serde_json::json;
use sqlx::PgPool;

/// An empty queue, and a runner in it.
async fn prepared(db: &PgPool) {
    sqlx::query(
        "WITH runner AS (
             INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
             VALUES ('runner_1', 'r', 'here', 1, '0', '[]', 1, 4, now() + interval '1 hour'))
         INSERT INTO projects (id, name) VALUES ('free', 'free'), ('full', 'full')",
    )
    .execute(db)
    .await
    .expect("an empty database");
    sqlx::query("UPDATE projects SET running_jobs_quota = 5 WHERE id = 'full'").execute(db).await.expect("it is there");
}

async fn enqueue(db: &PgPool, id: &str, project: &str, devices: i32) {
    let mut conn = db.acquire().await.expect("the database is there");
    let job = NewJob {
        id: id.into(),
        project_id: project.into(),
        name: None,
        spec: Spec::Statistics {},
        request: json!({}),
        metadata: json!({}),
        priority: 0,
        max_attempts: 3,
        devices,
        dataset_id: None,
        validation_dataset_id: None,
        tokenizer_id: None,
        base_model_id: None,
        model_id: None,
        needs: Vec::new(),
    };
    queue::enqueue(&mut conn, job).await.expect("a new job");
    sqlx::query("UPDATE jobs SET pool = 'device' WHERE id = $1").bind(id).execute(db).await.expect("it is there");
}

async fn claim(db: &PgPool, free: i32, capacity: i32) -> Option<Claimed> {
    let mut conn = db.acquire().await.expect("the database is there");
    let offered = (0..free).map(|index| json!({ "kind": "cpu", "index": index })).collect();
    let runner_id = "runner_1".into();
    let claimant = Claimant { runner_id, pool: Pool::Device, devices: free, capacity, offered, lease_seconds: 60.0 };
    lease::claim(&mut conn, &claimant).await.expect("the database is there")
}

#[sqlx::test(migrations = "../migrations")]
async fn a_gang_has_a_row_for_each_rank_and_the_devices_that_were_offered_first(db: PgPool) {
    prepared(&db).await;
    enqueue(&db, "gang", "free", 3).await;
    let claimed = claim(&db, 4, 4).await.expect("there is room");
    assert_eq!((claimed.lease.job_id.as_str(), claimed.devices), ("gang", 3));
    let ranks: Vec<(i32, serde_json::Value, String)> =
        sqlx::query_as("SELECT rank, devices, state FROM attempt_ranks ORDER BY rank").fetch_all(&db).await.expect("it is there");
    let expected = |rank: i32| (rank, json!([{ "kind": "cpu", "index": rank }]), "starting".to_owned());
    assert_eq!(ranks, [expected(0), expected(1), expected(2)]);

    let mut conn = db.acquire().await.expect("the database is there");
    lease::heartbeat(&mut conn, &claimed.lease, 60.0, &[7, 6, 5]).await.expect("the lease holds");
    let steps: Vec<(i64, String)> =
        sqlx::query_as("SELECT step, state FROM attempt_ranks ORDER BY rank").fetch_all(&db).await.expect("it is there");
    assert_eq!(steps, [(7, "running".into()), (6, "running".into()), (5, "running".into())]);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_gang_that_waits_for_devices_keeps_those_behind_it_waiting(db: PgPool) {
    for project in ["free", "full"] {
        sqlx::query("TRUNCATE projects, runners CASCADE").execute(&db).await.expect("the database is there");
        prepared(&db).await;
        enqueue(&db, "gang", project, 3).await;
        enqueue(&db, "behind", project, 1).await;
        assert!(claim(&db, 2, 4).await.is_none(), "{project}: nobody takes the devices that it waits for");
        assert_eq!(claim(&db, 3, 4).await.expect("there is room").lease.job_id, "gang");
        assert_eq!(claim(&db, 1, 4).await.expect("there is room").lease.job_id, "behind");
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn a_gang_that_a_runner_can_never_hold_is_left_for_another(db: PgPool) {
    prepared(&db).await;
    enqueue(&db, "gang", "free", 3).await;
    enqueue(&db, "behind", "free", 1).await;
    assert_eq!(claim(&db, 2, 2).await.expect("there is room").lease.job_id, "behind");
    assert!(claim(&db, 2, 2).await.is_none());
    assert_eq!(claim(&db, 3, 3).await.expect("there is room").lease.job_id, "gang");
}
