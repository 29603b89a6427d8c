//! The worker protocol: what passes between a runner and the child that does the work.
//!
//! A worker never sees the database. Its standard input carries one line of JSON, the
//! [`WorkerSpec`], then one [`Command`] a line; end of file means that the runner is gone and the
//! worker stops at once. File descriptor [`REPORT_FD`] carries one [`Report`] a line back. Standard error is
//! the log. The process ends with one of [`Exit`].

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::JobSpec;

/// Version of everything in this module. A worker refuses another one.
pub const PROTOCOL_VERSION: u32 = 1;

/// The descriptor on which a worker reports, opened by the runner.
pub const REPORT_FD: i32 = 3;

/// How a worker ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Exit {
    /// `Report::Done` was sent.
    Done = 0,
    /// `Report::Failed` was sent.
    Failed = 10,
    /// Stopped by `Pause` or `Cancel` (or a shutdown's `Pause`); the last checkpoint was reported.
    Stopped = 11,
    /// The runner is gone; nothing more was written.
    Orphaned = 12,
    /// The spec could not be read or is of another version.
    BadSpec = 13,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerSpec {
    pub protocol: u32,
    pub job: String,
    pub attempt: i32,
    /// Threads that tensor work may use. Part of the numerics.
    pub threads: usize,
    pub task: Task,
}

/// One kind of job each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Task {
    Train(Box<TrainTask>),
    Tokenizer(TokenizerTask),
    /// The spec of `jobs::run::ingest`, which is not tensor work and has its own shape.
    Ingest(serde_json::Value),
    /// Token counts and length percentiles of a dataset under a tokenizer.
    Statistics(StatisticsTask),
}

/// Folders are local: the runner has fetched inputs and publishes outputs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrainTask {
    pub spec: JobSpec,
    /// A dataset's folder (see [`crate::data::rows`]).
    pub dataset: PathBuf,
    pub validation_dataset: Option<PathBuf>,
    /// `tokenizer.json` and `tokenizer_config.json`'s folder.
    pub tokenizer: PathBuf,
    /// The base model's folder, for tuning.
    pub base_model: Option<PathBuf>,
    /// The verified checkpoint to resume from.
    pub resume: Option<PathBuf>,
    /// Token shards are built or found here, each in a folder named by its content's hash.
    pub shard_cache: PathBuf,
    /// Stable identity of the dataset and tokenizer for the shards' name.
    pub dataset_sha256: String,
    pub tokenizer_sha256: String,
    /// Checkpoints are staged here as `<step>/`; the final model as `model/`.
    pub staging: PathBuf,
    pub device: DeviceChoice,
    /// Bytes that must stay free on the staging file system.
    pub disk_low_bytes: u64,
    /// `None`: one rank.
    #[serde(default)]
    pub gang: Option<Membership>,
}

/// A rank's place among the workers of its job, and the way to the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Membership {
    pub rank: usize,
    /// Where they meet.
    pub store: SocketAddr,
    /// The address of this host that the others reach.
    pub address: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DeviceChoice {
    Cpu,
    Cuda { index: usize },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenizerTask {
    /// Train on this dataset's rows, or …
    pub dataset: Option<PathBuf>,
    /// … import this `tokenizer.json`.
    pub file: Option<PathBuf>,
    pub vocabulary: i64,
    /// Where `tokenizer.json` and `tokenizer_config.json` are written.
    pub output: PathBuf,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatisticsTask {
    pub dataset: PathBuf,
    pub tokenizer: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Save the last finished step and stop (also how a shutdown interrupts).
    Pause,
    /// Stop without saving.
    Cancel,
    /// Save at the next step's end and go on.
    Checkpoint,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// The worker runs; `numerics` pins what bits depend on.
    Started {
        numerics: Numerics,
        numerics_changed: bool,
    },
    Phase {
        phase: Phase,
    },
    /// The spec with nothing left open, once, at the end of `preparing`.
    Resolved {
        spec: Box<JobSpec>,
        trained_tokens_per_epoch: u64,
    },
    Metric {
        row: MetricRow,
    },
    Event {
        level: Level,
        code: String,
        message: String,
        data: serde_json::Value,
    },
    /// A whole checkpoint stands in `folder` (below `staging`).
    Checkpoint {
        step: u64,
        folder: PathBuf,
        loss: Option<f64>,
        validation_loss: Option<f64>,
        best: bool,
        /// Wall time that saving took.
        #[serde(default)]
        seconds: f64,
    },
    /// Heartbeat of the training loop itself: the last finished step, and the wall time of one in this
    /// process, evaluations and checkpoints included.
    Progress {
        step: u64,
        #[serde(default)]
        seconds_per_step: Option<f64>,
    },
    /// Told once a second while there is nothing else to say: work went on, or at least the processor was
    /// used. A worker that says nothing at all hangs.
    Alive {
        progress: bool,
    },
    /// The task is done; `result` is what its kind produces.
    Done {
        result: TaskResult,
    },
    Failed {
        failure: Failure,
    },
}

listed_enum! {
    Phase {
        Preparing,
        Training,
        Evaluating,
        Publishing,
    }
}

listed_enum! {
    Level {
        Info,
        Warn,
        Error,
    }
}

/// One row of `/metrics`; absent where not measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricRow {
    pub step: u64,
    pub loss: f64,
    pub learning_rate: f64,
    pub grad_norm: f64,
    /// Supervised tokens of this step.
    pub tokens: u64,
    /// All tokens of the step's batch by the time that the step took; evaluations and checkpoints are
    /// not in it.
    pub tokens_per_second: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
}

/// What bits depend on (design decision: equal numerics promise equal bits).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numerics {
    pub device: String,
    pub threads: usize,
    pub instruction_set: String,
    pub precision: Option<crate::config::Precision>,
    pub libtorch: String,
}

/// Why a task failed, in a sentence with what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: FailureCode,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub param: Option<String>,
    /// Whether another attempt could end differently.
    pub retryable: bool,
}

listed_enum! {
    /// The closed list of reasons for which a job, dataset, tokenizer or model becomes `failed`.
    FailureCode {
        BadRows,
        NoValidRows,
        InvalidEncoding,
        UnsupportedFormat,
        TruncatedFile,
        DecompressionLimit,
        LineTooLong,
        BadTemplate,
        NotEnoughDistinctRows,
        InvalidTokenizer,
        VocabularyTooLarge,
        ContextTooShort,
        NoSupervisedTokens,
        DatasetTooSmall,
        NonFiniteLoss,
        Diverged,
        OutOfMemory,
        DiskFull,
        DependencyFailed,
        /// The job that was to make this was cancelled.
        Cancelled,
        CheckpointUnreadable,
        DeviceUnavailable,
        WorkerCrashed,
        /// It showed no sign of progress and was killed.
        WorkerStalled,
        AttemptsExhausted,
        Internal,
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TaskResult {
    /// A model's folder stands in `staging/model`.
    Model {
        folder: PathBuf,
        parameters: u64,
        weights_sha256: String,
        trained_tokens: u64,
        template: Option<String>,
    },
    /// Of a rank that is not the first, which has made the model.
    Rank,
    Tokenizer {
        folder: PathBuf,
        sha256: String,
        vocabulary: i64,
        added_roles: Vec<String>,
    },
    Dataset {
        folder: PathBuf,
        sha256: String,
        statistics: serde_json::Value,
    },
    Statistics {
        statistics: serde_json::Value,
    },
}
