//! Everybody at once on one web of jobs: clients that create, cancel, pause, resume and delete, runners
//! that claim, report and finish, reapers. The order of locks in `docs/job-states.md` is what keeps
//! PostgreSQL from finding a deadlock.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use lathe_jobs::{
    artifacts::Artifacts,
    ending::{self, Ending},
    ids,
    lease::{self, Claimant, LeaseError},
    metrics::{self, Batch},
    publish::Product,
    queue::{self, NewJob, QueueError, TransitionError},
    reaper,
    spec::{DatasetSource, Spec},
    state::Pool,
};
use lathe_model::protocol::{Failure, FailureCode, Level};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use sqlx::{PgConnection, PgPool};

const CLIENTS: u64 = 6;
const RUNNERS: u64 = 3;
const ROUNDS: usize = 120;

struct World {
    db: PgPool,
    artifacts: Artifacts,
    deletions: AtomicUsize,
    ends: AtomicUsize,
    _root: tempfile::TempDir,
}

/// What every step may end with: refusals are the machine at work, anything else of the database is not.
#[derive(Debug)]
enum Trouble {
    Refused,
    Database(sqlx::Error),
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Trouble {
        Trouble::Database(error)
    }
}

impl From<QueueError> for Trouble {
    fn from(error: QueueError) -> Trouble {
        match error {
            QueueError::Database(error) => Trouble::Database(error),
            _ => Trouble::Refused,
        }
    }
}

impl From<TransitionError> for Trouble {
    fn from(error: TransitionError) -> Trouble {
        match error {
            TransitionError::Database(error) => Trouble::Database(error),
            _ => Trouble::Refused,
        }
    }
}

impl From<LeaseError> for Trouble {
    fn from(error: LeaseError) -> Trouble {
        match error {
            LeaseError::Database(error) => Trouble::Database(error),
            _ => Trouble::Refused,
        }
    }
}

/// A dataset and its job, made of up to three others, as the API creates one: what it reads is held, then
/// the jobs that make it.
async fn create(world: &World, random: &mut StdRng) -> Result<(), Trouble> {
    let mut tx = world.db.begin().await?;
    let newest: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT id, job_id, state FROM datasets WHERE deleted_at IS NULL ORDER BY created_at DESC, id DESC LIMIT 8",
    )
    .fetch_all(&mut *tx)
    .await?;
    let mut needs = Vec::new();
    for (id, job_id, state) in newest {
        if needs.len() < 3 && random.random_bool(0.4) {
            let held: Option<String> =
                sqlx::query_scalar("SELECT id FROM datasets WHERE id = $1 AND deleted_at IS NULL FOR KEY SHARE")
                    .bind(&id)
                    .fetch_optional(&mut *tx)
                    .await?;
            if held.is_some() && state != "ready" {
                needs.push(job_id);
            }
        }
    }
    let id = ids::new("job");
    let job = NewJob {
        id: id.clone(),
        project_id: "proj_1".into(),
        name: None,
        spec: Spec::Ingest { source: DatasetSource::Template { rows: 1, seed: 0, exclude: Vec::new(), templates: Vec::new() } },
        request: json!({}),
        metadata: json!({}),
        priority: 0,
        max_attempts: 2,
        devices: 0,
        dataset_id: None,
        validation_dataset_id: None,
        tokenizer_id: None,
        base_model_id: None,
        model_id: None,
        needs,
    };
    queue::enqueue(&mut tx, job).await?;
    sqlx::query("INSERT INTO datasets (id, project_id, name, state, job_id, source) VALUES ('ds_' || $1, 'proj_1', 'd', 'queued', $1, '{}')")
        .bind(&id)
        .execute(&mut *tx)
        .await?;
    Ok(tx.commit().await?)
}

/// As the API deletes a dataset: its job first, in a transaction of its own.
async fn delete(world: &World, id: &str) -> Result<(), Trouble> {
    let mut conn = world.db.acquire().await?;
    let job: String = sqlx::query_scalar("SELECT job_id FROM datasets WHERE id = $1").bind(id).fetch_one(&mut *conn).await?;
    match queue::cancel(&mut conn, &job).await {
        Err(TransitionError::Database(error)) => return Err(error.into()),
        _ => drop(conn),
    }
    let mut tx = world.db.begin().await?;
    sqlx::query("SELECT id FROM datasets WHERE id = $1 FOR UPDATE").bind(id).fetch_optional(&mut *tx).await?;
    sqlx::query("UPDATE datasets SET deleted_at = now() WHERE id = $1").bind(id).execute(&mut *tx).await?;
    tx.commit().await?;
    world.deletions.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

async fn some(conn: &mut PgConnection, random: &mut StdRng, query: &'static str) -> Result<String, Trouble> {
    let found: Vec<String> = sqlx::query_scalar(query).fetch_all(conn).await?;
    if found.is_empty() { Err(Trouble::Refused) } else { Ok(found[random.random_range(0..found.len())].clone()) }
}

async fn client_step(world: &World, random: &mut StdRng) -> Result<(), Trouble> {
    let mut conn = world.db.acquire().await?;
    let action = random.random_range(0..10);
    if action < 4 {
        drop(conn);
        return create(world, random).await;
    }
    if action == 4 {
        let id =
            some(&mut conn, random, "SELECT id FROM datasets WHERE deleted_at IS NULL ORDER BY created_at DESC LIMIT 12").await?;
        drop(conn);
        return delete(world, &id).await;
    }
    let job = some(&mut conn, random, "SELECT id FROM jobs WHERE finished_at IS NULL ORDER BY created_at DESC LIMIT 12").await?;
    match action {
        5 => drop(queue::cancel(&mut conn, &job).await?),
        6..8 => drop(queue::pause(&mut conn, &job).await?),
        _ => drop(queue::resume(&mut conn, &job).await?),
    }
    Ok(())
}

async fn runner_step(world: &World, random: &mut StdRng) -> Result<(), Trouble> {
    let mut conn = world.db.acquire().await?;
    let claimant = Claimant {
        runner_id: "runner_a".into(),
        pool: Pool::Light,
        devices: 1,
        capacity: 1,
        offered: json!([]),
        lease_seconds: 60.0,
    };
    let Some(claimed) = lease::claim(&mut conn, &claimant).await? else {
        reaper::sweep(&world.db, &world.artifacts).await?;
        return Ok(());
    };
    let lease = claimed.lease;
    let batch = Batch {
        events: vec![metrics::Event { n: 1, level: Level::Info, code: "x".into(), message: "x".into(), data: json!({}) }],
        step: Some(1),
        ..Batch::default()
    };
    metrics::record(&mut conn, &lease, &batch).await?;
    lease::heartbeat(&mut conn, &lease, 60.0, &[1]).await?;
    let ending = match random.random_range(0..10) {
        0..6 => {
            let folder = world.artifacts.staging(&lease.job_id, lease.attempt).join("dataset");
            std::fs::create_dir_all(&folder).expect("staging is writable");
            Ending::Succeeded(Product::Dataset { folder, sha256: "0".into(), statistics: json!({}) })
        }
        6 => Ending::Stopped,
        7 => {
            sqlx::query("UPDATE job_attempts SET expires_at = now() - interval '1 second' WHERE lease_token = $1")
                .bind(&lease.token)
                .execute(&mut *conn)
                .await?;
            reaper::sweep(&world.db, &world.artifacts).await?;
            return Ok(());
        }
        _ => {
            let failure = Failure { code: FailureCode::BadRows, message: "bad".into(), param: None, retryable: false };
            Ending::Failed(failure)
        }
    };
    ending::finish(&mut conn, &world.artifacts, &lease, ending).await?;
    world.ends.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

#[sqlx::test(migrations = "../migrations")]
async fn nobody_waits_in_a_circle(db: PgPool) {
    let root = tempfile::tempdir().expect("a temporary folder");
    let artifacts = Artifacts::open(root.path()).expect("it is writable");
    for statement in [
        "INSERT INTO projects (id, name) VALUES ('proj_1', 'default')",
        "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
         VALUES ('runner_a', 'a', 'here', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
    ] {
        sqlx::query(statement).execute(&db).await.expect("an empty database");
    }
    let options = (*db.connect_options()).clone();
    let db = sqlx::postgres::PgPoolOptions::new().max_connections(24).connect_with(options).await.expect("the server is there");
    let (deletions, ends) = Default::default();
    let world = Arc::new(World { db, artifacts, deletions, ends, _root: root });
    let actors = (0..CLIENTS + RUNNERS).map(|n| {
        let world = world.clone();
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(n);
            for _ in 0..ROUNDS {
                let done = match n < CLIENTS {
                    true => client_step(&world, &mut random).await,
                    false => runner_step(&world, &mut random).await,
                };
                if let Err(Trouble::Database(error)) = done {
                    panic!("{error}");
                }
            }
        })
    });
    for actor in actors.collect::<Vec<_>>() {
        actor.await.expect("no deadlock, and no other refusal of the database");
    }
    let counts = (world.deletions.load(Ordering::Relaxed), world.ends.load(Ordering::Relaxed));
    assert!(counts.0 > 20 && counts.1 > 10, "too little happened: {counts:?}");
    // Nothing is left that nobody would ever release or fail.
    reaper::sweep(&world.db, &world.artifacts).await.expect("the database is there");
    let stuck: Vec<String> = sqlx::query_scalar(
        "SELECT b.id FROM jobs b WHERE b.state = 'blocked' AND EXISTS (
             SELECT FROM job_dependencies d JOIN jobs n ON n.id = d.needs WHERE d.job_id = b.id AND n.state IN ('failed', 'cancelled'))",
    )
    .fetch_all(&world.db)
    .await
    .expect("the table is there");
    assert_eq!(stuck, Vec::<String>::new());
}
