//! A disk that fills up: nothing is lost, everything says why, and all goes on once there is room.
//!
//! The artifacts lie on a small file system of their own where the machine lets this user have one (root,
//! or user namespaces). Where it does not, api and runners are told that as little is free; only writes that
//! the system itself refuses are then left to the tests of `model` and `jobs`.

use std::{
    fs::{self, File},
    path::PathBuf,
    time::{Duration, Instant},
};

use lathe_tests::{PATIENCE, Pretence, TestApp, can_mount};
use serde_json::{Value, json};

use crate::{
    faults::{Bench, attempts},
    training::{ingredients, path, text},
};

const DISK: u64 = 64 << 20;
const LOW: u64 = 16 << 20;

/// A stack with a small disk.
struct Small {
    bench: Bench,
    pretence: Option<Pretence>,
}

impl Small {
    async fn start(low: u64) -> Small {
        let builder = TestApp::builder().argument(&format!("--disk-low-bytes={low}"));
        let pretence = (!can_mount()).then(Pretence::new);
        let app = match &pretence {
            None => builder.small_disk(DISK).start().await,
            Some(pretence) => {
                pretence.leave_free(DISK);
                builder.believing(pretence).start().await
            }
        };
        Small { bench: Bench::on(app).await, pretence }
    }

    /// Leaves this much free for the stack; 0: nothing at all.
    fn leave(&self, left: u64) -> Filler<'_> {
        if let Some(pretence) = &self.pretence {
            pretence.leave_free(left);
            return Filler::Pretended(pretence);
        }
        let artifacts = self.bench.app.artifacts();
        let path = artifacts.join("filler");
        let file = File::create(&path).expect("it is writable");
        // The stack may write between the look and the taking: then it is looked again.
        let taken = (0..100).any(|_| {
            file.set_len(0).expect("it is ours");
            let found = nix::sys::statvfs::statvfs(&artifacts).expect("it is there");
            let free = found.blocks_available() * found.fragment_size();
            let bytes = i64::try_from(free.saturating_sub(left)).expect("a small disk");
            nix::fcntl::posix_fallocate(&file, 0, bytes).is_ok()
        });
        assert!(taken, "the disk does not hold still");
        Filler::File(path)
    }
}

/// Takes room until it is dropped.
enum Filler<'a> {
    File(PathBuf),
    Pretended(&'a Pretence),
}

impl Drop for Filler<'_> {
    fn drop(&mut self) {
        match self {
            // With the stack, the disk may be gone already.
            Filler::File(path) => _ = fs::remove_file(path),
            Filler::Pretended(pretence) => pretence.leave_free(DISK),
        }
    }
}

async fn reaches(app: &TestApp, job: &Value, state: &str) -> Value {
    let began = Instant::now();
    loop {
        let found = app.get(&path(job)).await.ok();
        if found["state"] == state {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "it does not become {state}: {found}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn upload(app: &TestApp, bytes: usize) -> lathe_tests::Answer {
    let part = reqwest::multipart::Part::bytes(vec![b'x'; bytes]).file_name("x.txt");
    let form = reqwest::multipart::Form::new().text("purpose", "user_data").part("file", part);
    app.send(app.request(reqwest::Method::POST, "/v1/files").multipart(form)).await
}

#[tokio::test]
async fn below_the_low_mark_trainings_save_and_wait() {
    let small = Small::start(LOW).await;
    let bench = &small.bench;
    let (job, _) = bench.midway().await;
    let filler = small.leave(LOW - (4 << 20));
    let waiting = reaches(&bench.app, &job, "queued").await;
    let event = bench.event(&job, "job.waiting_for_disk").await;
    assert_eq!(event["level"], "warn");
    let saved = waiting["checkpoints"].as_array().and_then(|all| all.iter().filter_map(|one| one["step"].as_u64()).max());
    assert!(saved >= job["step"].as_u64(), "what was done is saved: {waiting}");

    let ready = bench.app.get("/readyz").await;
    assert_eq!(ready.status, 503);
    let disk = ready.body["checks"].as_array().expect("a list").iter().find(|check| check["name"] == "disk").cloned();
    assert!(disk.is_some_and(|disk| disk["ok"] == false), "{}", ready.text);
    let metrics = bench.app.get("/metrics").await.text;
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}: {metrics}"));
        line.trim().parse().expect("a number")
    };
    assert!(value("lathe_disk_free_bytes ") < value("lathe_disk_low_mark_bytes "));
    assert_eq!(upload(&bench.app, 1000).await.refused(507)["code"], "disk_full");

    drop(filler);
    assert_eq!(attempts(&bench.completed(&job).await), (2, 0));
    upload(&bench.app, 1000).await.ok();
}

#[tokio::test]
async fn a_disk_without_room_pauses_a_training_that_keeps_its_checkpoints() {
    if !can_mount() {
        // No write of a worker's is refused; an upload is, before it is one.
        let small = Small::start(0).await;
        let filler = small.leave(100);
        assert_eq!(upload(&small.bench.app, 1000).await.refused(507)["code"], "disk_full");
        drop(filler);
        upload(&small.bench.app, 1000).await.ok();
        return;
    }
    let small = Small::start(0).await;
    let bench = &small.bench;
    let (job, _) = bench.midway().await;
    let filler = small.leave(0);
    let paused = reaches(&bench.app, &job, "paused").await;
    let event = bench.event(&job, "job.paused").await;
    assert_eq!((&event["level"], &event["data"]["code"]), (&json!("warn"), &json!("disk_full")), "{event}");
    assert!(!paused["checkpoints"].as_array().expect("a list").is_empty(), "the ones before are kept: {paused}");
    // The upload is refused, and nothing of it stays.
    assert_eq!(upload(&bench.app, 3 << 20).await.refused(507)["code"], "disk_full");
    assert_eq!(fs::read_dir(bench.app.artifacts().join("tmp")).expect("it is there").count(), 0);
    bench.app.get("/healthz").await.ok();
    drop(filler);
    bench.app.post(&format!("{}/resume", path(&job))).await.ok();
    assert_eq!(attempts(&bench.completed(&job).await), (2, 0));

    // One whose checkpoint never fits is told before its first step.
    let (dataset, tokenizer) = ingredients(&bench.app).await;
    let large = json!({"method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 6, "heads": 4, "width": 320, "context": 32},
        "dataset": dataset, "tokenizer": tokenizer, "hyperparameters": {"steps": 5, "batch_size": 2, "precision": "fp32"}});
    let large = bench.app.post_json("/v1/training/jobs", &large).await.ok();
    let paused = reaches(&bench.app, &large, "paused").await;
    assert_eq!(paused["first_step_at"], Value::Null);
    let event = bench.event(&large, "job.paused").await;
    assert_eq!(event["data"]["code"], "disk_full");
    assert!(text(&event["message"]).contains("free some space"), "{event}");
    bench.app.post(&format!("{}/cancel", path(&large))).await.ok();
}
