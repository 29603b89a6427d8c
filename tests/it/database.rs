//! A database that answers nothing, since a network swallows what is sent to it, in the middle of a query
//! and between two, and nobody is told; and one that answers that two were in each other's way.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use lathe_api::state::{self, ApiConfig, QUERY_DEADLINE};
use lathe_tests::{Network, PATIENCE, TestApp, lathe, within};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::json;
use sqlx::{
    Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::{
    api::Api,
    faults::{Bench, attempts},
    training::text,
};

/// More than the api has connections.
const CLIENTS: usize = 24;

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_database_that_stops_answering_is_a_503_and_costs_no_connection(_: PgPoolOptions, options: PgConnectOptions) {
    let network = Network::to(&options);
    let db = state::pool_options(QUERY_DEADLINE).connect_with(network.through(options)).await.unwrap();
    let config = ApiConfig { stuck_after: Duration::from_secs(2), ..ApiConfig::default() };
    let api = Api::start_with(db, config).await;
    let create = |client: usize, round: usize| {
        let body = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
        let request = api.request(Method::POST, "/v1/uploads").json(&body);
        // Every other creation goes on when its client is gone.
        if client.is_multiple_of(2) { request } else { request.header("idempotency-key", format!("{client}/{round}")) }.send()
    };
    assert_eq!(create(0, 0).await.unwrap().status(), 200);
    for (round, text) in [(1, "INSERT INTO uploads"), (2, "COMMIT")] {
        network.freeze_at(text);
        let began = Instant::now();
        let refused = futures_util::future::join_all((0..CLIENTS).map(|client| create(client, round))).await;
        println!("{CLIENTS} requests were answered within {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
        for answer in refused {
            let answer = answer.unwrap();
            assert_eq!(answer.status(), 503);
            assert!(answer.headers().contains_key("retry-after"));
            assert_eq!(answer.json::<serde_json::Value>().await.unwrap()["error"]["code"], "database_unavailable");
        }
        network.thaw();
        let began = Instant::now();
        while create(0, 0).await.unwrap().status() != 200 {
            assert!(began.elapsed() < PATIENCE, "it does not recover");
        }
        let answers = futures_util::future::join_all((0..CLIENTS).map(|client| create(client, round + 10))).await;
        assert!(answers.into_iter().all(|answer| answer.unwrap().status() == 200), "there are connections for all of them");
    }
}

/// Two take the same locks in opposite orders, and the request is the one that PostgreSQL ends.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_deadlock_is_a_503_and_the_repetition_creates(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let create = || {
        let body = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
        api.request(Method::POST, "/v1/uploads").header("idempotency-key", "one").json(&body).send()
    };
    let both = "CREATE FUNCTION lock_both() RETURNS trigger LANGUAGE plpgsql AS
                    'BEGIN PERFORM pg_advisory_xact_lock(1); PERFORM pg_advisory_xact_lock(2); RETURN NEW; END';
                CREATE TRIGGER lock_both BEFORE INSERT ON uploads FOR EACH ROW EXECUTE FUNCTION lock_both()";
    sqlx::raw_sql(both).execute(&db).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    // Nobody but the request is to notice.
    sqlx::raw_sql("SET LOCAL deadlock_timeout = '1min'; SELECT pg_advisory_xact_lock(2)").execute(&mut *tx).await.unwrap();
    let request = tokio::spawn(create());
    let waiting = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                   WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted";
    let began = Instant::now();
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&db).await.unwrap() == 0 {
        assert!(began.elapsed() < PATIENCE && !request.is_finished(), "the request does not wait");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sqlx::query("SELECT pg_advisory_xact_lock(1)").execute(&mut *tx).await.unwrap();
    busy(request.await.unwrap().unwrap()).await;
    tx.rollback().await.unwrap();
    assert_eq!(create().await.unwrap().status(), 200);
    assert_eq!(sqlx::query_scalar::<_, i64>("SELECT count(*) FROM uploads").fetch_one(&db).await.unwrap(), 1);
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_serialization_failure_is_a_503(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let lose = "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION SQLSTATE ''40001''; END';
                CREATE TRIGGER lose BEFORE INSERT ON uploads FOR EACH ROW EXECUTE FUNCTION lose()";
    sqlx::raw_sql(lose).execute(&db).await.unwrap();
    let body = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
    busy(api.request(Method::POST, "/v1/uploads").json(&body).send().await.unwrap()).await;
}

async fn busy(answer: reqwest::Response) {
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
    assert!(!answer.headers().contains_key("x-should-retry"));
    assert_eq!(answer.json::<serde_json::Value>().await.unwrap()["error"]["code"], "database_busy");
}

#[tokio::test]
async fn a_network_that_swallows_packets_costs_no_job_and_no_bit() {
    let network = Network::to_database();
    let bench = Bench::on(TestApp::builder().through(&network).start().await).await;
    let app = &bench.app;
    let mut direct = PgConnection::connect(&app.database_url()).await.expect("the database is there");

    // The worker trains on, and what it has done is published once the database answers again.
    let (job, _) = bench.midway().await;
    let staging = app.data_dir.join("artifacts/staging").join(text(&job["id"])).join("1");
    let registered = job["checkpoints"].as_array().and_then(|all| all.iter().filter_map(|one| one["step"].as_u64()).max());
    // In the middle of what its runner writes about it.
    network.freeze_at(text(&job["id"]));
    within(PATIENCE, "the runner writes", || network.is_frozen().then_some(()));
    within(PATIENCE, "the worker trains on", || {
        let staged = std::fs::read_dir(&staging).into_iter().flatten().flatten();
        (staged.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max() > registered).then_some(())
    });
    let asked = Instant::now();
    assert_eq!(app.get("/v1/projects").await.status, 503);
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    network.thaw();
    assert_eq!(attempts(&bench.completed(&job).await), (1, 0));

    // Cut off for longer than its lease, its job becomes another's, and nothing that it did counts.
    let (job, _) = bench.midway().await;
    network.freeze();
    let mut other = Command::new(lathe())
        .args(["runner", "--lease-seconds", "2"])
        .env("DATABASE_URL", app.database_url())
        .env("LATHE_DATA_DIR", &app.data_dir)
        .stdin(Stdio::null())
        .spawn()
        .expect("lathe starts");
    let began = Instant::now();
    let taken = "SELECT count(*) FROM job_attempts WHERE job_id = $1 AND n = 2";
    while sqlx::query_scalar::<_, i64>(taken).bind(text(&job["id"])).fetch_one(&mut direct).await.expect("a number") == 0 {
        assert!(began.elapsed() < PATIENCE, "no other runner takes the job");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    network.thaw();
    assert_eq!(attempts(&bench.completed(&job).await), (2, 0));
    let late = "SELECT count(*) FROM checkpoints c JOIN job_attempts a ON a.job_id = c.job_id AND a.n = c.attempt
                WHERE a.outcome = 'lost' AND c.created_at > a.ended_at";
    assert_eq!(sqlx::query_scalar::<_, i64>(late).fetch_one(&mut direct).await.expect("a number"), 0);
    kill(Pid::from_raw(i32::try_from(other.id()).expect("a process id")), Signal::SIGTERM).expect("it is ours");
    assert!(other.wait().expect("it is our child").success());
}
