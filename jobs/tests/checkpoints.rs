//! Registering and pruning checkpoints, and what keeps one from being pruned.

use lathe_jobs::{
    artifacts::Artifacts,
    checkpoints::{self, Staged},
    lease::Lease,
    queue,
};
use sqlx::PgPool;

struct World {
    db: PgPool,
    artifacts: Artifacts,
    lease: Lease,
    _root: tempfile::TempDir,
}

impl World {
    /// One running training job with a live attempt.
    async fn new(db: PgPool) -> World {
        for statement in [
            "INSERT INTO projects (id, name) VALUES ('proj_1', 'default')",
            "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
             VALUES ('runner_1', 'r', 'here', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
            "INSERT INTO jobs (id, project_id, kind, state, pool, spec, model_id, queued_at) VALUES ('ftjob-1', 'proj_1', 'train', 'running', 'device', '{}', 'model-1', now())",
            "INSERT INTO models (id, project_id, name, state, job_id, config, code_version) VALUES ('model-1', 'proj_1', 'm', 'running', 'ftjob-1', '{}', '0')",
            "INSERT INTO job_attempts (job_id, n, runner_id, lease_token, expires_at) VALUES ('ftjob-1', 1, 'runner_1', 'token', now() + interval '1 hour')",
        ] {
            sqlx::query(statement).execute(&db).await.expect("an empty database");
        }
        let root = tempfile::tempdir().expect("a temporary folder");
        let artifacts = Artifacts::open(root.path()).expect("it is writable");
        let lease = Lease { job_id: "ftjob-1".into(), attempt: 1, token: "token".into() };
        World { db, artifacts, lease, _root: root }
    }

    async fn save(&self, step: i64, best: bool) -> String {
        let folder = self.artifacts.staging("ftjob-1", 1).join(step.to_string());
        std::fs::create_dir_all(&folder).expect("it is writable");
        std::fs::write(folder.join("weights.safetensors"), "w").expect("it is writable");
        let staged = Staged { step, folder, loss: None, validation_loss: None, best };
        let mut conn = self.db.acquire().await.expect("the database is there");
        checkpoints::register(&mut conn, &self.artifacts, &self.lease, &staged).await.expect("the lease is live")
    }

    async fn prune(&self, keep: i64) -> Vec<i64> {
        let mut conn = self.db.acquire().await.expect("the database is there");
        checkpoints::prune(&mut conn, &self.artifacts, &self.lease, keep).await.expect("the lease is live");
        let left: Vec<i64> = sqlx::query_scalar("SELECT step FROM checkpoints ORDER BY step")
            .fetch_all(&self.db)
            .await
            .expect("the table is there");
        for step in 1..=6 {
            assert_eq!(self.artifacts.path(&checkpoints::key("ftjob-1", 1, step)).exists(), left.contains(&step), "{step}");
        }
        left
    }

    /// A job that starts from a checkpoint.
    async fn base_on(&self, step: i64) {
        sqlx::query(
            "INSERT INTO jobs (id, project_id, kind, state, pool, spec, base_model_id, queued_at) VALUES ('ftjob-2', 'proj_1', 'train', 'queued', 'device', '{}', $1, now())",
        )
        .bind(checkpoints::model_name("model-1", step))
        .execute(&self.db)
        .await
        .expect("a new job");
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn the_newest_the_best_and_those_in_use_stay(db: PgPool) {
    let world = World::new(db).await;
    for step in 1..=6 {
        world.save(step, step == 2).await;
    }
    sqlx::query(
        "INSERT INTO replicas (id, model_id, checkpoint_id, artifact, state, memory_bytes)
         SELECT 'replica_1', 'model-1', id, artifact, 'queued', 1 FROM checkpoints WHERE step = 1",
    )
    .execute(&world.db)
    .await
    .expect("a new replica");
    world.base_on(3).await;
    assert_eq!(world.prune(2).await, [1, 2, 3, 5, 6]);
    sqlx::query("UPDATE replicas SET state = 'stopped'").execute(&world.db).await.expect("a row");
    sqlx::query("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = 'ftjob-2'")
        .execute(&world.db)
        .await
        .expect("a row");
    assert_eq!(world.prune(2).await, [2, 5, 6]);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_job_that_is_being_created_keeps_what_it_starts_from(db: PgPool) {
    let world = World::new(db).await;
    let mut first = String::new();
    for step in 1..=3 {
        let id = world.save(step, false).await;
        if step == 1 {
            first = id;
        }
    }
    let mut creation = world.db.begin().await.expect("the database is there");
    assert!(checkpoints::hold(&mut creation, &first).await.expect("the database is there"));
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let pruned = async {
        let left = world.prune(2).await;
        assert_eq!(left, [1, 2, 3], "it waited for the creation and then saw the job");
    };
    let created = async {
        while sqlx::query_scalar::<_, i64>(waits).fetch_one(&world.db).await.expect("a count") == 0 {
            tokio::task::yield_now().await;
        }
        sqlx::query(
            "INSERT INTO jobs (id, project_id, kind, state, pool, spec, base_model_id, queued_at) VALUES ('ftjob-2', 'proj_1', 'train', 'queued', 'device', '{}', $1, now())",
        )
        .bind(checkpoints::model_name("model-1", 1))
        .execute(&mut *creation)
        .await
        .expect("a new job");
        creation.commit().await.expect("the database is there");
    };
    tokio::join!(pruned, created);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_job_s_checkpoints_stay_as_long_as_another_job_needs_one(db: PgPool) {
    let world = World::new(db).await;
    world.save(1, false).await;
    sqlx::query("UPDATE job_attempts SET ended_at = now(), outcome = 'succeeded'").execute(&world.db).await.expect("a row");
    sqlx::query("UPDATE jobs SET state = 'succeeded', finished_at = now()").execute(&world.db).await.expect("a row");
    world.base_on(1).await;
    let mut conn = world.db.acquire().await.expect("the database is there");
    match queue::delete(&mut conn, "ftjob-1").await {
        Err(queue::TransitionError::InUse { users }) => assert_eq!(users, ["ftjob-2"]),
        other => panic!("{other:?}"),
    }
    sqlx::query("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = 'ftjob-2'")
        .execute(&world.db)
        .await
        .expect("a row");
    assert_eq!(queue::delete(&mut conn, "ftjob-1").await.expect("nobody needs it"), [checkpoints::key("ftjob-1", 1, 1)]);
}
