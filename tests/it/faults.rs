//! What `kill -9` of each part, a stop in mid-training, and processes that stand still cost: no job, no
//! step and no bit.
//!
//! A job runs undisturbed once. The same job, disturbed, must go on within [`RECLAIMED`], be completed
//! once, and end with the same weights. That no process is left is checked by [`TestApp`]'s drop.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use lathe_tests::{Kind, PATIENCE, TestApp, within};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::{Method, multipart};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::sync::OnceCell;

use crate::training::{ingredients, path, pretrained, text};

const STEPS: u64 = 400;

/// Of a [`TestApp`] by default.
const LEASE: Duration = Duration::from_secs(2);

/// What `serve` promises for its end.
const STOPPED: Duration = Duration::from_secs(10);

/// From a fault to the next finished step.
const RECLAIMED: Duration = Duration::from_secs(15);

/// The weights of the undisturbed run, which are the same on every stack.
static UNDISTURBED: OnceCell<String> = OnceCell::const_new();

/// A stack, the job, and what it makes undisturbed.
pub struct Bench {
    pub app: TestApp,
    request: Value,
    pub weights: String,
}

impl Bench {
    async fn start() -> Bench {
        Bench::on(TestApp::builder().embedded().start().await).await
    }

    pub async fn on(app: TestApp) -> Bench {
        let (dataset, tokenizer) = ingredients(&app).await;
        app.wait_for(&format!("/v1/tokenizers/{}", text(&tokenizer)), &["ready"]).await;
        let request = json!({"method": {"type": "pretrain", "objective": "causal_lm"},
            "model": {"architecture": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 32, "dropout": 0.1},
            "dataset": dataset, "tokenizer": tokenizer, "validation": {"fraction": 0.1},
            "hyperparameters": {"steps": STEPS, "batch_size": 4, "precision": "fp32", "seed": 11,
                "checkpoint_every": 20, "evaluate_every": 100}});
        let mut bench = Bench { app, request, weights: String::new() };
        let undisturbed = async {
            let job = bench.create().await;
            let done = bench.app.wait_for(&path(&job), &["succeeded"]).await;
            bench.weights_of(&done).await
        };
        bench.weights = UNDISTURBED.get_or_init(|| undisturbed).await.clone();
        bench
    }

    async fn create(&self) -> Value {
        self.app.post_json("/v1/training/jobs", &self.request).await.ok()
    }

    /// A new job that has saved a checkpoint and has most of its steps before it, and its worker.
    pub async fn midway(&self) -> (Value, Pid) {
        let path = path(&self.create().await);
        let began = Instant::now();
        loop {
            let job = self.app.wait_for(&path, &["queued", "running"]).await;
            if job["checkpoints"].as_array().is_some_and(|saved| !saved.is_empty()) {
                let step = job["step"].as_u64().expect("a step");
                assert!(step < STEPS / 2, "the job is too quick to be disturbed: {job}");
                return (job, self.worker());
            }
            assert!(began.elapsed() < PATIENCE, "no checkpoint: {job}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The runner that runs a job.
    async fn holder(&self, job: &Value) -> Value {
        let runners = self.app.get("/v1/runners?limit=100").await.ok();
        let mut found = runners["data"].as_array().expect("a list").iter();
        let holds = |runner: &&Value| runner["jobs"].as_array().is_some_and(|jobs| jobs.contains(&job["id"]));
        found.find(holds).unwrap_or_else(|| panic!("nobody runs {job}: {runners}")).clone()
    }

    /// What the database itself says.
    async fn number(&self, query: &'static str) -> i64 {
        let mut conn = PgConnection::connect(&self.app.database_url()).await.expect("the database is there");
        sqlx::query_scalar(query).fetch_one(&mut conn).await.expect("a number")
    }

    /// The newest event of this code.
    pub async fn event(&self, job: &Value, code: &str) -> Value {
        let events = self.app.get(&format!("{}/events?limit=1000", path(job))).await.ok();
        let mut found = events["data"].as_array().expect("a list").iter().rev();
        found.find(|event| event["code"] == code).unwrap_or_else(|| panic!("no {code}: {events}")).clone()
    }

    /// The only worker.
    fn worker(&self) -> Pid {
        let workers = self.app.processes(Kind::Worker);
        assert_eq!(workers.len(), 1, "{workers:?}");
        workers[0]
    }

    /// Waits until attempt `attempt` finishes steps, as told by whoever answers by then.
    pub async fn goes_on(&self, job: &Value, attempt: u64, fault: Instant) {
        let mut first = None;
        loop {
            let asked = self.app.request(reqwest::Method::GET, &path(job)).timeout(Duration::from_secs(2)).send().await;
            if let Ok(answer) = asked
                && answer.status().is_success()
                && let Ok(job) = answer.json::<Value>().await
                && job["attempts"] == attempt
            {
                let first = *first.get_or_insert(job["step"].as_u64());
                if job["step"].as_u64() > first || job["state"] == "succeeded" {
                    return println!("went on within {:?}", fault.elapsed());
                }
            }
            assert!(fault.elapsed() < RECLAIMED, "the job has not gone on: {job}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for the job's success and checks that nothing was lost, repeated or changed.
    pub async fn completed(&self, job: &Value) -> Value {
        let done = self.app.wait_for(&path(job), &["succeeded"]).await;
        assert_eq!((&done["step"], &done["error"]), (&json!(STEPS), &Value::Null));
        assert_eq!(self.weights_of(&done).await, self.weights, "the weights are those of the undisturbed run: {done}");
        let events = self.app.get(&format!("{}/events?limit=100", path(job))).await.ok();
        let events = events["data"].as_array().expect("a list");
        assert_eq!(events.iter().filter(|event| event["code"] == "job.succeeded").count(), 1, "{events:?}");
        let metrics = self.app.get(&format!("{}/metrics", path(job))).await.ok();
        let rows = metrics["data"].as_array().expect("a list").iter();
        let steps: Vec<u64> = rows.filter(|row| row["loss"].is_f64()).filter_map(|row| row["step"].as_u64()).collect();
        assert_eq!(steps.len() as u64, STEPS, "a row for every step");
        assert_eq!(steps.iter().collect::<BTreeSet<_>>().len(), steps.len(), "and one only");
        done
    }

    pub async fn weights_of(&self, job: &Value) -> String {
        let model = self.app.get(&format!("/v1/models/{}", text(&job["model"]))).await.ok();
        assert_eq!(model["state"], "ready");
        text(&model["weights_sha256"]).to_owned()
    }

    /// A new job whose worker is stopped while it writes a checkpoint, and that worker.
    async fn midway_in_a_checkpoint(&self) -> (Value, Pid) {
        let (job, worker) = self.midway().await;
        let staging = self.app.data_dir.join("artifacts/staging").join(text(&job["id"])).join("1");
        loop {
            while !writes_a_checkpoint(&staging) {
                assert!(is_alive(worker), "the job ended before it was seen to write a checkpoint");
                std::thread::yield_now();
            }
            kill(worker, Signal::SIGSTOP).expect("it is ours");
            within(RECLAIMED, "the worker stands still", || stands_still(worker).then_some(()));
            if writes_a_checkpoint(&staging) {
                return (job, worker);
            }
            // It was done before the signal came.
            kill(worker, Signal::SIGCONT).expect("it is ours");
        }
    }
}

/// A checkpoint has this name until it is whole.
fn writes_a_checkpoint(staging: &Path) -> bool {
    let entries = fs::read_dir(staging).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).any(|name| name.ends_with(".tmp"))
}

fn pid_of(runner: &Value) -> Pid {
    Pid::from_raw(runner["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a process id"))
}

/// A process that has ended and that nobody has waited for has no command line.
fn is_alive(process: Pid) -> bool {
    fs::read(format!("/proc/{process}/cmdline")).is_ok_and(|command| !command.is_empty())
}

/// Every thread of it is stopped.
fn stands_still(process: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok()).all(|status| status.contains("State:\tT"))
}

pub fn attempts(job: &Value) -> (u64, u64) {
    (job["attempts"].as_u64().expect("a number"), job["failures"].as_u64().expect("a number"))
}

#[tokio::test]
async fn kill_9_of_any_part_costs_no_job_and_no_bit() {
    let bench = Bench::start().await;

    // A worker that dies is a failed attempt; there may be something wrong with the job.
    let (job, worker) = bench.midway().await;
    let fault = Instant::now();
    kill(worker, Signal::SIGKILL).expect("it is ours");
    bench.goes_on(&job, 2, fault).await;
    assert_eq!(attempts(&bench.completed(&job).await), (2, 1));

    let (job, worker) = bench.midway_in_a_checkpoint().await;
    let fault = Instant::now();
    kill(worker, Signal::SIGKILL).expect("it is ours");
    bench.goes_on(&job, 2, fault).await;
    assert_eq!(attempts(&bench.completed(&job).await), (2, 1));

    // A runner takes its worker along, and the job is another's when the lease has run out.
    let (job, worker) = bench.midway().await;
    let fault = Instant::now();
    bench.app.kill(Kind::Runner);
    within(RECLAIMED, "the worker goes with its runner", || (!is_alive(worker)).then_some(()));
    bench.goes_on(&job, 2, fault).await;
    assert_eq!(attempts(&bench.completed(&job).await), (2, 0));

    // Neither the api nor the database takes a job along.
    for part in [Kind::Api, Kind::Postgres] {
        let (job, worker) = bench.midway().await;
        let fault = Instant::now();
        bench.app.kill(part);
        assert!(is_alive(worker), "{part:?} was killed in mid-training");
        bench.goes_on(&job, 1, fault).await;
        assert_eq!(attempts(&bench.completed(&job).await), (1, 0), "{part:?}");
    }
}

#[tokio::test]
async fn a_stop_in_mid_training_is_no_failure_and_the_next_start_goes_on() {
    let mut bench = Bench::start().await;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (job, _) = bench.midway().await;
        let stopped = bench.app.stop_by(signal);
        assert!(stopped < STOPPED, "{signal}: {stopped:?}");
        bench.app.start_again();
        bench.goes_on(&job, 2, Instant::now()).await;
        let done = bench.completed(&job).await;
        assert_eq!(attempts(&done), (2, 0));
        let resumed = bench.event(&job, "checkpoint.resumed").await;
        assert!(resumed["data"]["step"].as_u64() >= job["step"].as_u64(), "what was done is not done again: {resumed}");
    }

    // Killed, `serve` takes everything along; the runner may still save.
    let (job, worker) = bench.midway().await;
    bench.app.kill_serve();
    within(RECLAIMED, "everything goes with serve", || {
        let kinds = [Kind::Api, Kind::Runner, Kind::Postgres, Kind::Worker, Kind::Engine];
        (!is_alive(worker) && kinds.iter().all(|kind| bench.app.processes(*kind).is_empty())).then_some(())
    });
    bench.app.start_again();
    bench.goes_on(&job, 2, Instant::now()).await;
    assert_eq!(attempts(&bench.completed(&job).await), (2, 0));
}

#[tokio::test]
async fn at_the_defaults_a_killed_runner_s_job_goes_on_at_another() {
    let bench = Bench::on(TestApp::builder().embedded().runners(2).lease_seconds(10.0).start().await).await;
    let (job, worker) = bench.midway().await;
    let holder = bench.holder(&job).await;
    let fault = Instant::now();
    kill(pid_of(&holder), Signal::SIGKILL).expect("it is ours");
    bench.goes_on(&job, 2, fault).await;
    assert!(!is_alive(worker), "the worker goes with its runner");
    assert_ne!(bench.holder(&job).await["id"], holder["id"]);
    assert_eq!(attempts(&bench.completed(&job).await), (2, 0));
}

#[tokio::test]
async fn a_runner_that_stood_still_writes_nothing_when_it_is_back() {
    let bench = Bench::on(TestApp::builder().embedded().runners(2).start().await).await;
    let (job, worker) = bench.midway().await;
    let holder = bench.holder(&job).await;
    let fault = Instant::now();
    kill(pid_of(&holder), Signal::SIGSTOP).expect("it is ours");
    bench.goes_on(&job, 2, fault).await;
    kill(pid_of(&holder), Signal::SIGCONT).expect("it is ours");
    within(RECLAIMED, "the worker of the lost attempt is killed", || (!is_alive(worker)).then_some(()));
    assert_eq!(attempts(&bench.completed(&job).await), (2, 0));
    let late = "SELECT count(*) FROM checkpoints c JOIN job_attempts a ON a.job_id = c.job_id AND a.n = c.attempt
                WHERE a.outcome = 'lost' AND c.created_at > a.ended_at";
    assert_eq!(bench.number(late).await, 0);
}

#[tokio::test]
async fn a_worker_or_a_database_that_stands_still_costs_nothing() {
    let bench = Bench::start().await;
    let expiry = "SELECT (extract(epoch FROM max(expires_at)) * 1000)::bigint FROM job_attempts WHERE ended_at IS NULL";
    let (job, worker) = bench.midway().await;
    kill(worker, Signal::SIGSTOP).expect("it is ours");
    let before = bench.number(expiry).await;
    let began = Instant::now();
    while bench.number(expiry).await < before + 2 * LEASE.as_millis() as i64 {
        assert!(began.elapsed() < PATIENCE, "the lease is not renewed while the worker stands still");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    kill(worker, Signal::SIGCONT).expect("it is ours");
    assert_eq!(attempts(&bench.completed(&job).await), (1, 0));

    // The worker trains on, and what it has done is published once the database is back.
    let (job, _) = bench.midway().await;
    let registered = job["checkpoints"].as_array().and_then(|all| all.iter().filter_map(|one| one["step"].as_u64()).max());
    let staging = bench.app.data_dir.join("artifacts/staging").join(text(&job["id"])).join("1");
    let database = bench.app.database_processes();
    // A backend may have ended since.
    database.iter().for_each(|process| {
        let _ = kill(*process, Signal::SIGSTOP);
    });
    let began = Instant::now();
    within(PATIENCE, "the worker trains on without the database", || {
        let staged = fs::read_dir(&staging).into_iter().flatten().flatten();
        let newest = staged.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max();
        (newest > registered && began.elapsed() > 2 * LEASE).then_some(())
    });
    // A backend may have ended since.
    database.iter().for_each(|process| {
        let _ = kill(*process, Signal::SIGCONT);
    });
    assert_eq!(attempts(&bench.completed(&job).await), (1, 0));
}

#[tokio::test]
async fn a_worker_that_stands_still_for_too_long_is_replaced() {
    let app = TestApp::builder().embedded().argument("--stall-seconds").argument("5").start().await;
    let bench = Bench::on(app).await;
    let (job, worker) = bench.midway().await;
    let fault = Instant::now();
    kill(worker, Signal::SIGSTOP).expect("it is ours");
    bench.goes_on(&job, 2, fault).await;
    assert!(!is_alive(worker));
    let stalled = bench.event(&job, "worker.stalled").await;
    assert!(text(&stalled["message"]).contains("no sign of life for 5 seconds"), "{stalled}");
    assert_eq!(attempts(&bench.completed(&job).await), (2, 1));
}

/// What a client wants to be there once, repeated until it is.
async fn insist(app: &TestApp, build: impl Fn(u32) -> reqwest::RequestBuilder) -> Value {
    let began = Instant::now();
    for attempt in 0.. {
        let answer = build(attempt).timeout(Duration::from_secs(5)).send().await;
        if let Ok(answer) = answer
            && answer.status().is_success()
            && let Ok(body) = answer.json().await
        {
            return body;
        }
        assert!(began.elapsed() < PATIENCE, "it is never done:\n{}", app.log_text());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    unreachable!("an open range")
}

#[tokio::test]
async fn kill_9_of_the_database_under_load_loses_nothing_and_does_nothing_twice() {
    let bench = Bench::on(TestApp::builder().embedded().runners(2).start().await).await;
    let (app, done) = (&bench.app, std::sync::atomic::AtomicBool::new(false));
    let jobs = [bench.create().await, bench.create().await, bench.create().await];
    let project = |client: usize| {
        let done = &done;
        async move {
            let mut made = Vec::new();
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let name = format!("load-{client}-{}", made.len());
                let request =
                    |_| app.request(Method::POST, "/v1/projects").header("idempotency-key", &name).json(&json!({"name": name}));
                made.push(insist(app, request).await["id"].clone());
            }
            made
        }
    };
    let file = |client: usize| {
        let done = &done;
        async move {
            let mut names = BTreeSet::new();
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let name = format!("load-{client}-{}.txt", names.len());
                let request = |attempt: u32| {
                    let part = multipart::Part::bytes(name.clone().into_bytes()).file_name(name.clone());
                    let form = multipart::Form::new().text("purpose", "user_data").part("file", part);
                    app.request(Method::POST, "/v1/files").header("x-stainless-retry-count", attempt).multipart(form)
                };
                insist(app, request).await;
                names.insert(name);
            }
            names
        }
    };
    let faults = async {
        for _ in 0..3 {
            let killed = app.kill(Kind::Postgres);
            app.replaced(Kind::Postgres, &killed);
            insist(app, |_| app.request(Method::GET, "/readyz")).await;
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let (mine, others, files, more, ()) = tokio::join!(project(0), project(1), file(0), file(1), faults);
    // A quick machine makes more projects than a page holds.
    let (mut listed, mut after) = (Vec::new(), String::new());
    loop {
        let page = insist(app, |_| app.request(Method::GET, &format!("/v1/projects?limit=100{after}"))).await;
        listed.extend_from_slice(page["data"].as_array().expect("a list"));
        if page["has_more"] != true {
            break;
        }
        after = format!("&after={}", text(&page["last_id"]));
    }
    for id in mine.iter().chain(&others) {
        let found = listed.iter().filter(|one| one["id"] == *id).count();
        assert_eq!(found, 1, "{id} in {listed:?}");
    }
    let named: i64 = bench.number("SELECT count(*) FROM projects WHERE name LIKE 'load-%'").await;
    assert_eq!(named as usize, mine.len() + others.len());
    let kept: i64 = bench.number("SELECT count(*) FROM files WHERE filename LIKE 'load-%' AND deleted_at IS NULL").await;
    assert_eq!(kept as usize, files.len() + more.len());
    for job in &jobs {
        bench.completed(job).await;
    }
}

#[tokio::test]
async fn a_killed_engine_is_replaced_for_the_next_completion() {
    let app = TestApp::start().await;
    let request = json!({"model": pretrained(&app).await, "prompt": "1+1?", "max_tokens": 4, "temperature": 0});
    let before = app.post_json("/v1/completions", &request).await.ok();
    let killed = app.kill(Kind::Engine);
    let fault = Instant::now();
    // Clients are told to come again while it loads, and nothing else.
    let after = loop {
        let answer = app.post_json("/v1/completions", &request).await;
        if answer.status.is_success() {
            break answer.body;
        }
        assert_eq!(answer.refused(503)["code"], "model_loading");
        assert!(fault.elapsed() < RECLAIMED, "the model does not answer again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    println!("answers again after {:?}", fault.elapsed());
    assert_eq!(after["choices"], before["choices"]);
    assert!(app.processes(Kind::Engine).iter().all(|engine| !killed.contains(engine)));
}
