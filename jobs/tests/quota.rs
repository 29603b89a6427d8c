//! Quotas on running jobs against a real Postgres: who is passed by, in which order, and by how many at once.

use lathe_jobs::{
    artifacts::Artifacts,
    ending::{self, Ending},
    lease::{self, Claimant, Lease},
    queue::{self, NewJob},
    quota::{self, Quotas},
    spec::Spec,
    state::Pool,
};
use serde_json::json;
use sqlx::{PgPool, Postgres, Transaction};
use tokio::task::JoinSet;

struct World {
    db: PgPool,
    artifacts: Artifacts,
    _root: tempfile::TempDir,
}

impl World {
    /// Projects with these quotas on running jobs.
    async fn new(db: PgPool, projects: &[(&str, Option<i32>)]) -> World {
        let root = tempfile::tempdir().expect("a temporary folder");
        let artifacts = Artifacts::open(root.path()).expect("it is writable");
        let world = World { db, artifacts, _root: root };
        sqlx::query(
            "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
             VALUES ('runner_1', 'r', 'here', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
        )
        .execute(&world.db)
        .await
        .expect("an empty database");
        for (id, running_jobs) in projects {
            sqlx::query("INSERT INTO projects (id, name) VALUES ($1, $1)")
                .bind(id)
                .execute(&world.db)
                .await
                .expect("a new project");
            world.limit(id, *running_jobs).await;
        }
        world
    }

    async fn limit(&self, project: &str, running_jobs: Option<i32>) {
        let mut tx = self.db.begin().await.expect("the database is there");
        let quotas = Quotas { storage_bytes: None, running_jobs };
        assert!(quota::set(&mut tx, project, quotas).await.expect("the database is there").is_some(), "{project} is there");
        tx.commit().await.expect("the database is there");
    }

    async fn enqueue(&self, id: &str, project: &str, priority: i32) {
        let mut tx = self.db.begin().await.expect("the database is there");
        enqueue(&mut tx, id, project, priority).await;
        tx.commit().await.expect("the database is there");
    }

    /// The id of the job that is claimed.
    async fn claim(&self) -> Option<String> {
        self.lease().await.map(|lease| lease.job_id)
    }

    async fn lease(&self) -> Option<Lease> {
        let mut conn = self.db.acquire().await.expect("the database is there");
        lease::claim(&mut conn, &claimant()).await.expect("the database is there").map(|claimed| claimed.lease)
    }

    async fn end(&self, lease: &Lease, ending: Ending) {
        let mut conn = self.db.acquire().await.expect("the database is there");
        ending::finish(&mut conn, &self.artifacts, lease, ending).await.expect("the lease holds");
    }
}

fn claimant() -> Claimant {
    Claimant { runner_id: "runner_1".into(), pool: Pool::Light, devices: 1, capacity: 1, offered: json!([]), lease_seconds: 60.0 }
}

async fn enqueue(tx: &mut Transaction<'_, Postgres>, id: &str, project: &str, priority: i32) {
    let job = NewJob {
        id: id.into(),
        project_id: project.into(),
        name: None,
        spec: Spec::Statistics {},
        request: json!({}),
        metadata: json!({}),
        priority,
        max_attempts: 3,
        devices: 1,
        dataset_id: None,
        validation_dataset_id: None,
        tokenizer_id: None,
        base_model_id: None,
        model_id: None,
        needs: Vec::new(),
    };
    queue::enqueue(tx, job).await.expect("a new job");
}

#[sqlx::test(migrations = "../migrations")]
async fn a_full_project_is_passed_by_until_one_of_its_jobs_ends(db: PgPool) {
    let world = World::new(db, &[("one", Some(1)), ("two", Some(2)), ("free", None)]).await;
    for (id, project) in
        [("a1", "one"), ("b1", "free"), ("a2", "one"), ("c1", "two"), ("b2", "free"), ("c2", "two"), ("c3", "two")]
    {
        world.enqueue(id, project, 0).await;
    }
    let first = world.lease().await.expect("something waits");
    assert_eq!(first.job_id, "a1");
    for next in [Some("b1"), Some("c1"), Some("b2"), Some("c2"), None] {
        assert_eq!(world.claim().await.as_deref(), next);
    }
    // What is interrupted waits again, with the room that it had: it is the project's next.
    world.end(&first, Ending::Interrupted).await;
    assert_eq!(world.claim().await.as_deref(), Some("a2"), "the longest queued");
    assert_eq!(world.claim().await, None);
}

#[sqlx::test(migrations = "../migrations")]
async fn priorities_hold_between_projects_with_a_quota_and_those_without(db: PgPool) {
    let world = World::new(db, &[("limited", Some(9)), ("full", Some(0)), ("free", None)]).await;
    for (id, project, priority) in [
        ("late", "limited", -1),
        ("full", "full", 9),
        ("first", "free", 0),
        ("second", "limited", 0),
        ("urgent", "limited", 3),
        ("most-urgent", "free", 4),
    ] {
        world.enqueue(id, project, priority).await;
    }
    for next in [Some("most-urgent"), Some("urgent"), Some("first"), Some("second"), Some("late"), None] {
        assert_eq!(world.claim().await.as_deref(), next);
    }
    world.limit("full", None).await;
    assert_eq!(world.claim().await.as_deref(), Some("full"));
}

#[sqlx::test(migrations = "../migrations")]
async fn many_runners_at_once_never_exceed_a_quota_and_miss_nothing(db: PgPool) {
    let world = World::new(db, &[("three", Some(3)), ("five", Some(5)), ("free", None)]).await;
    for n in 0..10 {
        for project in ["three", "five", "free"] {
            world.enqueue(&format!("{project}-{n}"), project, 0).await;
        }
    }
    let mut runners = JoinSet::new();
    for _ in 0..8 {
        let db = world.db.clone();
        runners.spawn(async move {
            let mut conn = db.acquire().await.expect("the database is there");
            let mut claimed = Vec::new();
            while let Some(job) = lease::claim(&mut conn, &claimant()).await.expect("the database is there") {
                claimed.push(job.lease.job_id);
            }
            claimed
        });
    }
    let mut claimed = runners.join_all().await.concat();
    // A runner that saw nothing leaves it to the next look.
    while let Some(id) = world.claim().await {
        claimed.push(id);
    }
    let of = |project: &str| claimed.iter().filter(|id| id.starts_with(project)).count();
    assert_eq!((of("three"), of("five"), of("free")), (3, 5, 10), "{claimed:?}");
}

/// False: it is done without having waited for a lock.
async fn waits<T>(db: &PgPool, task: &tokio::task::JoinHandle<T>) -> bool {
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(db).await.expect("a count") == 0 {
        if task.is_finished() {
            return false;
        }
        tokio::task::yield_now().await;
    }
    true
}

/// Of different pools, so that they find different jobs; the first claim is not to be seen yet when the second counts.
#[sqlx::test(migrations = "../migrations")]
async fn two_claims_at_once_do_not_take_the_same_room(db: PgPool) {
    let world = World::new(db.clone(), &[("one", Some(1))]).await;
    world.enqueue("a", "one", 0).await;
    world.enqueue("b", "one", 0).await;
    sqlx::query("UPDATE jobs SET pool = 'device' WHERE id = 'b'").execute(&db).await.expect("it is there");
    let mut tx = db.begin().await.expect("the database is there");
    let first = lease::claim(&mut tx, &claimant()).await.expect("the database is there");
    assert_eq!(first.expect("there is room").lease.job_id, "a");
    let mut conn = db.acquire().await.expect("the database is there");
    let second = tokio::spawn(async move {
        lease::claim(&mut conn, &Claimant { pool: Pool::Device, ..claimant() }).await.expect("the database is there")
    });
    waits(&db, &second).await;
    tx.commit().await.expect("the database is there");
    assert!(second.await.expect("it claims or not").is_none(), "both are claimed");
}

/// A job that is being added while its project gets a quota must not stay in the queue of those without.
#[sqlx::test(migrations = "../migrations")]
async fn a_job_that_is_added_meanwhile_is_limited_too(db: PgPool) {
    let world = World::new(db.clone(), &[("limited", None)]).await;
    let mut tx = db.begin().await.expect("the database is there");
    enqueue(&mut tx, "meanwhile", "limited", 0).await;
    let setting = tokio::spawn(async move {
        world.limit("limited", Some(0)).await;
        world
    });
    assert!(waits(&db, &setting).await, "it does not wait for the job that is being added");
    tx.commit().await.expect("the database is there");
    let world = setting.await.expect("it is set");
    assert_eq!(world.claim().await, None);
}
