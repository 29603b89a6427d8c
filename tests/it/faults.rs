//! What `kill -9` of each part, and a stop in mid-training, cost: no job, no step and no bit.
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
use serde_json::{Value, json};

use crate::training::{ingredients, path, pretrained, text};

const STEPS: u64 = 400;

/// From a fault to the next finished step.
const RECLAIMED: Duration = Duration::from_secs(15);

/// A stack on which the job has run once.
struct Bench {
    app: TestApp,
    request: Value,
    weights: String,
}

impl Bench {
    async fn start() -> Bench {
        let app = TestApp::builder().embedded().start().await;
        let (dataset, tokenizer) = ingredients(&app).await;
        let request = json!({"method": {"type": "pretrain", "objective": "causal_lm"},
            "model": {"architecture": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 32, "dropout": 0.1},
            "dataset": dataset, "tokenizer": tokenizer, "validation": {"fraction": 0.1},
            "hyperparameters": {"steps": STEPS, "batch_size": 4, "precision": "fp32", "seed": 11,
                "checkpoint_every": 20, "evaluate_every": 100}});
        let mut bench = Bench { app, request, weights: String::new() };
        let job = bench.create().await;
        let done = bench.app.wait_for(&path(&job), &["succeeded"]).await;
        bench.weights = bench.weights_of(&done).await;
        bench
    }

    async fn create(&self) -> Value {
        self.app.post_json("/v1/training/jobs", &self.request).await.ok()
    }

    /// A new job that has saved a checkpoint and has most of its steps before it, and its worker.
    async fn midway(&self) -> (Value, Pid) {
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

    /// The only worker.
    fn worker(&self) -> Pid {
        let workers = self.app.processes(Kind::Worker);
        assert_eq!(workers.len(), 1, "{workers:?}");
        workers[0]
    }

    /// Waits until attempt `attempt` finishes steps, as told by whoever answers by then.
    async fn goes_on(&self, job: &Value, attempt: u64, fault: Instant) {
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
    async fn completed(&self, job: &Value) -> Value {
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

    async fn weights_of(&self, job: &Value) -> String {
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

/// A process that has ended and that nobody has waited for has no command line.
fn is_alive(process: Pid) -> bool {
    fs::read(format!("/proc/{process}/cmdline")).is_ok_and(|command| !command.is_empty())
}

/// Every thread of it is stopped.
fn stands_still(process: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok()).all(|status| status.contains("State:\tT"))
}

fn attempts(job: &Value) -> (u64, u64) {
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
    let (job, _) = bench.midway().await;
    bench.app.stop();
    bench.app.start_again();
    bench.goes_on(&job, 2, Instant::now()).await;
    let done = bench.completed(&job).await;
    assert_eq!(attempts(&done), (2, 0));
    let events = bench.app.get(&format!("{}/events?limit=100", path(&job))).await.ok();
    let resumed = events["data"].as_array().expect("a list").iter().find(|event| event["code"] == "checkpoint.resumed").cloned();
    let resumed = resumed.unwrap_or_else(|| panic!("it goes on from a checkpoint: {events}"));
    assert!(resumed["data"]["step"].as_u64() >= job["step"].as_u64(), "what was done is not done again: {resumed}");
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
