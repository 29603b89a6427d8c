//! The stack, the small jobs that are disturbed on it, and what each makes undisturbed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use lathe_tests::{Kind, Pretence, TestApp, can_mount};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::training::text;

/// Of the stack's artifacts, where it may have a disk of its own.
const DISK: u64 = 512 << 20;
const LOW: u64 = 16 << 20;

/// A runner that has started has swept by then.
const SWEPT: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    Pretraining,
    Tuning,
    Ingestion,
    Tokenizer,
}

impl Work {
    pub const ALL: [Work; 4] = [Work::Pretraining, Work::Tuning, Work::Ingestion, Work::Tokenizer];

    pub fn is_training(self) -> bool {
        matches!(self, Work::Pretraining | Work::Tuning)
    }

    /// Where a client finds the kind of thing that is made.
    fn collection(self) -> &'static str {
        match self {
            Work::Pretraining | Work::Tuning => "/v1/training/jobs",
            Work::Ingestion => "/v1/datasets",
            Work::Tokenizer => "/v1/tokenizers",
        }
    }

    /// The outcome of a job by its id, as a hash.
    fn outcome(self) -> &'static str {
        match self {
            Work::Pretraining | Work::Tuning => "SELECT weights_sha256 FROM models WHERE job_id = $1 AND state = 'ready'",
            Work::Ingestion => "SELECT sha256 FROM datasets WHERE job_id = $1 AND state = 'ready'",
            Work::Tokenizer => "SELECT sha256 FROM tokenizers WHERE job_id = $1 AND state = 'ready'",
        }
    }
}

/// A job that was asked for.
pub struct Made {
    pub work: Work,
    pub job: String,
    resource: String,
    /// Of a training.
    model: Option<String>,
}

pub struct Bench {
    pub app: TestApp,
    pub pretence: Pretence,
    pub database_url: String,
    pub lease: f64,
    requests: BTreeMap<Work, Value>,
    /// What each makes undisturbed, and how long that takes.
    expected: BTreeMap<Work, (String, Duration)>,
    /// A request to a model, and what it answers.
    completion: (Value, Value),
}

impl Bench {
    pub async fn start(lease: f64) -> Bench {
        let pretence = Pretence::new();
        let builder = TestApp::builder().embedded().runners(2).lease_seconds(lease).argument(&format!("--disk-low-bytes={LOW}"));
        let builder = if can_mount() { builder.small_disk(DISK) } else { builder };
        let app = builder.believing(&pretence).start().await;
        let database_url = app.database_url();
        let mut bench = Bench {
            app,
            pretence,
            database_url,
            lease,
            requests: BTreeMap::new(),
            expected: BTreeMap::new(),
            completion: Default::default(),
        };
        bench.requests = requests(&bench.app).await;
        for work in Work::ALL {
            let begun = Instant::now();
            let made = bench.make(work).await;
            let done = bench.app.wait_for(&made.resource, &["succeeded", "ready"]).await;
            bench.expected.insert(work, (bench.outcome(&made).await, begun.elapsed()));
            if work == Work::Pretraining {
                // Kept: tuned, and asked.
                let tuning = json!({"method": {"type": "instruction", "template": "ins"}, "base_model": done["model"],
                    "dataset": done["dataset"], "hyperparameters": {"steps": 300, "batch_size": 4, "precision": "fp32",
                    "seed": 5, "checkpoint_every": 20}});
                bench.requests.insert(Work::Tuning, tuning);
                let request = json!({"model": done["model"], "prompt": "1+1?", "max_tokens": 4, "temperature": 0});
                let answer = bench.app.post_json("/v1/completions", &request).await.ok();
                bench.completion = (request, answer["choices"].clone());
            } else {
                bench.remove(&made).await;
            }
        }
        bench
    }

    pub fn undisturbed(&self, work: Work) -> Duration {
        self.expected[&work].1
    }

    /// Asks for a job, once however often that must be repeated.
    pub async fn make(&self, work: Work) -> Made {
        let key = lathe_jobs::ids::new("chaos");
        let ask = || self.app.request(reqwest::Method::POST, work.collection()).header("idempotency-key", &key);
        let answer = self.insist(|| ask().json(&self.requests[&work])).await;
        let id = text(&answer["id"]).to_owned();
        let job = if work.is_training() { id.clone() } else { text(&answer["job"]).to_owned() };
        let model = work.is_training().then(|| text(&answer["model"]).to_owned());
        Made { work, job, resource: format!("{}/{id}", work.collection()), model }
    }

    /// Sends a request until it is answered well.
    pub async fn insist(&self, build: impl Fn() -> reqwest::RequestBuilder) -> Value {
        let begun = Instant::now();
        loop {
            let sent = build().timeout(Duration::from_secs(5)).send().await;
            let said = match sent {
                Ok(answer) if answer.status().is_success() => match answer.json().await {
                    Ok(body) => return body,
                    Err(error) => error.to_string(),
                },
                Ok(answer) => answer.text().await.unwrap_or_default(),
                Err(error) => error.to_string(),
            };
            assert!(begun.elapsed() < super::PATIENCE, "it is never done: {said}");
            tokio::time::sleep(super::LOOK).await;
        }
    }

    pub async fn connect(&self) -> PgConnection {
        let begun = Instant::now();
        loop {
            match PgConnection::connect(&self.database_url).await {
                Ok(conn) => return conn,
                Err(error) => assert!(begun.elapsed() < super::PATIENCE, "{error}"),
            }
            tokio::time::sleep(super::LOOK).await;
        }
    }

    async fn outcome(&self, made: &Made) -> String {
        let mut conn = self.connect().await;
        sqlx::query_scalar(made.work.outcome()).bind(&made.job).fetch_one(&mut conn).await.expect("it has an outcome")
    }

    /// Code and message of a job's end.
    pub async fn error(&self, made: &Made) -> (String, String) {
        let query = "SELECT coalesce(error->>'code', ''), coalesce(error->>'message', 'no error') FROM jobs WHERE id = $1";
        sqlx::query_as(query).bind(&made.job).fetch_one(&mut self.connect().await).await.expect("the job is there")
    }

    /// What is wrong with a job that has succeeded.
    pub async fn complaints(&self, made: &Made) -> Vec<String> {
        let mut conn = self.connect().await;
        let mut complaints = Vec::new();
        let numbers = "SELECT (SELECT count(*) FROM job_attempts WHERE job_id = $1 AND outcome = 'succeeded'),
                              (SELECT count(*) FROM job_events WHERE job_id = $1 AND code = 'job.succeeded'),
                              (SELECT count(*) FROM checkpoints c JOIN job_attempts a ON a.job_id = c.job_id AND a.n = c.attempt
                               WHERE c.job_id = $1 AND c.created_at > a.ended_at)";
        let (attempts, events, late): (i64, i64, i64) =
            sqlx::query_as(numbers).bind(&made.job).fetch_one(&mut conn).await.expect("the database is there");
        if (attempts, events) != (1, 1) {
            complaints.push(format!("completed twice: {attempts} attempts and {events} events say that it succeeded"));
        }
        if late > 0 {
            complaints.push(format!("completed twice: {late} checkpoints of an attempt that had ended"));
        }
        let (found, expected) = (self.outcome(made).await, &self.expected[&made.work].0);
        if found != *expected {
            complaints.push(format!("changed: {found} and not {expected}"));
        }
        complaints
    }

    /// The model answers as it did at first.
    pub async fn answers(&self) {
        let (request, expected) = &self.completion;
        let answer = self.insist(|| self.app.request(reqwest::Method::POST, "/v1/completions").json(request)).await;
        assert_eq!(answer["choices"], *expected);
    }

    /// Deletes a job and what it made.
    pub async fn remove(&self, made: &Made) {
        let model = made.model.as_ref().map(|model| format!("/v1/models/{model}"));
        for path in model.iter().chain([&made.resource]) {
            let begun = Instant::now();
            loop {
                // Repeated, it may be gone.
                let sent = self.app.request(reqwest::Method::DELETE, path).timeout(Duration::from_secs(5)).send().await;
                if sent.is_ok_and(|answer| answer.status().is_success() || answer.status() == 404) {
                    break;
                }
                // What is lost is in the table already.
                if begun.elapsed() > Duration::from_secs(20) {
                    break;
                }
                tokio::time::sleep(super::LOOK).await;
            }
        }
    }

    /// The folder of a job's newest checkpoint.
    pub fn newest_checkpoint(&self, made: &Made) -> Option<std::path::PathBuf> {
        let numbered = |folder: &Path| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            let named = entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u64>().ok()?, entry.path())));
            named.max().map(|(_, path)| path)
        };
        numbered(&numbered(&self.app.artifacts().join("checkpoints").join(&made.job))?)
    }

    /// Processes and files that nothing needs any more, and what is missing.
    pub async fn left_behind(&self) -> Vec<String> {
        // Housekeeping takes what has been left alone for long, first of all when a runner starts.
        age(&self.app.artifacts());
        self.app.kill(Kind::Runner);
        let begun = Instant::now();
        loop {
            let workers = self.app.processes(Kind::Worker).into_iter().map(|worker| format!("worker {worker}"));
            let left: Vec<String> = workers.chain(self.misplaced().await).collect();
            if left.is_empty() || begun.elapsed() > SWEPT {
                return left;
            }
            tokio::time::sleep(super::LOOK).await;
        }
    }

    /// Keys that no row names, and such as are not there.
    async fn misplaced(&self) -> Vec<String> {
        let query = "SELECT artifact FROM files WHERE deleted_at IS NULL UNION ALL
                     SELECT artifact FROM datasets WHERE state = 'ready' AND deleted_at IS NULL UNION ALL
                     SELECT artifact FROM tokenizers WHERE state = 'ready' AND deleted_at IS NULL UNION ALL
                     SELECT artifact FROM models WHERE state = 'ready' AND deleted_at IS NULL UNION ALL
                     SELECT artifact FROM checkpoints";
        let named: Vec<String> = sqlx::query_scalar(query).fetch_all(&mut self.connect().await).await.expect("a list");
        let (named, there) = (named.into_iter().collect(), stored(&self.app.artifacts()));
        let orphans = there.difference(&named).map(|key| format!("orphan {key}"));
        orphans.chain(named.difference(&there).map(|key| format!("missing {key}"))).collect()
    }
}

/// The keys of what is stored under a root, and whatever lies in its scratch folders.
fn stored(root: &Path) -> BTreeSet<String> {
    let names = |folder: &str| -> Vec<String> {
        let entries = fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).map(|name| format!("{folder}/{name}")).collect()
    };
    let mut found: BTreeSet<String> = ["files", "parts", "staging", "tmp"].into_iter().flat_map(names).collect();
    for folder in ["datasets", "tokenizers", "models"] {
        found.extend(names(folder).iter().flat_map(|key| names(key)));
    }
    found.extend(names("checkpoints").iter().flat_map(|job| names(job)).collect::<Vec<_>>().iter().flat_map(|key| names(key)));
    found
}

/// Everything looks as if it had been left alone for long, which housekeeping waits for.
fn age(path: &Path) {
    if path.is_dir() {
        fs::read_dir(path).into_iter().flatten().flatten().for_each(|entry| age(&entry.path()));
    }
    let long_ago = SystemTime::now() - Duration::from_secs(86_400);
    // What is removed meanwhile needs no age.
    let _ = fs::File::open(path).and_then(|file| file.set_modified(long_ago));
}

/// The jobs that are asked for, but for tuning, whose base is made first; and what they are made of.
async fn requests(app: &TestApp) -> BTreeMap<Work, Value> {
    let (dataset, tokenizer) = crate::training::ingredients(app).await;
    let mut lines = String::new();
    for n in 0..60_000_u64 {
        let word = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        lines += &format!("{{\"instruction\": \"Write {n} and {word:x}.\", \"output\": \"{n} {word:x}\"}}\n");
    }
    let file = app.upload("rows.jsonl", "user_data", lines).await["id"].clone();
    let ingestion = json!({"name": "chaos", "source": {"type": "files", "files": [file]}});
    let large = app.post_json("/v1/datasets", &ingestion).await.ok()["id"].clone();
    let pretraining = json!({"method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 2, "heads": 2, "width": 32, "context": 32, "dropout": 0.1},
        "dataset": dataset, "tokenizer": tokenizer, "validation": {"fraction": 0.1},
        "hyperparameters": {"steps": 400, "batch_size": 4, "precision": "fp32", "seed": 11,
            "checkpoint_every": 20, "evaluate_every": 100}});
    let vocabulary = json!({"name": "chaos", "type": "bpe", "dataset": large, "vocab_size": 2500});
    app.wait_for(&format!("/v1/datasets/{}", text(&large)), &["ready"]).await;
    app.wait_for(&format!("/v1/tokenizers/{}", text(&tokenizer)), &["ready"]).await;
    BTreeMap::from([(Work::Pretraining, pretraining), (Work::Ingestion, ingestion), (Work::Tokenizer, vocabulary)])
}
