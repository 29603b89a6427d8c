//! Creations happen once, also where the api dies in the moment of their commit.

use std::time::{Duration, Instant};

use lathe_tests::{Kind, PATIENCE, TestApp};
use reqwest::{Method, RequestBuilder, multipart};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

/// Commits of new rows wait for this advisory lock, and go on once it is free.
const HELD: i64 = 4711;

const WAITING: &str = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                       WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted";

async fn connect(app: &TestApp) -> PgConnection {
    PgConnection::connect(&app.database_url()).await.expect("the database is there")
}

async fn count(conn: &mut PgConnection, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(conn).await.expect("a number")
}

/// Sends until it is answered by something else than 409 and 5xx: what a client that was cut off does.
async fn insist(app: &TestApp, request: &impl Fn(&TestApp) -> RequestBuilder) -> (bool, Value) {
    let began = Instant::now();
    loop {
        if let Ok(answer) = request(app).timeout(Duration::from_secs(5)).send().await
            && answer.status().is_success()
        {
            let replayed = answer.headers().contains_key("idempotent-replayed");
            return (replayed, answer.json().await.expect("JSON"));
        }
        assert!(began.elapsed() < PATIENCE, "it is never answered:\n{}", app.log_text());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Kills the api while the commit of the first request waits in the database, which then commits.
async fn killed_in_the_commit(app: &TestApp, table: &'static str, request: impl Fn(&TestApp) -> RequestBuilder) {
    let (mut conn, mut watching) = (connect(app).await, connect(app).await);
    sqlx::query("SELECT pg_advisory_lock($1)").bind(HELD).execute(&mut conn).await.expect("it is free");
    let first = tokio::spawn(request(app).send());
    let began = Instant::now();
    while count(&mut watching, WAITING).await == 0 {
        assert!(began.elapsed() < PATIENCE && !first.is_finished(), "{table}: no commit is held");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let killed = app.kill(Kind::Api);
    app.replaced(Kind::Api, &killed);
    assert!(first.await.expect("it runs").is_err(), "the api died before it answered");
    sqlx::query("SELECT pg_advisory_unlock($1)").bind(HELD).execute(&mut conn).await.expect("it is ours");
    // As if the client had waited until an unanswered key is void.
    let rows: &'static str = if table == "files" { "SELECT count(*) FROM files" } else { "SELECT count(*) FROM uploads" };
    while count(&mut watching, rows).await == 0 {
        assert!(began.elapsed() < PATIENCE, "{table}: the commit is lost");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sqlx::query("UPDATE idempotent_requests SET expires_at = now() WHERE status IS NULL")
        .execute(&mut watching)
        .await
        .expect("the table is there");
    let (replayed, answer) = insist(app, &request).await;
    assert!(replayed, "{table}: the answer of the first request: {answer}");
    assert_eq!(count(&mut watching, rows).await, 1, "{table}: it is created once");
    assert_eq!(insist(app, &request).await, (true, answer));
}

#[tokio::test]
async fn a_creation_whose_api_dies_in_the_commit_is_found_by_its_repetition() {
    let app = TestApp::start().await;
    let mut conn = connect(&app).await;
    let hold = "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
                    'BEGIN PERFORM pg_advisory_xact_lock_shared(4711); RETURN NULL; END';
                CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON uploads DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold();
                CREATE CONSTRAINT TRIGGER hold AFTER INSERT ON files DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold();";
    sqlx::raw_sql(hold).execute(&mut conn).await.expect("the tables are there");
    let body = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
    killed_in_the_commit(&app, "uploads", |app| {
        app.request(Method::POST, "/v1/uploads").header("idempotency-key", "upload").json(&body)
    })
    .await;
    killed_in_the_commit(&app, "files", |app| {
        let part = multipart::Part::bytes(&b"abc"[..]).file_name("a.txt");
        let form = multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        app.request(Method::POST, "/v1/files").header("idempotency-key", "file").multipart(form)
    })
    .await;
}
