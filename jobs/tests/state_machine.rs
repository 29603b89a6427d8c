//! The queue against a real Postgres: random walks of clients and runners that check every
//! invariant after every step, and the orders and races that a walk meets too seldom.

use std::{collections::HashMap, path::PathBuf};

use lathe_jobs::{
    artifacts::Artifacts,
    ending::{self, Ending},
    ids,
    lease::{self, Claimant, Claimed, Lease, LeaseError},
    metrics::{self, Batch},
    publish::Product,
    queue::{self, NewJob, QueueError, TransitionError},
    reaper,
    spec::{DatasetSource, Spec},
    state::{JobState, Pool},
};
use lathe_model::protocol::{Failure, FailureCode, MetricRow};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use sqlx::{PgPool, Row};

struct World {
    db: PgPool,
    artifacts: Artifacts,
    _root: tempfile::TempDir,
}

impl World {
    async fn new(db: PgPool) -> World {
        let root = tempfile::tempdir().expect("a temporary folder");
        let artifacts = Artifacts::open(root.path()).expect("it is writable");
        sqlx::query("INSERT INTO projects (id, name) VALUES ('proj_1', 'default')")
            .execute(&db)
            .await
            .expect("an empty database");
        for runner in ["runner_a", "runner_b"] {
            sqlx::query(
                "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
                 VALUES ($1, $1, 'here', 1, '0', '[]', 1, 1, now() + interval '1 hour')",
            )
            .bind(runner)
            .execute(&db)
            .await
            .expect("an empty database");
        }
        World { db, artifacts, _root: root }
    }

    /// A job with a dataset that it is to make.
    async fn enqueue(&self, name: &str, priority: i32, needs: &[String]) -> Result<String, QueueError> {
        let id = ids::new("job");
        let mut tx = self.db.begin().await?;
        let source = DatasetSource::Template { rows: 1, seed: 0, exclude: Vec::new(), templates: Vec::new() };
        let job = NewJob {
            id: id.clone(),
            project_id: "proj_1".into(),
            name: Some(name.into()),
            spec: Spec::Ingest { source },
            request: json!({}),
            metadata: json!({}),
            priority,
            max_attempts: 3,
            devices: 1,
            dataset_id: Some(format!("ds_{id}")),
            validation_dataset_id: None,
            tokenizer_id: None,
            base_model_id: None,
            model_id: None,
            needs: needs.to_vec(),
        };
        queue::enqueue(&mut tx, job).await?;
        sqlx::query("INSERT INTO datasets (id, project_id, name, state, job_id, source) VALUES ('ds_' || $1, 'proj_1', 'd', 'queued', $1, '{}')")
            .bind(&id)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(id)
    }

    async fn claim(&self, runner: &str) -> Option<Claimed> {
        let claimant = Claimant {
            runner_id: runner.into(),
            pool: Pool::Light,
            devices: 1,
            capacity: 1,
            offered: json!([]),
            lease_seconds: 60.0,
        };
        let mut conn = self.db.acquire().await.expect("the database is there");
        lease::claim(&mut conn, &claimant).await.expect("the database is there")
    }

    fn product(&self, lease: &Lease) -> Product {
        let folder: PathBuf = self.artifacts.staging(&lease.job_id, lease.attempt).join("dataset");
        std::fs::create_dir_all(&folder).expect("staging is writable");
        std::fs::write(folder.join("manifest.json"), &lease.token).expect("staging is writable");
        Product::Dataset { folder, sha256: "0".into(), statistics: json!({}) }
    }

    async fn finish(&self, lease: &Lease, ending: Ending) -> Result<JobState, LeaseError> {
        let mut conn = self.db.acquire().await?;
        ending::finish(&mut conn, &self.artifacts, lease, ending).await
    }

    async fn succeed(&self, lease: &Lease) -> Result<JobState, LeaseError> {
        self.finish(lease, Ending::Succeeded(self.product(lease))).await
    }

    async fn states(&self) -> HashMap<String, JobState> {
        let rows = sqlx::query("SELECT id, state FROM jobs").fetch_all(&self.db).await.expect("the database is there");
        rows.iter().map(|row| (row.get("id"), row.get("state"))).collect()
    }

    async fn state(&self, id: &str) -> JobState {
        self.states().await[id]
    }

    async fn is_live(&self, lease: &Lease) -> bool {
        self.count("SELECT count(*) FROM job_attempts WHERE ended_at IS NULL AND lease_token = ", &lease.token).await == 1
    }

    async fn count(&self, query: &'static str, argument: &str) -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(format!("{query} $1"))).bind(argument).fetch_one(&self.db).await.expect("a count")
    }

    /// Everything that a write could have changed.
    async fn fingerprint(&self) -> String {
        sqlx::query_scalar(
            "SELECT md5(concat((SELECT string_agg(j::text, '' ORDER BY id) FROM jobs j),
                 (SELECT string_agg(a::text, '' ORDER BY job_id, n) FROM job_attempts a),
                 (SELECT string_agg(m::text, '' ORDER BY job_id, step) FROM job_metrics m),
                 (SELECT string_agg(d::text, '' ORDER BY id) FROM datasets d),
                 (SELECT count(*) FROM job_events)))",
        )
        .fetch_one(&self.db)
        .await
        .expect("the database is there")
    }

    async fn violations(&self) -> Vec<String> {
        let checks = [
            ("a leased state has one live attempt, others none",
             "SELECT id FROM jobs j WHERE (SELECT count(*) FROM job_attempts a WHERE a.job_id = j.id AND ended_at IS NULL)
                  <> (state IN ('running', 'pausing', 'cancelling'))::int"),
            ("a blocked job waits for something that may still succeed",
             "SELECT id FROM jobs j WHERE state = 'blocked' AND (
                  NOT EXISTS (SELECT FROM job_dependencies d JOIN jobs n ON n.id = d.needs WHERE d.job_id = j.id AND n.state <> 'succeeded')
                  OR EXISTS (SELECT FROM job_dependencies d JOIN jobs n ON n.id = d.needs WHERE d.job_id = j.id AND n.state IN ('failed', 'cancelled')))"),
            ("nothing runs before what it needs",
             "SELECT id FROM jobs j WHERE state NOT IN ('blocked', 'paused', 'cancelled', 'failed') AND EXISTS (
                  SELECT FROM job_dependencies d JOIN jobs n ON n.id = d.needs WHERE d.job_id = j.id AND n.state <> 'succeeded')"),
            ("events are numbered without gaps",
             "SELECT id FROM jobs j WHERE next_event - 1 <> (SELECT count(*) FROM job_events e WHERE e.job_id = j.id)
                  OR next_event - 1 <> (SELECT coalesce(max(e.id), 0) FROM job_events e WHERE e.job_id = j.id)"),
            ("a dataset ends as its job does",
             "SELECT j.id FROM jobs j JOIN datasets d ON d.job_id = j.id WHERE (d.state = 'ready') <> (j.state = 'succeeded')
                  OR (d.state = 'failed') <> (j.state IN ('failed', 'cancelled')) OR (d.error IS NULL) <> (d.state <> 'failed')"),
            ("failures stay below the bound until the job has failed",
             "SELECT id FROM jobs WHERE failures >= max_attempts AND state NOT IN ('failed')"),
            ("a queued job knows since when", "SELECT id FROM jobs WHERE state IN ('queued', 'running') AND queued_at IS NULL"),
        ];
        let mut found = Vec::new();
        for (promise, query) in checks {
            let jobs: Vec<String> = sqlx::query_scalar(query).fetch_all(&self.db).await.expect("the database is there");
            found.extend(jobs.into_iter().map(|job| format!("{promise}: {job}")));
        }
        found
    }
}

fn failure(retryable: bool) -> Ending {
    Ending::Failed(Failure { code: FailureCode::WorkerCrashed, message: "killed".into(), param: None, retryable })
}

fn metric(step: u64) -> Batch {
    let mut batch = Batch::default();
    batch.metric(MetricRow {
        step,
        loss: 1.0,
        learning_rate: 0.1,
        grad_norm: 1.0,
        tokens: 1,
        tokens_per_second: 1.0,
        validation_loss: None,
    });
    batch
}

/// One random step of a client or of one of two runners; what was done, for the failure message.
async fn step(world: &World, random: &mut StdRng, jobs: &mut Vec<String>, leases: &mut Vec<Lease>) -> String {
    let some_job = (!jobs.is_empty()).then(|| jobs[random.random_range(0..jobs.len())].clone());
    let some_lease = (!leases.is_empty()).then(|| leases[random.random_range(0..leases.len())].clone());
    match (random.random_range(0..100), some_job, some_lease) {
        (0..18, _, _) => {
            let needs: Vec<String> = jobs.iter().rev().take(6).filter(|_| random.random_bool(0.25)).cloned().collect();
            match world.enqueue("walk", random.random_range(-1..2), &needs).await {
                Ok(id) => {
                    jobs.push(id.clone());
                    format!("enqueue {id} needing {needs:?}")
                }
                Err(QueueError::NeedFailed(id)) => format!("refused: {id} has failed"),
                Err(error) => panic!("{error}"),
            }
        }
        (18..40, _, _) => {
            let runner = if random.random_bool(0.5) { "runner_a" } else { "runner_b" };
            match world.claim(runner).await {
                Some(claimed) => {
                    leases.push(claimed.lease.clone());
                    format!("{runner} claims {}", claimed.lease.job_id)
                }
                None => format!("{runner} finds nothing"),
            }
        }
        (40..60, Some(job), _) => {
            let mut conn = world.db.acquire().await.expect("the database is there");
            let before = world.state(&job).await;
            let (name, answer) = match random.random_range(0..10) {
                0..2 => ("cancel", queue::cancel(&mut conn, &job).await),
                2..6 => ("pause", queue::pause(&mut conn, &job).await),
                _ => ("resume", queue::resume(&mut conn, &job).await),
            };
            match answer {
                Ok(state) => assert_eq!(state, world.state(&job).await),
                Err(TransitionError::Illegal { from }) => assert_eq!((from, before), (before, world.state(&job).await)),
                Err(error) => panic!("{error}"),
            }
            format!("{name} {job}, which is {before}")
        }
        (60..88, _, Some(lease)) => write(world, random, &lease).await,
        (88..94, _, Some(lease)) => {
            sqlx::query("UPDATE job_attempts SET expires_at = now() - interval '1 second' WHERE lease_token = $1")
                .bind(&lease.token)
                .execute(&world.db)
                .await
                .expect("the database is there");
            reaper::sweep(&world.db, &world.artifacts).await.expect("the database is there");
            assert!(!world.is_live(&lease).await);
            format!("the lease on {} expires", lease.job_id)
        }
        _ => {
            sqlx::query("UPDATE jobs SET run_after = now() WHERE state = 'queued'")
                .execute(&world.db)
                .await
                .expect("the database is there");
            "back-offs are over".into()
        }
    }
}

/// A runner writes under a lease that may be stale; a stale one must change nothing.
async fn write(world: &World, random: &mut StdRng, lease: &Lease) -> String {
    let (live, before) = (world.is_live(lease).await, world.fingerprint().await);
    let mut conn = world.db.acquire().await.expect("the database is there");
    let (name, answer) = match random.random_range(0..10) {
        0 => ("heartbeat", lease::heartbeat(&mut conn, lease, 60.0, &[1]).await.map(drop)),
        1..3 => ("metrics", metrics::record(&mut conn, lease, &metric(random.random_range(1..9))).await),
        3..5 => ("success", world.succeed(lease).await.map(drop)),
        5 => ("interruption", world.finish(lease, Ending::Interrupted).await.map(drop)),
        6..8 => ("stop", world.finish(lease, Ending::Stopped).await.map(drop)),
        8 => ("crash", world.finish(lease, failure(true)).await.map(drop)),
        _ => ("failure", world.finish(lease, failure(random.random_bool(0.5))).await.map(drop)),
    };
    match answer {
        Ok(()) => assert!(live, "{name} under a stale lease took effect"),
        Err(LeaseError::Lost) => {
            assert!(!live, "{name} under a live lease was refused");
            assert_eq!(before, world.fingerprint().await, "{name} under a stale lease changed something");
        }
        Err(error) => panic!("{name}: {error}"),
    }
    format!("{name} of {} attempt {} (live: {live})", lease.job_id, lease.attempt)
}

async fn walk(world: &World, seed: u64, steps: usize) {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut jobs, mut leases, mut log) = (Vec::new(), Vec::new(), Vec::new());
    let mut before = world.states().await;
    for _ in 0..steps {
        log.push(step(world, &mut random, &mut jobs, &mut leases).await);
        let after = world.states().await;
        let illegal = after.iter().filter(|(id, to)| before.get(*id).is_some_and(|from| from != *to && !from.can_become(**to)));
        let illegal: Vec<_> = illegal.map(|(id, to)| format!("{id} went from {} to {to}", before[id])).collect();
        let broken = [illegal, world.violations().await].concat();
        assert!(broken.is_empty(), "seed {seed}: {broken:#?}\nafter {log:#?}");
        before = after;
    }
    drain(world, &jobs, &log).await;
}

/// Whatever happened, every job can still be brought to an end.
async fn drain(world: &World, jobs: &[String], log: &[String]) {
    sqlx::query("UPDATE job_attempts SET expires_at = now() - interval '1 second' WHERE ended_at IS NULL")
        .execute(&world.db)
        .await
        .expect("the database is there");
    reaper::sweep(&world.db, &world.artifacts).await.expect("the database is there");
    for job in jobs {
        let mut conn = world.db.acquire().await.expect("the database is there");
        let _ = queue::resume(&mut conn, job).await;
    }
    sqlx::query("UPDATE jobs SET run_after = now() WHERE state = 'queued'")
        .execute(&world.db)
        .await
        .expect("the database is there");
    while let Some(claimed) = world.claim("runner_a").await {
        world.succeed(&claimed.lease).await.expect("the lease is live");
    }
    let lost: Vec<_> = world.states().await.into_iter().filter(|(_, state)| !state.is_finished()).collect();
    assert!(lost.is_empty(), "{lost:?} can never end after {log:#?}");
}

#[sqlx::test(migrations = "../migrations")]
async fn random_walks_keep_every_promise(db: PgPool) {
    let world = World::new(db).await;
    let first = std::env::var("LATHE_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for seed in first..first + 6 {
        walk(&world, seed, 150).await;
    }
}

/// A client's action.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Cancel,
    Pause,
    Resume,
    Delete,
}

impl Action {
    async fn apply(self, world: &World, job: &str) -> Result<(), TransitionError> {
        let mut conn = world.db.acquire().await?;
        match self {
            Action::Cancel => queue::cancel(&mut conn, job).await.map(drop),
            Action::Pause => queue::pause(&mut conn, job).await.map(drop),
            Action::Resume => queue::resume(&mut conn, job).await.map(drop),
            Action::Delete => queue::delete(&mut conn, job).await.map(drop),
        }
    }

    /// Where it leads; `None`: it is refused. A deletion keeps the state.
    fn leads(self, from: JobState) -> Option<JobState> {
        use JobState::*;
        match (self, from) {
            (Action::Cancel, Blocked | Queued | Paused | Cancelled) => Some(Cancelled),
            (Action::Cancel, Running | Pausing | Cancelling) => Some(Cancelling),
            (Action::Pause, Blocked | Queued | Paused) => Some(Paused),
            (Action::Pause, Running | Pausing) => Some(Pausing),
            (Action::Resume, Paused) => Some(Queued),
            (Action::Resume, Blocked | Queued | Running) => Some(from),
            (Action::Delete, Cancelled | Succeeded | Failed) => Some(from),
            _ => None,
        }
    }
}

/// A job that was brought into a state by the ways that lead there.
async fn job_in(world: &World, state: JobState) -> String {
    let needs = match state {
        JobState::Blocked => vec![world.enqueue("need", -9, &[]).await.expect("a new job")],
        _ => Vec::new(),
    };
    let id = world.enqueue("subject", 9, &needs).await.expect("a new job");
    let claim = async || {
        let claimed = world.claim("runner_a").await.expect("it is queued");
        assert_eq!(claimed.lease.job_id, id);
        claimed.lease
    };
    match state {
        JobState::Blocked | JobState::Queued => {}
        JobState::Paused => Action::Pause.apply(world, &id).await.expect("it is queued"),
        JobState::Cancelled => Action::Cancel.apply(world, &id).await.expect("it is queued"),
        JobState::Running => drop(claim().await),
        JobState::Pausing | JobState::Cancelling => {
            claim().await;
            let action = if state == JobState::Pausing { Action::Pause } else { Action::Cancel };
            action.apply(world, &id).await.expect("it is running");
        }
        JobState::Succeeded => drop(world.succeed(&claim().await).await.expect("the lease is live")),
        JobState::Failed => drop(world.finish(&claim().await, failure(false)).await.expect("the lease is live")),
    }
    assert_eq!(world.state(&id).await, state);
    id
}

#[sqlx::test(migrations = "../migrations")]
async fn every_action_in_every_state_does_what_it_should_once(db: PgPool) {
    let world = World::new(db).await;
    for from in JobState::ALL {
        for action in [Action::Cancel, Action::Pause, Action::Resume, Action::Delete] {
            let id = job_in(&world, *from).await;
            let before = world.fingerprint().await;
            match (action.apply(&world, &id).await, action.leads(*from)) {
                (Ok(()), Some(to)) => {
                    assert_eq!(world.state(&id).await, to, "{action:?} of {from}");
                    let done = world.fingerprint().await;
                    let kept = to == *from && action != Action::Delete;
                    assert_eq!(done == before, kept, "{action:?} of {from} becomes {to}");
                    // Twice is once. What was deleted is not there any more.
                    let again = action.apply(&world, &id).await;
                    assert!(
                        again.is_ok() || matches!(again, Err(TransitionError::NotFound)) && action == Action::Delete,
                        "{again:?}"
                    );
                    assert_eq!(world.fingerprint().await, done, "{action:?} of {from}, again");
                }
                (Err(TransitionError::Illegal { from: named }), None) => {
                    assert_eq!((named, world.fingerprint().await == before), (*from, true), "{action:?} of {from}");
                }
                (answer, expected) => panic!("{action:?} of {from}: {answer:?} and not {expected:?}"),
            }
            // Out of the queue, whatever it was.
            let _ = Action::Cancel.apply(&world, &id).await;
        }
    }
    assert_eq!(world.violations().await, Vec::<String>::new());
}

#[sqlx::test(migrations = "../migrations")]
async fn the_highest_priority_then_the_longest_queued_goes_first(db: PgPool) {
    let world = World::new(db).await;
    let mut expected = Vec::new();
    for (name, priority) in [("c", 0), ("a", 5), ("d", 0), ("b", 5), ("e", -1)] {
        expected.push((name, world.enqueue(name, priority, &[]).await.expect("a new job")));
    }
    expected.sort();
    for (_, id) in expected {
        assert_eq!(world.claim("runner_a").await.expect("one is queued").lease.job_id, id);
    }
    assert!(world.claim("runner_a").await.is_none());
}

#[sqlx::test(migrations = "../migrations")]
async fn a_job_waits_for_all_it_needs_and_fails_with_it(db: PgPool) {
    let world = World::new(db).await;
    let mut first = Vec::new();
    for name in ["one", "two", "three"] {
        first.push(world.enqueue(name, 0, &[]).await.expect("a new job"));
    }
    let both = world.enqueue("both", 0, &first[..2]).await.expect("its needs are there");
    let doomed = world.enqueue("doomed", 0, &first[1..]).await.expect("its needs are there");
    let after_doomed = world.enqueue("after", 0, std::slice::from_ref(&doomed)).await.expect("its needs are there");
    for _ in 0..2 {
        assert_eq!(world.state(&both).await, JobState::Blocked);
        let claimed = world.claim("runner_a").await.expect("one is queued");
        world.succeed(&claimed.lease).await.expect("the lease is live");
    }
    assert_eq!(world.state(&both).await, JobState::Queued);
    let claimed = world.claim("runner_a").await.expect("one is queued");
    assert_eq!(world.finish(&claimed.lease, failure(false)).await.expect("the lease is live"), JobState::Failed);
    for id in [&doomed, &after_doomed] {
        let error: serde_json::Value =
            sqlx::query_scalar("SELECT error FROM jobs WHERE id = $1").bind(id).fetch_one(&world.db).await.expect("it failed");
        assert_eq!((world.state(id).await, &error["code"]), (JobState::Failed, &json!("dependency_failed")));
    }
    assert!(matches!(world.enqueue("late", 0, &[doomed]).await, Err(QueueError::NeedFailed(_))));
    assert!(matches!(world.enqueue("lost", 0, &["job_0".into()]).await, Err(QueueError::NeedNotFound(_))));
}

#[sqlx::test(migrations = "../migrations")]
async fn failures_back_off_until_the_attempts_are_used_up(db: PgPool) {
    let world = World::new(db).await;
    let id = world.enqueue("fragile", 0, &[]).await.expect("a new job");
    for wait in [1.0, 4.0] {
        let claimed = world.claim("runner_a").await.expect("it is queued");
        assert_eq!(world.finish(&claimed.lease, failure(true)).await.expect("the lease is live"), JobState::Queued);
        assert!(world.claim("runner_a").await.is_none(), "it waits");
        let planned: f64 = sqlx::query_scalar("SELECT extract(epoch FROM run_after - queued_at)::float8 FROM jobs")
            .fetch_one(&world.db)
            .await
            .expect("a row");
        assert_eq!(planned, wait);
        sqlx::query("UPDATE jobs SET run_after = now()").execute(&world.db).await.expect("the database is there");
    }
    // Neither counts.
    for ending in [Ending::Interrupted, Ending::Stopped] {
        let claimed = world.claim("runner_a").await.expect("it is queued");
        assert_eq!(world.finish(&claimed.lease, ending).await.expect("the lease is live"), JobState::Queued);
    }
    let claimed = world.claim("runner_a").await.expect("it is queued");
    assert_eq!(world.finish(&claimed.lease, failure(true)).await.expect("the lease is live"), JobState::Failed);
    let error: serde_json::Value =
        sqlx::query_scalar("SELECT error FROM jobs WHERE id = $1").bind(&id).fetch_one(&world.db).await.expect("it failed");
    assert_eq!(error["code"], "attempts_exhausted");
    assert!(error["message"].as_str().expect("a sentence").contains("killed"));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_lost_runner_costs_nothing_and_changes_nothing_when_it_is_back(db: PgPool) {
    let world = World::new(db).await;
    world.enqueue("long", 0, &[]).await.expect("a new job");
    let stale = world.claim("runner_a").await.expect("it is queued").lease;
    assert_eq!(reaper::sweep(&world.db, &world.artifacts).await.expect("the database is there"), 0, "the lease is fresh");
    sqlx::query("UPDATE job_attempts SET expires_at = now() - interval '1 second'")
        .execute(&world.db)
        .await
        .expect("the database is there");
    let mut conn = world.db.acquire().await.expect("the database is there");
    lease::heartbeat(&mut conn, &stale, 60.0, &[3]).await.expect("nobody has decided otherwise yet");
    sqlx::query("UPDATE job_attempts SET expires_at = now() - interval '1 second'")
        .execute(&world.db)
        .await
        .expect("the database is there");
    assert_eq!(reaper::sweep(&world.db, &world.artifacts).await.expect("the database is there"), 1);
    let fresh = world.claim("runner_b").await.expect("it is queued again").lease;
    assert!(matches!(world.succeed(&stale).await, Err(LeaseError::Lost)));
    assert!(matches!(lease::heartbeat(&mut conn, &stale, 60.0, &[3]).await, Err(LeaseError::Lost)));
    world.succeed(&fresh).await.expect("the lease is live");
    let published =
        std::fs::read_to_string(world.artifacts.path(&format!("datasets/ds_{}/{}/manifest.json", fresh.job_id, fresh.attempt)))
            .expect("it is published");
    assert_eq!(published, fresh.token);
    let failures: i32 = sqlx::query_scalar("SELECT failures FROM jobs").fetch_one(&world.db).await.expect("a row");
    assert_eq!(failures, 0);
}

/// Two needs that end at the same moment, and many runners at one queue.
#[sqlx::test(migrations = "../migrations")]
async fn concurrent_runners_do_every_job_once(db: PgPool) {
    let world = std::sync::Arc::new(World::new(db).await);
    let mut all = Vec::new();
    for group in 0..12 {
        let mut needs = Vec::new();
        for part in 0..3 {
            needs.push(world.enqueue(&format!("{group}.{part}"), 0, &[]).await.expect("a new job"));
        }
        all.push(world.enqueue(&format!("{group}.all"), 1, &needs).await.expect("its needs are there"));
        all.extend(needs);
    }
    let workers = (0..4).map(|n| {
        let (world, total) = (world.clone(), all.len());
        tokio::spawn(async move {
            let runner = if n % 2 == 0 { "runner_a" } else { "runner_b" };
            loop {
                while let Some(claimed) = world.claim(runner).await {
                    world.succeed(&claimed.lease).await.expect("the lease is live");
                }
                let ended = world.states().await.values().filter(|state| state.is_finished()).count();
                if ended == total {
                    return;
                }
                tokio::task::yield_now().await;
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.expect("no runner panics");
    }
    assert!(world.states().await.values().all(|state| *state == JobState::Succeeded));
    let attempts: i64 = sqlx::query_scalar("SELECT count(*) FROM job_attempts").fetch_one(&world.db).await.expect("a count");
    assert_eq!(attempts, all.len() as i64);
    assert_eq!(world.violations().await, Vec::<String>::new());
}
