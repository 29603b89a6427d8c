//! The stack's processes: one owner for a data directory, recovery from `kill -9` of each, a quick
//! end and a quick second start.

use std::{
    os::unix::fs::PermissionsExt,
    process::{Command, Output},
    time::{Duration, Instant},
};

use lathe_tests::{Kind, TestApp, lathe, within};

/// What the contract promises, with room for a debug build on a machine that runs other tests.
const STOPPED: Duration = Duration::from_secs(10);
const STARTED: Duration = Duration::from_secs(3);
const RECOVERED: Duration = Duration::from_secs(15);

fn run(app: &TestApp, arguments: &[&str]) -> Output {
    Command::new(lathe())
        .args(arguments)
        .env("LATHE_DATA_DIR", &app.data_dir)
        .env_remove("DATABASE_URL")
        .output()
        .expect("lathe runs")
}

/// Waits until the stack says that it is ready.
async fn ready(app: &TestApp) {
    let began = Instant::now();
    loop {
        let answer = app.client.get(format!("{}/readyz", app.url)).timeout(Duration::from_secs(2)).send().await;
        if answer.as_ref().is_ok_and(|answer| answer.status().is_success()) {
            return;
        }
        assert!(began.elapsed() < RECOVERED, "not ready again: {answer:?}\n{}", app.log_text());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn one_data_directory_has_one_server() {
    let app = TestApp::builder().embedded().start().await;
    let second = app.command().output().expect("lathe runs");
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success());
    assert!(said.contains(&app.data_dir.display().to_string()), "{said}");
    assert!(said.contains(&format!("process {}", app.processes(Kind::Serve)[0])), "{said}");
    app.get("/v1/projects").await.ok();
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("it listens").port();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let refused = Command::new(lathe())
        .args(["serve", "--listen", &format!("127.0.0.1:{port}")])
        .env("LATHE_DATA_DIR", folder.path().join("data"))
        .env_remove("DATABASE_URL")
        .output()
        .expect("lathe runs");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(said.contains(&format!("port {port} of 127.0.0.1 is in use")), "{said}");
}

#[tokio::test]
async fn the_stack_outlives_kill_9_of_each_part() {
    let app = TestApp::builder().embedded().start().await;
    for kind in [Kind::Api, Kind::Runner, Kind::Postgres] {
        let killed = app.kill(kind);
        app.replaced(kind, &killed);
        ready(&app).await;
        app.get("/v1/projects").await.ok();
    }
}

#[tokio::test]
async fn kill_9_of_serve_leaves_nothing_and_the_next_start_finds_everything() {
    let mut app = TestApp::builder().embedded().start().await;
    let made = app.post_json("/v1/projects", &serde_json::json!({"name": "kept"})).await.ok();
    app.kill_serve();
    within(STOPPED, "everything goes with serve", || {
        let kinds = [Kind::Api, Kind::Runner, Kind::Postgres, Kind::Worker, Kind::Engine];
        kinds.iter().all(|kind| app.processes(*kind).is_empty()).then_some(())
    });
    app.start_again();
    let listed = app.get("/v1/projects").await.ok();
    assert!(listed["data"].as_array().is_some_and(|all| all.iter().any(|one| one["id"] == made["id"])), "{listed}");
}

#[tokio::test]
async fn it_stops_within_ten_seconds_and_is_back_within_three() {
    let mut app = TestApp::builder().embedded().start().await;
    // The quickest of three starts: what other tests take of this machine is no part of the promise.
    let mut quickest = Duration::MAX;
    for _ in 0..3 {
        let stopped = app.stop();
        assert!(stopped < STOPPED, "{stopped:?}");
        let started = app.start_again();
        println!("stopped in {stopped:?}, ready again in {started:?}");
        quickest = quickest.min(started);
        if quickest < STARTED {
            return;
        }
    }
    panic!("no start is ready within {STARTED:?}; the quickest took {quickest:?}");
}

/// Kilobytes of memory that a process has held at most.
fn peak_memory_kb(pid: nix::unistd::Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says it");
    peak.trim().trim_end_matches(" kB").trim().parse().expect("a number")
}

#[tokio::test]
async fn an_upload_passes_through_the_api_and_does_not_stay_in_its_memory() {
    const BLOCK: usize = 1 << 20;
    const BLOCKS: usize = 400;
    let app = TestApp::start().await;
    app.get("/v1/files").await.ok();
    let api = app.processes(Kind::Api)[0];
    let before = peak_memory_kb(api);
    let blocks = futures_util::stream::iter((0..BLOCKS).map(|_| Ok::<_, std::io::Error>(vec![b'x'; BLOCK])));
    let length = (BLOCKS * BLOCK) as u64;
    let part = reqwest::multipart::Part::stream_with_length(reqwest::Body::wrap_stream(blocks), length).file_name("large.txt");
    let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
    let file = app.send(app.request(reqwest::Method::POST, "/v1/files").multipart(form)).await.ok();
    assert_eq!(file["bytes"], length);
    let grown = peak_memory_kb(api).saturating_sub(before);
    println!("an upload of {} MB: {before} kB at most before, {grown} kB more after", length >> 20);
    assert!(grown < 50_000, "{grown} kB more than {before} kB");
}

#[tokio::test]
async fn the_shell_makes_lists_and_revokes_keys() {
    let app = TestApp::builder().embedded().start().await;
    let made = run(&app, &["key", "create", "--project", "shell", "--name", "mine"]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let key = String::from_utf8(made.stdout).expect("a key is text").trim().to_owned();
    assert!(key.starts_with("sk-lathe-"), "{key}");
    app.with_key(&key).get("/v1/models").await.ok();
    app.with_key(&key).get("/v1/projects").await.refused(403);

    let listed = String::from_utf8(run(&app, &["key", "list", "--project", "shell"]).stdout).expect("a list is text");
    let row = listed.lines().find(|line| line.contains("mine")).unwrap_or_else(|| panic!("{listed}"));
    assert!(!listed.contains(&key) && row.contains(&key[key.len() - 4..]), "{listed}");
    let id = row.split_whitespace().next().expect("an id");
    assert!(run(&app, &["key", "revoke", id]).status.success());
    let began = Instant::now();
    while app.with_key(&key).get("/v1/models").await.status != 401 {
        assert!(began.elapsed() < Duration::from_secs(5), "the key still works");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!run(&app, &["key", "revoke", "key_unknown"]).status.success());
}

#[tokio::test]
async fn secrets_are_their_owners_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data_dir = folder.path().join("data");
    let made = Command::new(lathe())
        .args(["key", "list"])
        .env("LATHE_DATA_DIR", &data_dir)
        .env_remove("DATABASE_URL")
        .output()
        .expect("lathe runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for name in ["database_url", "lock"] {
        let mode = std::fs::metadata(data_dir.join(name)).expect("it is there").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    let note = std::fs::read_to_string(data_dir.join("postgres_folder")).expect("it is there");
    if note.starts_with("/var/lib/lathe") {
        std::fs::remove_dir_all(note.trim()).expect("it is ours");
    }
}
