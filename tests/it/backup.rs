//! Back up and restore, line by line as `docs/operations.md` says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use lathe_tests::{Kind, PATIENCE, TestApp, within};
use serde_json::json;

use crate::{
    faults::Bench,
    training::{path, text},
};

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from).arg(to));
}

/// A program of the PostgreSQL that runs the app's database.
fn postgres_program(app: &TestApp, name: &str) -> Command {
    let server = app.processes(Kind::Postgres)[0];
    let program = fs::read_link(format!("/proc/{server}/exe")).expect("it runs");
    Command::new(program.with_file_name(name))
}

#[tokio::test]
async fn a_backup_of_a_running_server_is_restored_and_its_job_goes_on() {
    let bench = Bench::on(TestApp::builder().embedded().start().await).await;
    let backup = tempfile::tempdir().expect("a temporary folder");
    let dump: PathBuf = backup.path().join("lathe.dump");
    let kept = bench.app.upload("kept.txt", "user_data", "to be kept").await;
    let (job, _) = bench.midway().await;
    let url = bench.app.database_url();
    run(postgres_program(&bench.app, "pg_dump").arg(url).arg("--format=custom").arg("--file").arg(&dump));
    let artifacts = backup.path().join("artifacts");
    fs::create_dir(&artifacts).expect("it is ours");
    for entry in fs::read_dir(bench.app.data_dir.join("artifacts")).expect("it is there") {
        let entry = entry.expect("it is readable");
        // What is being made comes and goes, and is made again.
        if !["staging", "tmp"].iter().any(|&name| entry.file_name() == name) {
            copy(&entry.path(), &artifacts);
        }
    }
    // The original goes on by itself.
    bench.completed(&job).await;

    let mut restored = TestApp::builder().embedded().start().await;
    restored.stop();
    copy(&backup.path().join("artifacts"), &restored.data_dir);
    restored.start_again();
    let mut restore = postgres_program(&restored, "pg_restore");
    restore.args(["--single-transaction", "--clean", "--if-exists", "--dbname", &restored.database_url()]).arg(&dump);
    within(PATIENCE, "it is restored beside a running server", || {
        let output = restore.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || said.contains("deadlock detected"), "{said}");
        output.status.success().then_some(())
    });
    restored.stop();
    restored.start_again();
    let content = restored.get(&format!("/v1/files/{}/content", text(&kept["id"]))).await;
    assert_eq!(content.text, "to be kept");
    let done = restored.wait_for(&path(&job), &["succeeded"]).await;
    assert!(done["attempts"].as_u64() > Some(1), "it went on here: {done}");
    let model = restored.get(&format!("/v1/models/{}", text(&done["model"]))).await.ok();
    assert_eq!(text(&model["weights_sha256"]), bench.weights);
}

#[tokio::test]
async fn a_copy_of_a_stopped_server_is_a_server_of_its_own() {
    let mut app = TestApp::builder().embedded().start().await;
    let made = app.post_json("/v1/projects", &json!({"name": "kept"})).await.ok();
    app.stop();
    let original = app.data_dir.clone();
    app.data_dir = original.with_file_name("copy");
    copy(&original, &app.data_dir);
    // Nothing of the original may be needed.
    fs::rename(&original, original.with_file_name("moved")).expect("it is ours");
    app.start_again();
    let listed = app.get("/v1/projects").await.ok();
    assert!(listed["data"].as_array().is_some_and(|all| all.iter().any(|one| one["id"] == made["id"])), "{listed}");
    assert!(!original.exists());
}
