//! Artifacts in a bucket that several machines share: each `Artifacts` here stands for a machine.

use std::{
    fs::{self, File},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use lathe_jobs::{
    artifacts::{Artifacts, bucket::Bucket},
    housekeeping::{self, CacheLimits},
    store_id,
};
use object_store::local::LocalFileSystem;
use sqlx::PgPool;

const HOUR: Duration = Duration::from_secs(3600);

/// A bucket whose objects are files, so that a test can make them old.
struct World {
    bucket: tempfile::TempDir,
    folders: Vec<tempfile::TempDir>,
}

impl World {
    fn new() -> World {
        World { bucket: tempfile::tempdir().expect("a temporary folder"), folders: Vec::new() }
    }

    fn machine(&mut self) -> Artifacts {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let objects = LocalFileSystem::new_with_prefix(self.bucket.path()).expect("it is there");
        let bucket = Bucket::over(Arc::new(objects), "lathe/one".into());
        let artifacts = Artifacts::open(folder.path()).expect("it is writable").with_bucket(Some(bucket));
        self.folders.push(folder);
        artifacts
    }

    /// Whether anything of an artifact is in the bucket.
    fn has(&self, key: &str) -> bool {
        any_file(&self.bucket.path().join("lathe/one").join(key))
    }

    fn object(&self, key: &str, content: &str, age: Duration) {
        let path = self.bucket.path().join("lathe/one").join(key);
        fs::create_dir_all(path.parent().expect("a key has a parent")).expect("it is writable");
        fs::write(&path, content).expect("it is writable");
        made_old(&path, age);
    }
}

fn any_file(path: &Path) -> bool {
    path.is_file() || fs::read_dir(path).is_ok_and(|mut below| below.any(|entry| any_file(&entry.expect("it is ours").path())))
}

fn made_old(path: &Path, age: Duration) {
    File::open(path).and_then(|entry| entry.set_modified(SystemTime::now() - age)).expect("it is ours");
}

async fn publish_model(artifacts: &Artifacts, key: &str) {
    let staged = artifacts.staging("ftjob-1", 1).join("model");
    fs::create_dir_all(staged.join("deep")).expect("staging is writable");
    for (name, content) in [("weights.safetensors", "heavy"), ("tokenizer.json", "{}"), ("deep/more", "")] {
        fs::write(staged.join(name), content).expect("staging is writable");
    }
    artifacts.persist(&staged, key).await.expect("the bucket is there");
    artifacts.put_folder(&staged, key).expect("it is published");
    artifacts.persist(&staged, key).await.expect("repeating it does nothing");
}

#[tokio::test]
async fn what_one_machine_publishes_another_reads() {
    let mut world = World::new();
    let (one, other) = (world.machine(), world.machine());
    let mut upload = one.create("files/file-1").await.expect("a plain key");
    upload.write(b"rows").await.expect("there is room");
    assert!(!world.has("files/file-1"), "half a file");
    upload.finish().await.expect("the bucket is there");
    let file = other.fetch("files/file-1").await.expect("the bucket is there").expect("it was uploaded");
    assert_eq!(fs::read(&file).expect("it is here now"), b"rows");

    publish_model(&one, "models/model-1/1").await;
    let excerpt =
        other.fetch_files("models/model-1/1", &["tokenizer.json"]).await.expect("the bucket is there").expect("it is there");
    assert!(excerpt.join("tokenizer.json").exists() && !excerpt.join("weights.safetensors").exists());
    assert!(!other.path("models/model-1/1").exists(), "part of a folder stands where the folder must");
    let model = other.fetch("models/model-1/1").await.expect("the bucket is there").expect("it was published");
    assert_eq!(model, other.path("models/model-1/1"));
    for (name, content) in [("weights.safetensors", "heavy"), ("tokenizer.json", "{}"), ("deep/more", "")] {
        assert_eq!(fs::read_to_string(model.join(name)).expect("it is here now"), content, "{name}");
    }
    assert_eq!(fs::read_dir(other.root().join("tmp")).expect("it is there").count(), 0);

    other.remove_all(vec!["models/model-1/1".into(), "files/file-1".into(), "files/never".into()]).await.expect("all goes");
    assert!(!world.has("models/model-1/1") && !world.has("files/file-1"));
    assert!(!one.contains("models/model-1/1").await.expect("the bucket is there"));
    assert_eq!(world.machine().fetch("models/model-1/1").await.expect("the bucket is there"), None);
}

#[tokio::test]
async fn half_a_folder_is_none() {
    let mut world = World::new();
    world.object("models/model-1/1/weights.safetensors", "heavy", Duration::ZERO);
    let machine = world.machine();
    assert!(!machine.contains("models/model-1/1").await.expect("the bucket is there"));
    assert_eq!(machine.fetch("models/model-1/1").await.expect("the bucket is there"), None);
    let list = r#"{"files": [{"path": "weights.safetensors", "bytes": 6}]}"#;
    world.object("models/model-1/1/.folder", list, Duration::ZERO);
    let damaged = machine.fetch("models/model-1/1").await.expect_err("a byte is missing");
    assert!(damaged.to_string().contains("weights.safetensors") && !damaged.is_away(), "{damaged}");
    world.object("models/model-1/1/.folder", r#"{"files": [{"path": "../../x", "bytes": 1}]}"#, Duration::ZERO);
    machine.fetch("models/model-1/1").await.expect_err("it would leave the folder");
    assert!(!machine.path("models/model-1/1").exists());
    assert_eq!(fs::read_dir(machine.root().join("tmp")).expect("it is there").count(), 0);
}

#[tokio::test]
async fn a_log_is_read_where_it_was_not_written() {
    let mut world = World::new();
    let (runner, api) = (world.machine(), world.machine());
    let log = runner.log("ftjob-1", 2);
    fs::create_dir_all(log.parent().expect("it is in a folder")).expect("it is writable");
    fs::write(&log, "step 1\n").expect("it is writable");
    assert!(!api.fetch_log("ftjob-1", 2).await.expect("the bucket is there").path().exists(), "it was not shared yet");
    runner.share_log("ftjob-1", 2).await;
    let copy = api.fetch_log("ftjob-1", 2).await.expect("the bucket is there");
    assert_eq!(fs::read_to_string(copy.path()).expect("it was copied"), "step 1\n");
    let path = copy.path().to_owned();
    drop(copy);
    assert!(!path.exists(), "a copy outlives its reader");
    assert!(runner.fetch_log("ftjob-1", 2).await.expect("the bucket is there").path().exists());
}

#[sqlx::test(migrations = "../migrations")]
async fn machines_with_folders_of_their_own_share_the_store(db: PgPool) {
    let mut world = World::new();
    let (api, runner) = (world.machine(), world.machine());
    let mut conn = db.acquire().await.expect("the database is there");
    assert!(store_id::refusal(&mut conn, &runner).await.expect("the database is there").is_some());
    store_id::write(&mut conn, &api).await.expect("the bucket is there");
    assert_eq!(store_id::refusal(&mut conn, &runner).await.expect("the database is there"), None);
    let refusal =
        store_id::refusal(&mut conn, &World::new().machine()).await.expect("the database is there").expect("another bucket");
    assert!(refusal.sentence.contains("the artifact store") && refusal.sentence.contains("--artifact-store"), "{refusal:?}");
}

#[sqlx::test(migrations = "../migrations")]
async fn sweeping_reaches_the_bucket_and_nothing_in_use(db: PgPool) {
    let mut world = World::new();
    let (machine, idle) = (world.machine(), world.machine());
    for statement in [
        "INSERT INTO projects (id, name) VALUES ('proj_1', 'default')",
        "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
         VALUES ('runner_1', 'r', 'here', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
        "INSERT INTO jobs (id, project_id, kind, state, pool, spec, queued_at) VALUES
             ('ftjob-1', 'proj_1', 'train', 'running', 'device', '{}', now()), ('ftjob-2', 'proj_1', 'train', 'running', 'device', '{}', now())",
        "INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at, ended_at, outcome) VALUES
             ('ftjob-1', 1, 'runner_1', 't1', now(), now(), 'lost'), ('ftjob-2', 1, 'runner_1', 't2', now(), NULL, NULL)",
        "INSERT INTO models (id, project_id, name, state, job_id, config, code_version, artifact) VALUES
             ('model-1', 'proj_1', 'm', 'ready', 'ftjob-1', '{}', '0', 'models/model-1/1'),
             ('model-2', 'proj_1', 'm', 'running', 'ftjob-2', '{}', '0', NULL)",
    ] {
        sqlx::query(statement).execute(&db).await.expect("a change of the rows");
    }
    publish_model(&machine, "models/model-1/1").await;
    world.object("models/model-gone/1/weights.safetensors", "heavy", 2 * HOUR);
    world.object("files/file-gone", "rows", 2 * HOUR);
    world.object("logs/ftjob-gone/1.log", "step 1", 2 * HOUR);
    // Its attempt may publish it any moment, and the other may be on its way.
    world.object("models/model-2/1/weights.safetensors", "heavy", 2 * HOUR);
    world.object("files/file-coming", "rows", Duration::ZERO);

    // A copy that was not asked for lately goes, and comes back when it is; what is no copy stays.
    idle.fetch("models/model-1/1").await.expect("the bucket is there").expect("it was published");
    let own = idle.path("files/file-own");
    fs::create_dir_all(own.parent().expect("it is in a folder")).expect("it is writable");
    fs::write(&own, "rows").expect("it is writable");
    for path in [idle.path("models/model-1/1"), own.clone()] {
        made_old(&path, 15 * 24 * HOUR);
    }
    housekeeping::unused(&db, &idle, CacheLimits::default()).await.expect("the bucket is there");
    assert!(!idle.path("models/model-1/1").exists() && own.exists());
    idle.fetch("models/model-1/1").await.expect("the bucket is there").expect("it is in the bucket still");
    housekeeping::unused(&db, &idle, CacheLimits { bytes: 0, ..CacheLimits::default() }).await.expect("the bucket is there");
    assert!(idle.path("models/model-1/1").exists(), "it was asked for a moment ago");

    housekeeping::sweep(&db, &machine, CacheLimits::default()).await.expect("the bucket is there");
    for key in ["models/model-gone/1", "files/file-gone", "logs/ftjob-gone"] {
        assert!(!world.has(key), "{key} is left");
    }
    for key in ["models/model-1/1", "models/model-2/1", "files/file-coming"] {
        assert!(world.has(key), "{key} was swept");
    }
    assert!(machine.path("models/model-1/1").exists());
}
