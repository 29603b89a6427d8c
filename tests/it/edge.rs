//! The edge itself: time-outs, limits that are seen before a body is read, clients that go away, a
//! database that is slow, and repeated forms.

use std::time::{Duration, Instant};

use lathe_api::state::{self, ApiConfig};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::api::{Api, answer, form, refused};

/// Longer than anything here takes, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

async fn connect(api: &Api) -> TcpStream {
    TcpStream::connect(api.base.trim_start_matches("http://")).await.expect("the server listens")
}

async fn send(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.expect("the server reads");
}

/// The head of a form with one file, of which `length` bytes are announced, and the beginning of the body.
fn half_a_form(api: &Api, length: u64) -> String {
    format!(
        "POST /v1/files HTTP/1.1\r\nHost: lathe\r\nAuthorization: Bearer {}\r\nContent-Type: multipart/form-data; boundary=b\r\n\
         Content-Length: {length}\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.txt\"\r\n\r\nabc",
        api.key
    )
}

/// One answer with a length: its status and body.
async fn read_answer(stream: &mut TcpStream) -> (u16, Value) {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, async {
        loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length =
                    head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
                if body.len() >= length.unwrap_or(0) {
                    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
                    return (status, serde_json::from_str(body).unwrap_or_default());
                }
            }
            assert!(stream.read_buf(&mut bytes).await.expect("an answer") > 0, "closed after {text:?}");
        }
    });
    read.await.expect("an answer in time")
}

/// Whether the server ends the connection without another word.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    matches!(tokio::time::timeout(PATIENCE, stream.read(&mut byte)).await, Ok(Ok(0) | Err(_)))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_head_must_arrive_and_an_idle_connection_may_wait(db: PgPool) {
    let config = ApiConfig { header_timeout: Duration::from_millis(200), ..ApiConfig::default() };
    let api = Api::start_with(db, config).await;
    let whole = "GET /healthz HTTP/1.1\r\nHost: lathe\r\n\r\n";
    let mut slow = connect(&api).await;
    send(&mut slow, "GET /healthz HTTP/1.1\r\nHo").await;
    let mut silent = connect(&api).await;
    let mut kept = connect(&api).await;
    for _ in 0..2 {
        send(&mut kept, whole).await;
        assert_eq!(read_answer(&mut kept).await.0, 200);
        // Longer than a head may take: what is tested is that this time means nothing.
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    send(&mut kept, whole).await;
    assert_eq!(read_answer(&mut kept).await.0, 200);
    assert!(is_closed(&mut slow).await, "a head that does not go on is waited for");
    assert!(is_closed(&mut silent).await, "a connection without a head is kept");
    send(&mut kept, "GET /healthz HTTP/1.1\r\nHo").await;
    assert!(is_closed(&mut kept).await, "a later head that does not go on is waited for");
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_body_that_stops_arriving_is_a_408_and_leaves_nothing(db: PgPool) {
    let config = ApiConfig { idle_body_timeout: Duration::from_millis(200), ..ApiConfig::default() };
    let api = Api::start_with(db, config).await;
    let mut stream = connect(&api).await;
    send(&mut stream, &half_a_form(&api, 10_000)).await;
    let (status, body) = read_answer(&mut stream).await;
    assert_eq!((status, &body["error"]["code"]), (408, &json!("request_timeout")), "{body}");
    assert_eq!((api.stored("files"), api.stored("tmp")), (0, 0));
    assert_eq!(api.get("/v1/files").await.1["data"], json!([]));
}

/// How long a body may pause is one limit, how long a handler may hear nothing another.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_client_that_pauses_is_no_database_that_does_not_answer(db: PgPool) {
    let config = ApiConfig {
        idle_body_timeout: Duration::from_secs(4),
        stuck_after: Duration::from_millis(1_500),
        ..ApiConfig::default()
    };
    let api = Api::start_with(db, config).await;
    let form = half_a_form(&api, 10_000);
    for form in [form.replace("Host: lathe", "Host: lathe\r\nIdempotency-Key: one"), form] {
        let mut stream = connect(&api).await;
        send(&mut stream, &form).await;
        assert_eq!(read_answer(&mut stream).await.0, 408);
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_client_that_goes_away_leaves_nothing(db: PgPool) {
    let api = Api::start(db).await;
    let mut stream = connect(&api).await;
    send(&mut stream, &half_a_form(&api, 10_000)).await;
    until("the upload has begun", || api.stored("tmp") == 1).await;
    drop(stream);
    until("a temporary file is left", || api.stored("tmp") == 0).await;
    assert_eq!(api.stored("files"), 0);
    assert_eq!(api.get("/v1/files").await.1["data"], json!([]));
}

/// Nothing of these bodies is ever sent.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn an_announced_body_is_refused_before_it_is_read(db: PgPool) {
    let api = Api::start_with(db, ApiConfig { file_limit: 1 << 61, disk_low_bytes: 0, ..ApiConfig::default() }).await;
    let head = |path: &str, kind: &str, length: u64| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: lathe\r\nAuthorization: Bearer {}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n",
            api.key
        )
    };
    let form = "multipart/form-data; boundary=b";
    for (path, kind, length, expected) in [
        ("/v1/projects", "application/json", 5 << 20, (413, "too_large")),
        ("/v1/files", form, 1 << 62, (413, "too_large")),
        ("/v1/files", form, 1 << 60, (507, "disk_full")),
    ] {
        let mut stream = connect(&api).await;
        send(&mut stream, &head(path, kind, length)).await;
        let (status, body) = read_answer(&mut stream).await;
        assert_eq!((status, body["error"]["code"].as_str().unwrap_or_default()), expected, "{path} of {length} bytes: {body}");
    }
}

/// A client that reads no answer before its whole body is sent, as most do.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_body_that_nobody_wants_may_be_sent_to_its_end(db: PgPool) {
    let api = Api::start_with(db, ApiConfig { header_timeout: Duration::from_millis(200), ..ApiConfig::default() }).await;
    let length = 32 << 20;
    let mut stream = connect(&api).await;
    let head = format!(
        "POST /v1/projects HTTP/1.1\r\nHost: lathe\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n",
        api.key
    );
    send(&mut stream, &head).await;
    for half in 0..2 {
        for _ in 0..16 {
            stream.write_all(&vec![b' '; length / 32]).await.unwrap_or_else(|error| panic!("in half {half}: {error}"));
        }
        // Longer than a head may take, which is not what is arriving.
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    let (status, body) = read_answer(&mut stream).await;
    assert_eq!((status, &body["error"]["code"]), (413, &json!("too_large")), "{body}");
    send(&mut stream, "GET /healthz HTTP/1.1\r\nHost: lathe\r\n\r\n").await;
    assert_eq!(read_answer(&mut stream).await.0, 200, "the connection is as good as before");
}

/// Whatever is asked, and by whom.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn every_answer_has_a_request_id_and_every_refusal_its_shape(db: PgPool) {
    let api = Api::start(db).await;
    for (method, path, expected) in [
        (Method::GET, "/healthz", 200),
        (Method::GET, "/openapi.json", 200),
        (Method::GET, "/docs/", 200),
        (Method::GET, "/v1/files", 401),
        (Method::GET, "/v1/nothing", 404),
        (Method::GET, "/nothing", 404),
        (Method::GET, "/docs/nothing", 404),
        (Method::PUT, "/v1/files", 405),
        (Method::from_bytes(b"BREW").unwrap(), "/v1/files", 405),
        (Method::HEAD, "/healthz", 200),
    ] {
        let response = api.client.request(method.clone(), format!("{}{path}", api.base)).send().await.unwrap();
        let case = format!("{method} {path}");
        assert_eq!(response.status(), expected, "{case}");
        assert!(response.headers()["x-request-id"].to_str().unwrap().starts_with("req_"), "{case}");
        if expected >= 400 {
            let (status, body) = (response.status(), response.json().await.unwrap());
            refused(&case, &(status, body), &[expected]);
        }
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_slow_database_is_a_503(_: PgPoolOptions, options: PgConnectOptions) {
    let other = PgPool::connect_with(options.clone()).await.unwrap();
    let db = state::pool_options(Duration::from_millis(300)).connect_with(options).await.unwrap();
    let api = Api::start(db).await;
    assert_eq!(api.get("/v1/files").await.0, 200);
    let mut tx = other.begin().await.unwrap();
    sqlx::query("LOCK TABLE files IN ACCESS EXCLUSIVE MODE").execute(&mut *tx).await.unwrap();
    let response = api.request(Method::GET, "/v1/files").send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "database_busy");
    tx.rollback().await.unwrap();
    assert_eq!(api.get("/v1/files").await.0, 200);
}

/// Whoever ends a job locks it and then what it makes; a deletion must not go the other way.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_deletion_and_the_job_that_makes_it_do_not_lock_each_other_out(db: PgPool) {
    let api = Api::start(db.clone()).await;
    api.resources().await;
    for (table, id, job, path) in [
        ("datasets", "ds_test", "job_ds", "/v1/datasets/ds_test"),
        ("tokenizers", "tok_test", "job_tok", "/v1/tokenizers/tok_test"),
    ] {
        let mut tx = db.begin().await.unwrap();
        sqlx::query("SELECT id FROM jobs WHERE id = $1 FOR UPDATE").bind(job).execute(&mut *tx).await.unwrap();
        let deletion = tokio::spawn(answer(api.request(Method::DELETE, path)));
        wait_for_locks(&db, 1).await;
        let moved = sqlx::query(sqlx::AssertSqlSafe(format!("UPDATE {table} SET state = 'running' WHERE id = $1")));
        moved.bind(id).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        let (status, body) = deletion.await.unwrap();
        assert_eq!(status, 200, "{body}");
        let state: String = sqlx::query_scalar("SELECT state FROM jobs WHERE id = $1").bind(job).fetch_one(&db).await.unwrap();
        assert_eq!(state, "cancelled");
    }
}

/// Until so many sessions of this database wait for a lock.
async fn wait_for_locks(db: &PgPool, sessions: i64) {
    let began = Instant::now();
    loop {
        let waiting: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
        .fetch_one(db)
        .await
        .unwrap();
        if waiting >= sessions {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "nobody waits");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_form_is_repeated_by_its_content(db: PgPool) {
    let api = Api::start(db).await;
    let upload = |key: &'static str, filename: &str, content: &[u8]| {
        answer(api.request(Method::POST, "/v1/files").header("idempotency-key", key).multipart(form(filename, content)))
    };
    let first = upload("one", "a.txt", b"abc").await;
    assert_eq!(first.0, 200);
    assert_eq!(upload("one", "a.txt", b"abc").await, first, "the same form, under another boundary");
    for (case, filename, content) in [("another content", "a.txt", b"abd"), ("another name", "b.txt", b"abc")] {
        let refusal = upload("one", filename, content).await;
        assert_eq!(refused(case, &refusal, &[422]).as_deref(), Some("Idempotency-Key"));
    }
    assert_eq!((api.stored("files"), api.stored("tmp")), (1, 0));
    assert_ne!(upload("two", "a.txt", b"abc").await.1["id"], first.1["id"]);
}

#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn an_unanswered_request_is_a_409_and_a_broken_one_is_forgotten(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let mut stream = connect(&api).await;
    let half = half_a_form(&api, 10_000).replace("Host: lathe", "Host: lathe\r\nIdempotency-Key: one");
    send(&mut stream, &half).await;
    until("the upload has begun", || api.stored("tmp") == 1).await;
    let again =
        || answer(api.request(Method::POST, "/v1/files").header("idempotency-key", "one").multipart(form("a.txt", b"abc")));
    let meanwhile = again().await;
    refused("while the first is being answered", &meanwhile, &[409]);
    // However long that takes.
    sqlx::query("UPDATE idempotent_requests SET expires_at = now() + interval '8 seconds'").execute(&db).await.unwrap();
    let renewed = "SELECT bool_and(expires_at > now() + interval '30 seconds') FROM idempotent_requests";
    let began = Instant::now();
    while !sqlx::query_scalar::<_, bool>(renewed).fetch_one(&db).await.unwrap() {
        assert!(began.elapsed() < PATIENCE, "the key is not renewed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(meanwhile.1["error"]["code"], "request_in_flight");
    drop(stream);
    let began = Instant::now();
    loop {
        let (status, body) = again().await;
        if status == 200 {
            break;
        }
        assert!(status == 409 && began.elapsed() < PATIENCE, "{status} {body}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(api.stored("files"), 1);
}

/// Two that are alike at the same time are two; only a retry waits for the first.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn first_attempts_that_are_alike_are_two_requests(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let create = |count: &'static str| {
        let body = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
        answer(api.request(Method::POST, "/v1/uploads").header("x-stainless-retry-count", count).json(&body))
    };
    let mut tx = db.begin().await.unwrap();
    sqlx::query("LOCK TABLE uploads IN ACCESS EXCLUSIVE MODE").execute(&mut *tx).await.unwrap();
    let first = tokio::spawn(create("0"));
    wait_for_locks(&db, 1).await;
    let second = tokio::spawn(create("0"));
    wait_for_locks(&db, 2).await;
    refused("a retry of one that is not answered", &create("1").await, &[409]);
    tx.rollback().await.unwrap();
    let ((status, first), (other, second)) = (first.await.unwrap(), second.await.unwrap());
    assert_eq!((status.as_u16(), other.as_u16()), (200, 200), "{first} {second}");
    assert_ne!(first["id"], second["id"]);
}

/// The SDKs' own retries: of creations for ten minutes, by key and body.
#[sqlx::test(migrator = "lathe_api::MIGRATOR")]
async fn a_retry_is_known_for_ten_minutes(db: PgPool) {
    let api = Api::start(db.clone()).await;
    let create = |count: &'static str| {
        let body = json!({"filename": "a.txt", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/plain"});
        answer(api.request(Method::POST, "/v1/uploads").header("x-stainless-retry-count", count).json(&body))
    };
    let first = create("0").await;
    assert_eq!(create("1").await, first);
    assert_eq!(create("2").await, first);
    let seconds: f64 = sqlx::query_scalar("SELECT extract(epoch FROM expires_at - now())::float8 FROM idempotent_requests")
        .fetch_one(&db)
        .await
        .unwrap();
    assert!((500.0..=600.0).contains(&seconds), "kept for {seconds} s");
    sqlx::query("UPDATE idempotent_requests SET expires_at = now()").execute(&db).await.unwrap();
    let (status, later) = create("1").await;
    assert_eq!(status, 200);
    assert_ne!(later["id"], first.1["id"]);
}
