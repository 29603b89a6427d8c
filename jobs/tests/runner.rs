//! A runner and its children, with a shell script in the worker's place: what the runner does with
//! a worker that succeeds, crashes, is paused, is cancelled, and with its own end.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lathe_jobs::{
    artifacts::Artifacts,
    context::RunnerConfig,
    devices, ids,
    queue::{self, NewJob},
    runner,
    spec::{DatasetSource, Spec},
    state::JobState,
    store_id,
};
use serde_json::json;
use sqlx::{ConnectOptions, PgPool};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinHandle,
};

/// Reads the task; `$out` is where its result goes.
const BEGIN: &str = r#"#!/bin/sh
test "$1" = worker || exit 1
read -r spec
out=$(printf '%s' "$spec" | sed 's/.*"output":"\([^"]*\)".*/\1/')
here=$(dirname "$0")
succeed() {
    mkdir -p "$out" && echo '{}' > "$out/manifest.json"
    echo '{"report":"done","result":{"kind":"dataset","folder":"'"$out"'","sha256":"abc","statistics":{"rows":1}}}' >&3
    exit 0
}
metric() { echo '{"report":"metric","row":{"step":'"$1"',"loss":1.5,"learning_rate":0.1,"grad_norm":1.0,"tokens":8,"tokens_per_second":100.0}}' >&3; }
"#;

struct World {
    db: PgPool,
    folder: tempfile::TempDir,
}

struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), runner::RunnerError>>,
}

impl Running {
    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.expect("the runner does not panic").expect("it stops in order");
    }
}

impl World {
    async fn new(db: PgPool) -> World {
        sqlx::query("INSERT INTO projects (id, name) VALUES ('proj_1', 'default')")
            .execute(&db)
            .await
            .expect("an empty database");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let artifacts = Artifacts::open(folder.path().join("artifacts")).expect("it is writable");
        let mut conn = db.acquire().await.expect("the database is there");
        store_id::write(&mut conn, &artifacts).await.expect("it is writable");
        drop(conn);
        World { db, folder }
    }

    fn config(&self, worker: &str) -> RunnerConfig {
        let program = self.folder.path().join("worker.sh");
        std::fs::write(&program, format!("{BEGIN}{worker}")).expect("it is writable");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).expect("it is ours");
        RunnerConfig {
            program,
            lease_seconds: 2.0,
            disk_low_bytes: 0,
            ..RunnerConfig::new(self.db.connect_options().to_url_lossy().to_string(), self.folder.path().join("artifacts"))
        }
    }

    fn start(&self, config: RunnerConfig) -> Running {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(runner::run(config, async {
            let _ = stopped.await;
        }));
        Running { stop, task }
    }

    async fn enqueue(&self) -> String {
        let id = ids::new("job");
        let mut tx = self.db.begin().await.expect("the database is there");
        let job = NewJob {
            id: id.clone(),
            project_id: "proj_1".into(),
            name: None,
            spec: Spec::Ingest {
                source: DatasetSource::Template { rows: 1, seed: 0, exclude: Vec::new(), templates: Vec::new() },
            },
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
        };
        queue::enqueue(&mut tx, job).await.expect("a new job");
        sqlx::query("INSERT INTO datasets (id, project_id, name, state, job_id, source) VALUES ('ds_' || $1, 'proj_1', 'd', 'queued', $1, '{}')")
            .bind(&id)
            .execute(&mut *tx)
            .await
            .expect("a new dataset");
        tx.commit().await.expect("the database is there");
        id
    }

    async fn state(&self, id: &str) -> JobState {
        sqlx::query_scalar("SELECT state FROM jobs WHERE id = $1").bind(id).fetch_one(&self.db).await.expect("the job is there")
    }

    async fn reaches(&self, id: &str, wanted: JobState) {
        let waited = until(|| async { self.state(id).await == wanted }).await;
        assert!(waited, "{id} stays {} and does not become {wanted}: {:?}", self.state(id).await, self.events(id).await);
    }

    async fn events(&self, id: &str) -> Vec<String> {
        let query = "SELECT code || ': ' || message FROM job_events WHERE job_id = $1 ORDER BY id";
        sqlx::query_scalar(query).bind(id).fetch_all(&self.db).await.expect("the database is there")
    }

    async fn outcomes(&self, id: &str) -> Vec<String> {
        let query = "SELECT coalesce(outcome, 'live') FROM job_attempts WHERE job_id = $1 ORDER BY n";
        sqlx::query_scalar(query).bind(id).fetch_all(&self.db).await.expect("the database is there")
    }

    async fn number(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.db).await.expect("a number")
    }

    fn marker(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Whether a condition comes true within 20 seconds.
async fn until<F: Future<Output = bool>>(condition: impl Fn() -> F) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if condition().await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

async fn appears(path: &Path) {
    assert!(until(|| async { path.exists() }).await, "{} does not appear", path.display());
}

/// The process that a script has written down has ended.
async fn ends(pid_file: &Path) {
    let pid = std::fs::read_to_string(pid_file).expect("the script has written it");
    let process = PathBuf::from("/proc").join(pid.trim());
    assert!(until(|| async { !process.exists() }).await, "the worker {} lives on", pid.trim());
}

#[sqlx::test(migrations = "../migrations")]
async fn jobs_are_claimed_at_once_and_their_results_published(db: PgPool) {
    let world = World::new(db).await;
    let running = world.start(world.config("succeed"));
    assert!(until(|| async { world.number("SELECT count(*) FROM runners").await == 1 }).await);
    let mut last = String::new();
    for _ in 0..30 {
        last = world.enqueue().await;
        world.reaches(&last, JobState::Succeeded).await;
    }
    let query = "SELECT (extract(epoch FROM started_at - queued_at) * 1000)::float8 AS latency FROM jobs ORDER BY latency";
    let latencies: Vec<f64> = sqlx::query_scalar(query).fetch_all(&world.db).await.expect("thirty rows");
    println!("from queued to claimed: median {:.1} ms, 99 % {:.1} ms", latencies[15], latencies[29]);
    assert!(latencies[15] < 100.0, "{latencies:?}");
    let (state, artifact): (String, String) = sqlx::query_as("SELECT state, artifact FROM datasets WHERE job_id = $1")
        .bind(&last)
        .fetch_one(&world.db)
        .await
        .expect("a row");
    assert_eq!((state.as_str(), artifact), ("ready", format!("datasets/ds_{last}/1")));
    let artifacts = world.folder.path().join("artifacts");
    assert!(artifacts.join(format!("datasets/ds_{last}/1/manifest.json")).exists());
    running.stop().await;
    assert_eq!(
        std::fs::read_dir(artifacts.join("staging"))
            .expect("it is there")
            .filter(|job| { std::fs::read_dir(job.as_ref().expect("an entry").path()).expect("a folder").next().is_some() })
            .count(),
        0,
        "staging is swept"
    );
    assert_eq!(world.number("SELECT count(*) FROM runners WHERE stopped_at IS NOT NULL").await, 1);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_crash_is_counted_and_tried_again(db: PgPool) {
    let world = World::new(db).await;
    let running = world.start(world.config(
        "test -e \"$here/crashed\" && succeed\ntouch \"$here/crashed\"\necho 'segmentation fault in step 3' >&2\nkill -9 $$",
    ));
    let id = world.enqueue().await;
    world.reaches(&id, JobState::Succeeded).await;
    assert_eq!(world.outcomes(&id).await, ["failed", "succeeded"]);
    assert_eq!(world.number("SELECT failures::bigint FROM jobs").await, 1);
    let events = world.events(&id).await;
    let retrying = events.iter().find(|event| event.starts_with("job.retrying")).expect("it says so");
    assert!(retrying.contains("signal 9") && retrying.contains("segmentation fault in step 3"), "{retrying}");
    running.stop().await;
}

/// The first attempt reports, works for a while without progress, and then hangs.
#[sqlx::test(migrations = "../migrations")]
async fn a_worker_that_hangs_is_killed_and_its_job_tried_again(db: PgPool) {
    let world = World::new(db).await;
    let worker = r#"test -e "$here/pid" && succeed
metric 1
for second in 1 2 3; do sleep 1; echo '{"report":"alive","progress":false}' >&3; done
echo $$ > "$here/pid.new"; mv "$here/pid.new" "$here/pid"
sleep 1000"#;
    let running = world.start(RunnerConfig { stall: Duration::from_secs(2), ..world.config(worker) });
    let id = world.enqueue().await;
    world.reaches(&id, JobState::Succeeded).await;
    ends(&world.marker("pid")).await;
    assert_eq!(world.outcomes(&id).await, ["failed", "succeeded"]);
    let events = world.events(&id).await;
    for code in ["worker.stalled: ", "job.retrying: "] {
        let event = events.iter().find(|event| event.starts_with(code)).unwrap_or_else(|| panic!("no {code}{events:?}"));
        assert!(event.contains("no sign of life for 2 seconds"), "{event}");
    }
    running.stop().await;
}

#[sqlx::test(migrations = "../migrations")]
async fn a_failure_for_good_fails_the_dataset_too(db: PgPool) {
    let world = World::new(db).await;
    let worker = r#"echo '{"report":"failed","failure":{"code":"no_valid_rows","message":"No row is valid.","retryable":false}}' >&3; exit 10"#;
    let running = world.start(world.config(worker));
    let id = world.enqueue().await;
    world.reaches(&id, JobState::Failed).await;
    let code: String = sqlx::query_scalar("SELECT error ->> 'code' FROM datasets WHERE state = 'failed'")
        .fetch_one(&world.db)
        .await
        .expect("it failed");
    assert_eq!(code, "no_valid_rows");
    running.stop().await;
}

const OBEDIENT: &str = r#"
test -e "$here/go" && succeed
metric 1; metric 2
echo $$ > "$here/pid"; touch "$here/running"
read -r command
echo "$command" > "$here/heard"
rm "$here/running"
exit 11
"#;

#[sqlx::test(migrations = "../migrations")]
async fn a_job_is_paused_resumed_and_cancelled(db: PgPool) {
    let world = World::new(db).await;
    let running = world.start(world.config(OBEDIENT));
    let (first, mut conn) = (world.enqueue().await, world.db.acquire().await.expect("the database is there"));
    appears(&world.marker("running")).await;
    assert_eq!(queue::pause(&mut conn, &first).await.expect("it is running"), JobState::Pausing);
    world.reaches(&first, JobState::Paused).await;
    assert_eq!(std::fs::read_to_string(world.marker("heard")).expect("it heard"), "\"pause\"\n");
    assert_eq!(world.number("SELECT count(*) FROM job_metrics").await, 2);
    assert_eq!(world.number("SELECT count(*) FROM jobs WHERE first_step_at IS NOT NULL AND step = 2").await, 1);
    assert_eq!(queue::resume(&mut conn, &first).await.expect("it is paused"), JobState::Queued);
    appears(&world.marker("running")).await;
    assert_eq!(queue::cancel(&mut conn, &first).await.expect("it is running"), JobState::Cancelling);
    world.reaches(&first, JobState::Cancelled).await;
    assert_eq!(std::fs::read_to_string(world.marker("heard")).expect("it heard"), "\"cancel\"\n");
    assert_eq!(world.outcomes(&first).await, ["paused", "cancelled"]);
    assert_eq!(world.number("SELECT count(*) FROM datasets WHERE state = 'failed'").await, 1);
    running.stop().await;
}

#[sqlx::test(migrations = "../migrations")]
async fn a_runner_that_stops_gives_its_jobs_back(db: PgPool) {
    let world = World::new(db).await;
    let running = world.start(world.config(OBEDIENT));
    let id = world.enqueue().await;
    appears(&world.marker("running")).await;
    let began = Instant::now();
    running.stop().await;
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(world.state(&id).await, JobState::Queued);
    assert_eq!(world.outcomes(&id).await, ["interrupted"]);
    assert_eq!(world.number("SELECT failures::bigint FROM jobs").await, 0);
    std::fs::write(world.marker("go"), "").expect("it is writable");
    let again = world.start(world.config(OBEDIENT));
    world.reaches(&id, JobState::Succeeded).await;
    again.stop().await;
}

#[sqlx::test(migrations = "../migrations")]
async fn a_worker_whose_lease_is_lost_is_killed(db: PgPool) {
    let world = World::new(db).await;
    let running =
        world.start(world.config(
            "test -e \"$here/pid\" && succeed\necho $$ > \"$here/pid.new\"; mv \"$here/pid.new\" \"$here/pid\"\nsleep 1000",
        ));
    let id = world.enqueue().await;
    appears(&world.marker("pid")).await;
    let stolen = "UPDATE job_attempts SET ended_at = now(), outcome = 'lost' WHERE ended_at IS NULL";
    let mut tx = world.db.begin().await.expect("the database is there");
    sqlx::query(stolen).execute(&mut *tx).await.expect("it is live");
    sqlx::query("UPDATE jobs SET state = 'queued'").execute(&mut *tx).await.expect("it is there");
    tx.commit().await.expect("the database is there");
    ends(&world.marker("pid")).await;
    world.reaches(&id, JobState::Succeeded).await;
    assert_eq!(world.outcomes(&id).await, ["lost", "succeeded"]);
    running.stop().await;
}

#[sqlx::test(migrations = "../migrations")]
async fn a_runner_on_another_folder_takes_nothing_until_it_is_the_api_s(db: PgPool) {
    let world = World::new(db).await;
    let mut config = world.config("succeed");
    config.artifacts = world.folder.path().join("elsewhere");
    let (ours, theirs) = (world.folder.path().join("artifacts/store_id"), config.artifacts.join("store_id"));
    std::fs::create_dir(&config.artifacts).expect("it is writable");
    std::fs::write(&theirs, "store_other").expect("it is writable");
    let running = world.start(config);
    assert!(until(|| async { world.number("SELECT count(*) FROM runners WHERE refused IS NOT NULL").await == 1 }).await);
    let sentence: String = sqlx::query_scalar("SELECT refused FROM runners").fetch_one(&world.db).await.expect("a row");
    assert!(sentence.contains("elsewhere") && sentence.contains("--artifacts"), "{sentence}");
    let id = world.enqueue().await;
    let renewed = "SELECT count(*) FROM runners WHERE expires_at > started_at + interval '4 seconds'";
    assert!(until(|| async { world.number(renewed).await == 1 }).await, "it stays registered");
    assert_eq!(world.state(&id).await, JobState::Queued);
    // As when the folder is mounted in the end.
    std::fs::copy(ours, theirs).expect("it is writable");
    world.reaches(&id, JobState::Succeeded).await;
    assert_eq!(world.number("SELECT count(*) FROM runners WHERE refused IS NULL").await, 1);
    running.stop().await;
}

#[tokio::test]
async fn a_driver_that_crashes_or_hangs_takes_no_runner_along() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join("lathe.sh");
    let probe = async |script: &str, limit| {
        // Written beside and renamed: a file that is open for writing cannot be run.
        let staged = folder.path().join("staged");
        std::fs::write(&staged, format!("#!/bin/sh\ntest \"$1\" = devices || exit 1\n{script}\n")).expect("it is writable");
        std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o700)).expect("it is ours");
        std::fs::rename(&staged, &program).expect("it is ours");
        devices::probe(&program, limit).await
    };
    let patience = Duration::from_secs(20);
    let two = probe(r#"echo '{"cuda_devices":2,"cpu_cores":8,"reasons":["2 CUDA device(s)"]}'"#, patience).await;
    assert_eq!((two.cuda_devices, two.cpu_cores), (2, 8));
    for (script, limit, said) in [
        ("kill -SEGV $$", patience, "signal 11"),
        ("exit 7", patience, "7"),
        ("echo nonsense", patience, "not understood"),
        ("exec sleep 1000", Duration::from_millis(200), "0.2 seconds"),
    ] {
        let found = probe(script, limit).await;
        assert!(found.cuda_devices == 0 && found.reasons[0].contains(said), "{script}: {found:?}");
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn below_the_low_mark_nothing_is_claimed(db: PgPool) {
    let world = World::new(db).await;
    let running = world.start(RunnerConfig { disk_low_bytes: u64::MAX, ..world.config("succeed") });
    let id = world.enqueue().await;
    assert!(until(|| async { world.number("SELECT count(*) FROM runners").await == 1 }).await);
    let renewed = "SELECT count(*) FROM runners WHERE expires_at > started_at + interval '4 seconds'";
    assert!(until(|| async { world.number(renewed).await == 1 }).await, "it has looked for work more than once");
    assert_eq!(world.state(&id).await, JobState::Queued);
    running.stop().await;
}

/// A way to the database that can be cut.
async fn cuttable(db: &PgPool) -> (u16, watch::Sender<bool>) {
    let options = db.connect_options();
    let target = (options.get_host().to_owned(), options.get_port());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let (cut, is_cut) = watch::channel(false);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (target, mut is_cut) = (target.clone(), is_cut.clone());
            tokio::spawn(async move {
                if *is_cut.borrow() {
                    let _ = client.shutdown().await;
                    return;
                }
                let Ok(mut server) = TcpStream::connect(target).await else { return };
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                    _ = is_cut.wait_for(|cut| *cut) => {}
                }
            });
        }
    });
    (port, cut)
}

#[sqlx::test(migrations = "../migrations")]
async fn a_lost_database_stops_no_worker(db: PgPool) {
    let world = World::new(db).await;
    let (port, cut) = cuttable(&world.db).await;
    let mut config = world.config("metric 1\ntouch \"$here/running\"\nwhile ! test -e \"$here/on\"; do sleep 0.05; done\nfor step in 2 3 4; do metric $step; done\nsucceed");
    config.database_url = (*world.db.connect_options()).clone().host("127.0.0.1").port(port).to_url_lossy().to_string();
    let running = world.start(config);
    let id = world.enqueue().await;
    appears(&world.marker("running")).await;
    cut.send_replace(true);
    // The worker ends while nobody reaches the database, and longer than the lease goes by.
    std::fs::write(world.marker("on"), "").expect("it is writable");
    let expired = "SELECT count(*) FROM job_attempts WHERE ended_at IS NULL AND expires_at < now()";
    assert!(until(|| async { world.number(expired).await == 1 }).await);
    cut.send_replace(false);
    world.reaches(&id, JobState::Succeeded).await;
    assert_eq!(world.outcomes(&id).await, ["succeeded"]);
    assert_eq!(world.number("SELECT count(*) FROM job_metrics").await, 4);
    running.stop().await;
}
