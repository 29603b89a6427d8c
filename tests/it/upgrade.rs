//! An upgrade while jobs wait: what an older version has left in its schema goes on in the present one, in its
//! place; and what an older binary does that meets a newer schema.

use std::process::{Command, Output};

use lathe_api::MIGRATOR;
use lathe_jobs::{
    artifacts::Artifacts,
    lease::{self, Claimant},
    queue::{self, NewJob},
    reaper,
    spec::{DatasetSource, Spec},
    state::{JobState, Pool},
};
use lathe_tests::{PATIENCE, TestApp, lathe, schema_of, within};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgConnection, PgPool};

use crate::{
    faults::Bench,
    training::{path, text},
};

/// The first that had every table of jobs.
const OLDEST: i64 = 7;

/// Jobs as the first version wrote them: queued ones of two priorities, one whose runner died in the upgrade, one
/// that waits for another, one that is paused.
const QUEUE: &str = r#"
INSERT INTO projects (id, name) VALUES ('proj_default', 'default');
INSERT INTO jobs (id, project_id, kind, name, state, pool, priority, spec, queued_at, created_at, attempt, started_at)
SELECT id, 'proj_default', 'ingest', id, state, 'light', priority,
       '{"kind": "ingest", "source": {"type": "template", "rows": 1, "seed": 0, "exclude": [], "templates": []}}',
       CASE WHEN state <> 'blocked' THEN now() - make_interval(hours => age) END, now() - make_interval(hours => age),
       CASE WHEN state = 'running' THEN 1 ELSE 0 END, CASE WHEN state = 'running' THEN now() - interval '1 hour' END
FROM (VALUES ('job_second', 'queued', 0, 3), ('job_first', 'queued', 0, 5), ('job_urgent', 'queued', 5, 1), ('job_third', 'queued', 0, 2),
             ('job_lapsed', 'running', 3, 9), ('job_blocked', 'blocked', 9, 9), ('job_paused', 'paused', 9, 9)) AS old (id, state, priority, age);
INSERT INTO job_dependencies (job_id, needs) VALUES ('job_blocked', 'job_third');
INSERT INTO datasets (id, project_id, name, state, job_id, source)
SELECT 'ds' || id, 'proj_default', id, CASE state WHEN 'running' THEN 'running' ELSE 'queued' END, id, '{}' FROM jobs;
INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
VALUES ('runner_old', 'old', 'old', 1, '0.0.1', '[]', 1, 1, now() - interval '1 hour');
INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at) VALUES ('job_lapsed', 1, 'runner_old', 'token', now() - interval '1 hour');
INSERT INTO attempt_ranks (job_id, attempt, rank, runner_id, devices, state) VALUES ('job_lapsed', 1, 0, 'runner_old', '[]', 'running');
"#;

fn new_job(id: &str) -> NewJob {
    let source = DatasetSource::Template { rows: 1, seed: 0, exclude: Vec::new(), templates: Vec::new() };
    NewJob {
        id: id.into(),
        project_id: "proj_default".into(),
        name: None,
        spec: Spec::Ingest { source },
        request: json!({}),
        metadata: json!({}),
        priority: 0,
        max_attempts: 3,
        devices: 1,
        dataset_id: None,
        validation_dataset_id: None,
        tokenizer_id: None,
        base_model_id: None,
        model_id: None,
        needs: Vec::new(),
    }
}

/// Claims everything there is, in order.
async fn claim_all(conn: &mut PgConnection) -> Vec<(String, i32)> {
    let claimant = Claimant {
        runner_id: "runner_old".into(),
        pool: Pool::Light,
        devices: 1,
        capacity: 1,
        offered: json!([]),
        lease_seconds: 600.0,
    };
    let mut claimed = Vec::new();
    while let Some(job) = lease::claim(conn, &claimant).await.expect("a claim") {
        assert!(Spec::read(job.spec).is_ok());
        claimed.push((job.lease.job_id, job.lease.attempt));
    }
    claimed
}

#[sqlx::test(migrations = false)]
async fn jobs_of_every_older_schema_keep_their_place(db: PgPool) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let artifacts = Artifacts::open(folder.path()).expect("it is writable");
    let mut conn = db.acquire().await.expect("a connection");
    let newest = MIGRATOR.iter().map(|migration| migration.version).max().expect("there are some");
    let older = MIGRATOR.iter().map(|migration| migration.version).filter(|version| (OLDEST..newest).contains(version));
    for version in older {
        sqlx::raw_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public").execute(&mut *conn).await.expect("it is ours");
        schema_of(version).run(&mut *conn).await.expect("the older schema");
        sqlx::raw_sql(QUEUE).execute(&mut *conn).await.expect("the older version's rows");
        MIGRATOR.run(&mut *conn).await.expect("the upgrade");

        queue::enqueue(&mut conn, new_job("job_new")).await.expect("a new job");
        assert_eq!(reaper::sweep(&db, &artifacts).await.expect("a round"), 1, "the lapsed attempt is ended");
        let claimed = claim_all(&mut conn).await;
        let claimed: Vec<_> = claimed.iter().map(|(id, attempt)| (&id[4..], *attempt)).collect();
        let expected = [("urgent", 1), ("lapsed", 2), ("first", 1), ("second", 1), ("third", 1), ("new", 1)];
        assert_eq!(claimed, expected, "of version {version}");
        // Who waits for another, or for a client, still does.
        let resumed = queue::resume(&mut conn, "job_paused").await.expect("it is paused");
        assert_eq!((resumed, claim_all(&mut conn).await), (JobState::Queued, vec![("job_paused".to_owned(), 1)]));
        sqlx::query("UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE id = 'job_third'")
            .execute(&mut *conn)
            .await
            .expect("it is done");
        reaper::sweep(&db, &artifacts).await.expect("a round");
        assert_eq!(claim_all(&mut conn).await, [("job_blocked".to_owned(), 1)]);
    }
}

/// A dataset, a tokenizer and a model, asked for together before anything of them was there.
fn chain() -> String {
    let source = json!({"type": "template", "rows": 200, "seed": 7, "exclude": [], "templates": [
        {"instruction": "What is {{ a }} plus {{ b }}?", "output": "{{ a + b }}", "variables": {"a": {"range": [0, 99]}, "b": {"range": [0, 99]}}}]});
    let mut train: Value = serde_json::from_str(include_str!("../../jobs/tests/fixtures/spec_v1.json")).expect("it is JSON");
    train["method"] = json!({"type": "pretrain", "objective": "causal_lm"});
    train["train"]["steps"] = json!(40);
    let (ingest, config) = (json!({"kind": "ingest", "source": source}), &train["model"]);
    format!(
        "INSERT INTO projects (id, name) VALUES ('proj_default', 'default');
         INSERT INTO jobs (id, project_id, kind, state, pool, spec, dataset_id, tokenizer_id, model_id, queued_at, attempt) VALUES
             ('job_ds', 'proj_default', 'ingest', 'running', 'light', '{ingest}', 'ds_old', NULL, NULL, now() - interval '1 hour', 1),
             ('job_tok', 'proj_default', 'tokenizer', 'blocked', 'light', '{{\"kind\": \"tokenizer\", \"vocabulary\": 280}}', 'ds_old', 'tok_old', NULL, NULL, 0),
             ('ftjob-old', 'proj_default', 'train', 'blocked', 'device', '{train}', 'ds_old', 'tok_old', 'model-old', NULL, 0);
         INSERT INTO job_dependencies (job_id, needs) VALUES ('job_tok', 'job_ds'), ('ftjob-old', 'job_ds'), ('ftjob-old', 'job_tok');
         INSERT INTO datasets (id, project_id, name, state, job_id, source)
         VALUES ('ds_old', 'proj_default', 'old', 'running', 'job_ds', '{source}');
         INSERT INTO tokenizers (id, project_id, name, state, job_id, type, dataset_id, vocabulary)
         VALUES ('tok_old', 'proj_default', 'old', 'queued', 'job_tok', 'bpe', 'ds_old', 280);
         INSERT INTO models (id, project_id, name, state, job_id, dataset_id, tokenizer_id, config, code_version)
         VALUES ('model-old', 'proj_default', 'old', 'queued', 'ftjob-old', 'ds_old', 'tok_old', '{config}', '0.0.1');
         INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
         VALUES ('runner_old', 'old', 'old', 1, '0.0.1', '[]', 1, 1, now() - interval '1 hour');
         INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at)
         VALUES ('job_ds', 1, 'runner_old', 'token', now() - interval '1 hour');"
    )
}

/// The whole of it with the real processes: from rows of the first schema to a model that answers.
#[tokio::test]
async fn what_the_first_version_left_is_finished_by_this_one() {
    let app = TestApp::builder().left_by(OLDEST, &chain()).start().await;
    let done = app.wait_for("/v1/training/jobs/ftjob-old", &["succeeded"]).await;
    assert_eq!((&done["step"], &done["model"], &done["attempts"]), (&json!(40), &json!("model-old"), &json!(1)));
    assert_eq!(app.get("/v1/datasets/ds_old").await.ok()["state"], "ready");
    let asked = json!({"model": "model-old", "prompt": "What is", "max_tokens": 1});
    assert_eq!(app.post_json("/v1/completions", &asked).await.ok()["usage"]["completion_tokens"], 1);
}

fn started(part: &str, database_url: &str, folder: &std::path::Path) -> Output {
    let mut command = Command::new(lathe());
    command.args([part, "--data-dir"]).arg(folder).env("DATABASE_URL", database_url).env("LATHE_LISTEN", "127.0.0.1:0");
    command.output().expect("it runs")
}

#[sqlx::test(migrations = false)]
async fn nothing_starts_on_a_schema_that_is_too_old(db: PgPool) {
    schema_of(OLDEST).run(&db).await.expect("the older schema");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let url = db.connect_options().to_url_lossy().to_string();
    for part in ["api", "runner"] {
        let output = started(part, &url, folder.path());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("run `lathe migrate`"), "{part}: {said}");
    }
}

#[tokio::test]
async fn an_older_runner_ends_what_it_has_begun_and_takes_nothing_of_a_newer_schema() {
    let mut bench = Bench::on(TestApp::start().await).await;
    let (job, _) = bench.midway().await;
    let db = PgPool::connect(&bench.app.database_url()).await.expect("the stack's database");
    let upgrade =
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9999, '', true, '', 0)";
    sqlx::query(upgrade).execute(&db).await.expect("the table is there");
    let began = std::time::Instant::now();
    let refused = loop {
        let runners = bench.app.get("/v1/runners").await.ok();
        if let Some(refused) = runners["data"][0]["refused"].as_str() {
            break refused.to_owned();
        }
        assert!(began.elapsed() < PATIENCE, "it sees the newer schema: {runners}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert!(refused.contains("9999") && refused.contains("start the newer one"), "{refused}");
    // A light job, for which there is room beside the one that runs.
    let source = json!({"type": "template", "rows": 1, "seed": 1, "templates": [{"instruction": "a", "output": "b"}]});
    let waits = bench.app.post_json("/v1/datasets", &json!({"name": "waits", "source": source})).await.ok();
    let waits = format!("/v1/datasets/{}", text(&waits["id"]));
    bench.completed(&job).await;
    assert_eq!(bench.app.get(&path(&job)).await.ok()["attempts"], 1);
    assert_eq!(bench.app.get(&waits).await.ok()["state"], "queued");
    bench.app.get("/readyz").await.refused(503);

    bench.app.stop();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for part in ["api", "runner", "migrate"] {
        let output = started(part, &bench.app.database_url(), folder.path());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("9999") && said.contains("newer"), "{part}: {said}");
    }
    sqlx::query("DELETE FROM _sqlx_migrations WHERE version = 9999").execute(&db).await.expect("the table is there");
    db.close().await;
    bench.app.start_again();
    bench.app.wait_for(&waits, &["ready"]).await;
    within(PATIENCE, "its log says it once", || (bench.app.log_text().matches("no more is taken").count() == 1).then_some(()));
}
