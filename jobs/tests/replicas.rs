//! Replicas, with a shell script in the engine's place.

use std::{
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use lathe_jobs::{artifacts::Artifacts, context::RunnerConfig, reaper, runner, store_id};
use sqlx::{ConnectOptions, PgPool};
use tokio::{sync::oneshot, task::JoinHandle};

const ENGINE: &str = r#"#!/bin/sh
here=$(dirname "$0")
test "$1" = engine || exit 1
test -n "$LATHE_ENGINE_SECRET" || exit 1
test -z "$DATABASE_URL" || exit 1
test -e "$here/broken" && exit 3
echo $$ > "$here/pid"
echo started >> "$here/starts"
echo '{"ready":{"address":"127.0.0.1:9","memory_bytes":70}}' >&3
test -e "$here/dies" && echo 'out of memory in layer 3' >&2 && kill -9 $$
while :; do sleep 0.05; echo '{"alive":{"open":0}}' >&3; done
"#;

struct World {
    db: PgPool,
    folder: tempfile::TempDir,
}

impl World {
    async fn new(db: PgPool) -> World {
        for statement in [
            "INSERT INTO projects (id, name) VALUES ('proj_1', 'default')",
            "INSERT INTO jobs (id, project_id, kind, state, pool, spec) VALUES ('ftjob-1', 'proj_1', 'train', 'blocked', 'device', '{}')",
            "INSERT INTO models (id, project_id, name, state, job_id, config, code_version) VALUES ('model-1', 'proj_1', 'm', 'queued', 'ftjob-1', '{}', '0')",
        ] {
            sqlx::query(statement).execute(&db).await.expect("an empty database");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let artifacts = Artifacts::open(folder.path().join("artifacts")).expect("it is writable");
        let mut conn = db.acquire().await.expect("the database is there");
        store_id::write(&mut conn, &artifacts).await.expect("it is writable");
        drop(conn);
        World { db, folder }
    }

    fn start(
        &self,
        change: impl FnOnce(&mut RunnerConfig),
    ) -> (oneshot::Sender<()>, JoinHandle<Result<(), runner::RunnerError>>) {
        let program = self.folder.path().join("lathe.sh");
        std::fs::write(&program, ENGINE).expect("it is writable");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).expect("it is ours");
        let mut config = RunnerConfig {
            program,
            lease_seconds: 1.0,
            disk_low_bytes: 0,
            ..RunnerConfig::new(self.db.connect_options().to_url_lossy().to_string(), self.folder.path().join("artifacts"))
        };
        change(&mut config);
        let (stop, stopped) = oneshot::channel();
        let running = runner::run(config, async {
            let _ = stopped.await;
        });
        (stop, tokio::spawn(running))
    }

    async fn want(&self, id: &'static str) {
        let model = self.folder.path().join("artifacts/models").join(id);
        std::fs::create_dir_all(model).expect("it is writable");
        sqlx::query("INSERT INTO replicas (id, model_id, artifact, state, memory_bytes) VALUES ($1, 'model-1', 'models/' || $1, 'queued', 70)")
            .bind(id)
            .execute(&self.db)
            .await
            .expect("a new replica");
        sqlx::query("SELECT pg_notify('lathe_replicas', $1)").bind(id).execute(&self.db).await.expect("the database is there");
    }

    async fn reaches(&self, id: &str, wanted: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let state: String =
                sqlx::query_scalar("SELECT state FROM replicas WHERE id = $1").bind(id).fetch_one(&self.db).await.expect("a row");
            if state == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{id} stays {state} and does not become {wanted}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn pid(&self) -> i32 {
        std::fs::read_to_string(self.folder.path().join("pid"))
            .expect("the engine has written it")
            .trim()
            .parse()
            .expect("a number")
    }
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("it is running");
}

#[sqlx::test(migrations = "../migrations")]
async fn a_replica_is_served_and_served_again_when_its_engine_dies(db: PgPool) {
    let world = World::new(db).await;
    let (stop, running) = world.start(|_| {});
    world.want("replica_1").await;
    world.reaches("replica_1", "ready").await;
    let first = world.pid();
    sqlx::query("CREATE TABLE seen AS SELECT lease_token FROM replicas").execute(&world.db).await.expect("a new table");
    kill(first);
    let deadline = Instant::now() + Duration::from_secs(20);
    let again = "SELECT count(*) FROM replicas WHERE state = 'ready' AND lease_token NOT IN (SELECT lease_token FROM seen)";
    while sqlx::query_scalar::<_, i64>(again).fetch_one(&world.db).await.expect("a count") == 0 {
        assert!(Instant::now() < deadline, "it is not served again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let second = world.pid();
    assert_ne!(first, second);
    let _ = stop.send(());
    running.await.expect("no panic").expect("it stops in order");
    world.reaches("replica_1", "stopped").await;
    assert!(!std::path::Path::new("/proc").join(second.to_string()).exists(), "the engine lives on");
}

#[sqlx::test(migrations = "../migrations")]
async fn idle_replicas_go_and_broken_ones_say_so(db: PgPool) {
    let world = World::new(db).await;
    let (stop, running) = world.start(|config| config.idle_seconds = 0.5);
    world.want("replica_1").await;
    world.reaches("replica_1", "stopped").await;
    std::fs::write(world.folder.path().join("broken"), "").expect("it is writable");
    world.want("replica_2").await;
    world.reaches("replica_2", "failed").await;
    let message: String = sqlx::query_scalar("SELECT error ->> 'message' FROM replicas WHERE id = 'replica_2'")
        .fetch_one(&world.db)
        .await
        .expect("it failed");
    assert!(message.starts_with("The engine ended with status"), "{message}");
    let _ = stop.send(());
    running.await.expect("no panic").expect("it stops in order");
}

#[sqlx::test(migrations = "../migrations")]
async fn memory_is_shared_out(db: PgPool) {
    let world = World::new(db).await;
    let (stop, running) = world.start(|config| config.replica_memory_bytes = 100);
    world.want("replica_1").await;
    world.reaches("replica_1", "ready").await;
    world.want("replica_2").await;
    sqlx::query("UPDATE replicas SET last_used_at = now() - interval '1 minute' WHERE id = 'replica_1'")
        .execute(&world.db)
        .await
        .expect("a row");
    world.reaches("replica_2", "ready").await;
    world.reaches("replica_1", "stopped").await;
    let _ = stop.send(());
    running.await.expect("no panic").expect("it stops in order");
}

#[sqlx::test(migrations = "../migrations")]
async fn replicas_of_a_runner_that_is_gone_are_taken_back(db: PgPool) {
    let world = World::new(db).await;
    world.want("replica_1").await;
    let artifacts = Artifacts::open(world.folder.path()).expect("it is writable");
    sqlx::query("UPDATE replicas SET state = 'ready', address = 'a', secret = 's', lease_token = 't', expires_at = now() - interval '1 second'")
        .execute(&world.db)
        .await
        .expect("a row");
    reaper::sweep(&world.db, &artifacts).await.expect("the database is there");
    world.reaches("replica_1", "queued").await;
}

#[sqlx::test(migrations = "../migrations")]
async fn an_engine_that_dies_again_and_again_fails_its_replica(db: PgPool) {
    let world = World::new(db).await;
    std::fs::write(world.folder.path().join("dies"), "").expect("it is writable");
    let (stop, running) = world.start(|_| {});
    world.want("replica_1").await;
    world.reaches("replica_1", "failed").await;
    let (message, failures): (String, i32) =
        sqlx::query_as("SELECT error ->> 'message', failures FROM replicas").fetch_one(&world.db).await.expect("it failed");
    assert_eq!(failures, 3);
    for said in ["died 3 times", "signal 9", "out of memory in layer 3"] {
        assert!(message.contains(said), "{message}");
    }
    let starts = std::fs::read_to_string(world.folder.path().join("starts")).expect("the engine has written it");
    assert_eq!(starts.lines().count(), 3);
    let _ = stop.send(());
    running.await.expect("no panic").expect("it stops in order");
}
