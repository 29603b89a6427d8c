//! `lathe worker` as its runner meets it: a real process, its task and commands on standard input, its
//! reports on descriptor 3, its exit status; and the bounds of a worker that reads what users uploaded.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
};

use lathe_jobs::child::{self, Bounds, Start};
use lathe_model::{
    data::rows::{Row, Writer},
    protocol::{Exit, FailureCode, PROTOCOL_VERSION, Phase, REPORT_FD, Report, TaskResult},
    tokenizer::{self, MIN_VOCABULARY},
};
use lathe_tests::{PATIENCE, lathe};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// A dataset and a tokenizer in a folder of their own.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut writer = Writer::create(&folder.path().join("dataset")).expect("the folder is ours");
        for i in 0..60 {
            writer.push(&Row::Text { text: format!("text {i} of {}", i * i) }).expect("the folder is ours");
        }
        writer.finish().expect("the folder is ours");
        tokenizer::train(&folder.path().join("dataset"), MIN_VOCABULARY, &folder.path().join("tokenizer")).expect("bytes");
        Bench(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn training(&self, steps: u64) -> Value {
        json!({"kind": "train",
            "spec": {"spec_version": 1, "method": {"type": "pretrain", "objective": "causal_lm"},
                "model": {"architecture": "gpt", "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "width": 16, "mlp_width": 32,
                    "context": 16, "vocabulary": 0, "positions": "learned", "norm": "layer", "norm_eps": 1e-5, "activation": "gelu",
                    "bias": true, "tie_embeddings": true, "dropout": 0.0, "rope_theta": 10000.0},
                "validation": null,
                "train": {"steps": steps, "epochs": null, "batch_size": 2, "micro_batch_size": null, "precision": null,
                    "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
                    "schedule": {"type": "cosine", "peak": 1e-3, "warmup_steps": null, "floor": 1e-4},
                    "clip": 1.0, "seed": 1, "checkpoint_every": 1_000_000_000, "evaluate_every": null, "keep_checkpoints": 1,
                    "sample_every": null, "sample_prompts": [],
                    "divergence": {"window": 50, "factor": 3.0, "patience": 200, "non_finite_steps": 3}}},
            "dataset": self.path("dataset"), "validation_dataset": null, "tokenizer": self.path("tokenizer"), "base_model": null,
            "resume": null, "shard_cache": self.path("shards"), "dataset_sha256": "d", "tokenizer_sha256": "t",
            "staging": self.path("staging"), "device": {"kind": "cpu"}, "disk_low_bytes": 0})
    }
}

fn spec(task: &Value) -> String {
    json!({"protocol": PROTOCOL_VERSION, "job": "ftjob-1", "attempt": 1, "threads": 1, "task": task}).to_string()
}

struct Worker {
    process: Child,
    stdin: Option<ChildStdin>,
    reports: Receiver<String>,
}

impl Worker {
    /// A worker that was given `line`.
    fn start(line: &str) -> Worker {
        assert_eq!(REPORT_FD, 3);
        // The shell puts the pipe of its standard output where the worker reports.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" worker 3>&1 1>&2"]).arg(lathe());
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("sh runs");
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let (sender, reports) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let stdin = process.stdin.take();
        let mut worker = Worker { process, stdin, reports };
        worker.tell(line);
        worker
    }

    fn training(task: &Value) -> Worker {
        Worker::start(&spec(task))
    }

    /// One that has finished steps.
    fn in_mid_training(bench: &Bench) -> Worker {
        let mut worker = Worker::training(&bench.training(1_000_000));
        worker.until(|report| matches!(report, Report::Metric { row } if row.step > 2));
        worker
    }

    fn tell(&mut self, line: &str) {
        // A worker that has ended is seen by how it ended.
        let _ = writeln!(self.stdin.as_mut().expect("it was not closed"), "{line}");
    }

    /// What it reports next, besides that it is alive.
    fn next(&mut self) -> Option<Report> {
        loop {
            let line = match self.reports.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => panic!("the worker says nothing"),
            };
            match serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")) {
                Report::Alive { .. } => {}
                report => return Some(report),
            }
        }
    }

    #[track_caller]
    fn until(&mut self, wanted: impl Fn(&Report) -> bool) -> Report {
        std::iter::from_fn(|| self.next()).find(|report| wanted(report)).expect("the worker ended before it said so")
    }

    /// What it still reports, and its exit status.
    fn ended(mut self) -> (Vec<Report>, ExitStatus) {
        let reports = std::iter::from_fn(|| self.next()).collect();
        (reports, self.process.wait().expect("it is our child"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn saved(reports: &[Report]) -> Option<(u64, &Path)> {
    reports.iter().find_map(|report| match report {
        Report::Checkpoint { step, folder, .. } => Some((*step, folder.as_path())),
        _ => None,
    })
}

/// The first reports, the last one, and the status; in between every step.
#[test]
fn a_training_is_reported_from_its_phases_to_its_model() {
    let bench = Bench::new();
    let (reports, status) = Worker::training(&bench.training(3)).ended();
    assert_eq!(status.code(), Some(Exit::Done as i32), "{reports:?}");
    let phases: Vec<Phase> =
        reports.iter().filter_map(|report| if let Report::Phase { phase } = report { Some(*phase) } else { None }).collect();
    assert_eq!(phases, [Phase::Preparing, Phase::Training, Phase::Publishing]);
    assert!(matches!(&reports[1], Report::Started { numerics, .. } if numerics.threads == 1), "{reports:?}");
    let Report::Resolved { spec, .. } = &reports[2] else { panic!("{reports:?}") };
    assert!(!spec.is_open() && spec.model.vocabulary == MIN_VOCABULARY);
    let steps: Vec<u64> =
        reports.iter().filter_map(|report| if let Report::Metric { row } = report { Some(row.step) } else { None }).collect();
    assert_eq!(steps, [1, 2, 3]);
    assert_eq!(saved(&reports).map(|(step, _)| step), Some(3));
    let Some(Report::Done { result: TaskResult::Model { folder, .. } }) = reports.last() else { panic!("{reports:?}") };
    assert_eq!(*folder, bench.path("staging/model"));
    assert!(folder.join("weights.safetensors").exists() && folder.join("tokenizer.json").exists());
}

#[test]
fn a_checkpoint_is_saved_on_command_and_training_goes_on_to_a_pause() {
    let bench = Bench::new();
    let mut worker = Worker::in_mid_training(&bench);
    worker.tell("nonsense that a later version may understand");
    worker.tell(r#""checkpoint""#);
    let Report::Checkpoint { step, .. } = worker.until(|report| matches!(report, Report::Checkpoint { .. })) else {
        unreachable!()
    };
    worker.until(|report| matches!(report, Report::Metric { row } if row.step > step));
    worker.tell(r#""pause""#);
    let (reports, status) = worker.ended();
    assert_eq!(status.code(), Some(Exit::Stopped as i32));
    let (paused, folder) = saved(&reports).expect("a pause saves");
    assert!(paused > step);
    lathe_model::checkpoint::verify(folder).expect("it is whole");
    // The last thing that was said: nothing came after it.
    assert!(matches!(reports.last(), Some(Report::Checkpoint { .. })), "{:?}", reports.last());
}

/// Service managers send SIGTERM to every process of a service at once.
#[test]
fn sigterm_saves_like_a_pause() {
    let bench = Bench::new();
    let worker = Worker::in_mid_training(&bench);
    kill(Pid::from_raw(worker.process.id() as i32), Signal::SIGTERM).expect("it is ours");
    let (reports, status) = worker.ended();
    assert_eq!(status.code(), Some(Exit::Stopped as i32));
    lathe_model::checkpoint::verify(saved(&reports).expect("it saves").1).expect("it is whole");
}

#[test]
fn a_cancelled_worker_saves_nothing() {
    let bench = Bench::new();
    let mut worker = Worker::in_mid_training(&bench);
    worker.tell(r#""cancel""#);
    let (reports, status) = worker.ended();
    assert_eq!(status.code(), Some(Exit::Stopped as i32));
    assert_eq!(saved(&reports), None);
    assert!(!reports.iter().any(|report| matches!(report, Report::Done { .. } | Report::Failed { .. })));
}

#[test]
fn the_end_of_standard_input_ends_the_worker_at_once() {
    let bench = Bench::new();
    let mut worker = Worker::in_mid_training(&bench);
    worker.stdin = None;
    let (reports, status) = worker.ended();
    assert_eq!(status.code(), Some(Exit::Orphaned as i32));
    assert_eq!(saved(&reports), None, "nobody is left to save for");
}

#[test]
fn a_spec_that_cannot_be_read_has_its_own_status() {
    let other_version =
        json!({"protocol": PROTOCOL_VERSION + 1, "job": "j", "attempt": 1, "threads": 1, "task": {"kind": "ingest"}});
    for line in ["", "not JSON", "{}", &other_version.to_string()] {
        let (reports, status) = Worker::start(line).ended();
        assert_eq!((reports.len(), status.code()), (0, Some(Exit::BadSpec as i32)), "{line}");
    }
}

#[test]
fn what_fails_says_why_and_whether_to_try_again() {
    let bench = Bench::new();
    let mut task = bench.training(3);
    task["spec"]["method"] = json!({"type": "instruction", "template": "ins"});
    let (reports, status) = Worker::training(&task).ended();
    assert_eq!(status.code(), Some(Exit::Failed as i32));
    let Some(Report::Failed { failure }) = reports.last() else { panic!("{reports:?}") };
    assert_eq!((failure.code, failure.retryable), (FailureCode::NoSupervisedTokens, false));
    // A panic inside libtorch (a table with fewer rows than the weights' file) is a failure too.
    let mut task = bench.training(3);
    task["spec"]["model"]["head_dim"] = json!(7);
    task["spec"]["model"]["positions"] = json!("rotary");
    let (reports, status) = Worker::training(&task).ended();
    assert_eq!(status.code(), Some(Exit::Failed as i32), "{reports:?}");
    assert!(matches!(reports.last(), Some(Report::Failed { .. })), "{reports:?}");
}

/// A worker as the runner starts it, within bounds; how it ended, and the end of its log.
async fn bounded(task: Value, bounds: Bounds) -> (Vec<Report>, ExitStatus, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let log = folder.path().join("log");
    let start = Start { program: lathe(), arguments: vec!["worker".into()], environment: Vec::new(), log: log.clone(), bounds };
    let mut child = child::Child::start(start).await.expect("it starts");
    child.tell(&spec(&task)).await;
    let mut reports = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, async {
        loop {
            let mut line = Vec::new();
            if !child.report(&mut line).await.expect("reports are lines") {
                return child.wait().await.expect("it is our child");
            }
            match serde_json::from_slice(&line).expect("a report") {
                Report::Alive { .. } => {}
                report => reports.push(report),
            }
        }
    });
    let status = ended.await.expect("its bounds end it");
    (reports, status, std::fs::read_to_string(log).unwrap_or_default())
}

fn by_template(output: &str, rows: u64, folder: &Path) -> Value {
    let templates = json!([{"instruction": "{{ a }}", "output": output, "variables": {"a": {"range": [0, 2_000_000_000]}}}]);
    json!({"kind": "ingest", "output": folder, "max_bytes": 1_u64 << 40,
        "source": {"type": "template", "rows": rows, "seed": 1, "exclude": [], "templates": templates}})
}

/// Doubling a text forty times takes few steps and would take a terabyte: fuel is paid for bytes too.
#[tokio::test]
async fn a_template_that_eats_memory_runs_out_of_fuel() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let doubling = "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}";
    let bounds = Bounds { memory_bytes: Some(1 << 30), cpu_seconds: None };
    let (reports, status, log) = bounded(by_template(doubling, 1, &folder.path().join("dataset")), bounds).await;
    assert_eq!(status.code(), Some(Exit::Failed as i32), "{reports:?} {log}");
    let Some(Report::Failed { failure }) = reports.last() else { panic!("{reports:?}") };
    assert_eq!(failure.code, FailureCode::BadTemplate);
}

#[tokio::test]
async fn processor_time_is_bounded() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bounds = Bounds { memory_bytes: None, cpu_seconds: Some(1) };
    let (_, status, _) = bounded(by_template("{{ a }}", 1_000_000_000, &folder.path().join("dataset")), bounds).await;
    assert!([Some(Signal::SIGXCPU as i32), Some(Signal::SIGKILL as i32)].contains(&status.signal()), "{status:?}");
}

/// The import of a tokenizer, of a file that is nested too deeply, and of one whose small text becomes
/// half a gigabyte of values: the worker ends alone, and its log says why.
#[tokio::test]
async fn an_uploaded_tokenizer_is_read_within_bounds() {
    use std::os::unix::process::ExitStatusExt;
    let bench = Bench::new();
    let task = |file: PathBuf, output: &str| json!({"kind": "tokenizer", "dataset": null, "file": file, "vocabulary": 0, "output": bench.path(output)});
    let bounds = Bounds { memory_bytes: Some(1 << 30), cpu_seconds: Some(60) };
    let (reports, status, log) = bounded(task(bench.path("tokenizer/tokenizer.json"), "imported"), bounds).await;
    assert_eq!(status.code(), Some(Exit::Done as i32), "{reports:?} {log}");

    std::fs::write(bench.path("deep.json"), "[".repeat(100_000)).expect("the folder is ours");
    let (reports, status, log) = bounded(task(bench.path("deep.json"), "deep"), bounds).await;
    assert_eq!(status.code(), Some(Exit::Failed as i32), "{reports:?} {log}");
    let Some(Report::Failed { failure }) = reports.last() else { panic!("{reports:?}") };
    assert_eq!(failure.code, FailureCode::InvalidTokenizer);

    std::fs::write(bench.path("wide.json"), format!("[{}0]", "0,".repeat(17 << 20))).expect("the folder is ours");
    let (reports, status, log) = bounded(task(bench.path("wide.json"), "wide"), bounds).await;
    assert_eq!(status.signal(), Some(Signal::SIGABRT as i32), "{status:?} {reports:?} {log}");
    assert!(log.contains("memory allocation"), "{log}");
    assert!(!bench.path("wide").exists());
}
