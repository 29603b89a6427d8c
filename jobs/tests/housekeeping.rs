//! What housekeeping sweeps, and what it leaves alone.

use std::{
    fs::{self, File},
    time::{Duration, SystemTime},
};

use lathe_jobs::{
    artifacts::Artifacts,
    housekeeping::{self, CacheLimits},
};
use sqlx::PgPool;

const HOUR: Duration = Duration::from_secs(3600);

struct World {
    db: PgPool,
    artifacts: Artifacts,
    _root: tempfile::TempDir,
}

impl World {
    async fn new(db: PgPool) -> World {
        let root = tempfile::tempdir().expect("a temporary folder");
        let artifacts = Artifacts::open(root.path()).expect("it is writable");
        let world = World { db, artifacts, _root: root };
        world
            .rows(&[
                "INSERT INTO projects (id, name) VALUES ('proj_1', 'default')",
                "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
                 VALUES ('runner_1', 'r', 'here', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
                "INSERT INTO jobs (id, project_id, kind, state, pool, spec, queued_at) VALUES ('ftjob-1', 'proj_1', 'train', 'running', 'device', '{}', now())",
            ])
            .await;
        world
    }

    async fn rows(&self, statements: &[&'static str]) {
        for statement in statements {
            sqlx::query(*statement).execute(&self.db).await.expect("a change of the rows");
        }
    }

    /// Something at a key, changed so long ago; with `folder`, a folder with something in it.
    fn put(&self, key: &str, folder: bool, age: Duration) {
        let path = self.artifacts.path(key);
        let file = if folder { path.join("content") } else { path.clone() };
        fs::create_dir_all(file.parent().expect("a key has a parent")).expect("it is writable");
        fs::write(&file, "x").expect("it is writable");
        File::open(&path).and_then(|entry| entry.set_modified(SystemTime::now() - age)).expect("it is ours");
    }

    async fn sweep(&self, cache: CacheLimits) {
        housekeeping::sweep(&self.db, &self.artifacts, cache).await.expect("the database is there");
    }

    #[track_caller]
    fn are(&self, there: bool, keys: &[&str]) {
        for key in keys {
            assert_eq!(self.artifacts.path(key).exists(), there, "{key}");
        }
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn it_sweeps_what_nothing_refers_to_and_nothing_else(db: PgPool) {
    let world = World::new(db).await;
    world
        .rows(&[
            "INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at, ended_at, outcome) VALUES
                 ('ftjob-1', 1, 'runner_1', 't1', now(), now(), 'lost'), ('ftjob-1', 2, 'runner_1', 't2', now(), NULL, NULL)",
            "INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, artifact, expires_at, deleted_at) VALUES
                 ('file-expired', 'proj_1', 'a', 'user_data', 1, '0', 'files/file-expired', now() - interval '1 day', NULL),
                 ('file-deleted', 'proj_1', 'a', 'user_data', 1, '0', 'files/file-deleted', NULL, now()),
                 ('file-kept', 'proj_1', 'b', 'user_data', 1, '0', 'files/file-kept', NULL, NULL)",
            "INSERT INTO uploads (id, project_id, filename, purpose, mime_type, bytes, state, expires_at) VALUES
                 ('upload_old', 'proj_1', 'a', 'user_data', 'text/plain', 1, 'pending', now() - interval '1 day'),
                 ('upload_new', 'proj_1', 'a', 'user_data', 'text/plain', 1, 'pending', now() + interval '1 day')",
            "INSERT INTO upload_parts (id, upload_id, bytes, sha256, artifact) VALUES
                 ('part-old', 'upload_old', 1, '0', 'parts/part-old'), ('part-kept', 'upload_new', 1, '0', 'parts/part-kept')",
            "INSERT INTO jobs (id, project_id, kind, state, pool, spec, finished_at, deleted_at) VALUES
                 ('job_deleted', 'proj_1', 'ingest', 'cancelled', 'light', '{}', now(), now())",
            "INSERT INTO datasets (id, project_id, name, state, job_id, source, artifact) VALUES
                 ('ds_1', 'proj_1', 'd', 'ready', 'ftjob-1', '{}', 'datasets/ds_1/2')",
            "INSERT INTO tokenizers (id, project_id, name, state, job_id, type, artifact) VALUES
                 ('tok_1', 'proj_1', 't', 'ready', 'ftjob-1', 'bpe', 'tokenizers/tok_1/1')",
            "INSERT INTO models (id, project_id, name, state, job_id, config, code_version, artifact) VALUES
                 ('model-1', 'proj_1', 'm', 'ready', 'ftjob-1', '{}', '0', 'models/model-1/1')",
            "INSERT INTO checkpoints (id, job_id, attempt, step, artifact, bytes) VALUES ('ftckpt_1', 'ftjob-1', 1, 20, 'checkpoints/ftjob-1/1/20', 1)",
            "INSERT INTO idempotent_requests (project_id, key, body_sha256, expires_at) VALUES ('proj_1', 'k', '0', now() - interval '1 day')",
        ])
        .await;
    let gone = ["files/file-expired", "files/file-deleted", "files/file-unknown", "parts/part-old", "parts/part-unknown"];
    let gone_folders = [
        "datasets/ds_1/1",
        "datasets/ds_unknown/1",
        "tokenizers/tok_1/3",
        "models/model-gone/1",
        "checkpoints/ftjob-1/1/10",
        "staging/job_gone",
        "logs/job_deleted",
        "logs/job_unknown",
    ];
    let kept = ["files/file-kept", "parts/part-kept"];
    let kept_folders = [
        "datasets/ds_1/2",
        "tokenizers/tok_1/1",
        "models/model-1/1",
        "checkpoints/ftjob-1/1/20",
        // Registered any moment: its attempt runs.
        "checkpoints/ftjob-1/2/30",
        "staging/ftjob-1",
        "logs/ftjob-1",
    ];
    for (keys, folder) in [(&gone[..], false), (&gone_folders, true), (&kept, false), (&kept_folders, true)] {
        keys.iter().for_each(|key| world.put(key, folder, 50 * HOUR));
    }
    let fresh = ["files/file-fresh", "parts/part-fresh", "tmp/fresh"];
    fresh.iter().for_each(|key| world.put(key, false, Duration::ZERO));
    let fresh_folders = ["datasets/ds_fresh/1", "models/model-fresh/1", "checkpoints/ftjob-1/1/40", "staging/job_fresh"];
    fresh_folders.iter().for_each(|key| world.put(key, true, Duration::ZERO));
    world.put("tmp/left", false, 50 * HOUR);
    // What is no key of the store is not housekeeping's.
    world.put("store_id", false, 50 * HOUR);
    world.put("notes/of-a-person", false, 5000 * HOUR);

    world.sweep(CacheLimits::default()).await;
    for keys in [&gone[..], &gone_folders, &["tmp/left", "datasets/ds_unknown", "models/model-gone"]] {
        world.are(false, keys);
    }
    for keys in [&kept[..], &kept_folders, &fresh, &fresh_folders, &["store_id", "notes/of-a-person"]] {
        world.are(true, keys);
    }
    let states: Vec<String> =
        sqlx::query_scalar("SELECT state FROM uploads ORDER BY id").fetch_all(&world.db).await.expect("rows");
    assert_eq!(states, ["pending", "expired"]);
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM idempotent_requests").fetch_one(&world.db).await.expect("a count");
    assert_eq!(left, 0);
}

#[sqlx::test(migrations = "../migrations")]
async fn an_expired_file_stays_while_something_is_made_of_it(db: PgPool) {
    let world = World::new(db).await;
    world
        .rows(&["INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, artifact, expires_at)
                 VALUES ('file-1', 'proj_1', 'a', 'user_data', 1, '0', 'files/file-1', now() - interval '1 day')"])
        .await;
    world.put("files/file-1", false, 50 * HOUR);
    // As the API creates a dataset: it holds the file, and its rows are not to be seen yet.
    let mut creation = world.db.begin().await.expect("the database is there");
    sqlx::query("SELECT id FROM files WHERE id = 'file-1' FOR KEY SHARE").fetch_one(&mut *creation).await.expect("it is there");
    sqlx::query("INSERT INTO datasets (id, project_id, name, state, job_id, source) VALUES ('ds_1', 'proj_1', 'd', 'queued', 'ftjob-1', '{}')")
        .execute(&mut *creation)
        .await
        .expect("a new dataset");
    sqlx::query("INSERT INTO dataset_files (dataset_id, position, file_id) VALUES ('ds_1', 0, 'file-1')")
        .execute(&mut *creation)
        .await
        .expect("a new row");
    world.sweep(CacheLimits::default()).await;
    world.are(true, &["files/file-1"]);
    creation.commit().await.expect("the database is there");
    world.sweep(CacheLimits::default()).await;
    world.are(true, &["files/file-1"]);
    world.rows(&["UPDATE datasets SET state = 'ready'"]).await;
    world.sweep(CacheLimits::default()).await;
    world.are(false, &["files/file-1"]);
}

#[sqlx::test(migrations = "../migrations")]
async fn what_an_ended_job_kept_for_others_goes_when_they_have_gone(db: PgPool) {
    let world = World::new(db).await;
    world
        .rows(&[
            r#"UPDATE jobs SET state = 'succeeded', finished_at = now(), spec = '{"train": {"keep_checkpoints": 2}}'"#,
            "INSERT INTO models (id, project_id, name, state, job_id, config, code_version) VALUES ('model-1', 'proj_1', 'm', 'ready', 'ftjob-1', '{}', '0')",
            "INSERT INTO checkpoints (id, job_id, attempt, step, artifact, bytes, best)
                 SELECT 'ftckpt_' || n, 'ftjob-1', 1, n, 'checkpoints/ftjob-1/1/' || n, 1, n = 1 FROM generate_series(1, 5) n",
            "INSERT INTO replicas (id, model_id, checkpoint_id, artifact, state, memory_bytes) VALUES ('replica_1', 'model-1', 'ftckpt_2', 'checkpoints/ftjob-1/1/2', 'stopping', 1)",
        ])
        .await;
    (1..=5).for_each(|step| world.put(&format!("checkpoints/ftjob-1/1/{step}"), true, Duration::ZERO));
    world.sweep(CacheLimits::default()).await;
    world
        .are(true, &["checkpoints/ftjob-1/1/1", "checkpoints/ftjob-1/1/2", "checkpoints/ftjob-1/1/4", "checkpoints/ftjob-1/1/5"]);
    world.are(false, &["checkpoints/ftjob-1/1/3"]);
    world.rows(&["UPDATE replicas SET state = 'stopped'"]).await;
    world.sweep(CacheLimits::default()).await;
    world.are(false, &["checkpoints/ftjob-1/1/2"]);
}

#[sqlx::test(migrations = "../migrations")]
async fn token_shards_go_by_age_and_size_and_never_while_they_may_be_in_use(db: PgPool) {
    let world = World::new(db).await;
    let day = 24 * HOUR;
    let put_all = || {
        for (name, age) in [
            ("new", HOUR),
            ("recent", 2 * day),
            ("older", 3 * day),
            ("oldest", 30 * day),
            ("made.1.tmp", 2 * day),
            ("being-made.2.tmp", HOUR),
        ] {
            world.put(&format!("cache/shards/{name}"), true, age);
        }
    };
    let all = |names: &[&str]| names.iter().map(|name| format!("cache/shards/{name}")).collect::<Vec<_>>();
    let are = |there, names: &[&str]| world.are(there, &all(names).iter().map(String::as_str).collect::<Vec<_>>());
    put_all();
    world.sweep(CacheLimits::default()).await;
    are(true, &["new", "recent", "older", "being-made.2.tmp"]);
    are(false, &["oldest", "made.1.tmp"]);

    // Two bytes are kept, of those used last.
    world.sweep(CacheLimits { bytes: 2, ..CacheLimits::default() }).await;
    are(true, &["new", "recent"]);
    are(false, &["older"]);

    // A training that began two and a half days ago may have opened what was touched since.
    put_all();
    world
        .rows(&["INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at, started_at)
                 VALUES ('ftjob-1', 1, 'runner_1', 't', now(), now() - interval '60 hours')"])
        .await;
    world.sweep(CacheLimits { bytes: 0, ..CacheLimits::default() }).await;
    are(true, &["new", "recent"]);
    are(false, &["older", "oldest"]);
    world.rows(&["UPDATE job_attempts SET ended_at = now(), outcome = 'lost'"]).await;
    world.sweep(CacheLimits { bytes: 0, ..CacheLimits::default() }).await;
    are(false, &["new", "recent"]);
}
