//! One module per kind of job: what happens between the claim and the result.
//!
//! [`prepare`] turns a claimed row into a worker's task with local folders, [`product`] a worker's
//! result into what is published. What the row names must be there by then; if it was deleted
//! meanwhile, the job fails with `dependency_failed`.

mod dataset;
pub mod ingest;
mod statistics;
mod tokenizer;
mod train;
pub mod worker;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use lathe_model::{
    failure,
    protocol::{Failure, FailureCode, PROTOCOL_VERSION, Task, TaskResult, WorkerSpec},
};

pub use dataset::note_bad_rows;

use crate::{
    artifacts::Artifacts,
    child::Bounds,
    context::Context,
    devices::Device,
    lease::{Claimed, Lease},
    machine,
    publish::Product,
    spec::{Spec, SpecError},
    waiting,
};

/// The most address space that a child gets that reads what users uploaded; less where the machine has
/// less memory than twice this.
const HOSTILE_MEMORY_BYTES: u64 = 32 << 30;
/// What such a child gets in any case: libtorch alone maps half a gigabyte.
const LEAST_MEMORY_BYTES: u64 = 4 << 30;
/// Time that such a child may take, and processor time of all its threads.
const HOSTILE_WALL: Duration = Duration::from_secs(24 * 3600);
const HOSTILE_CPU_SECONDS: u64 = 48 * 3600;

/// A worker's task, and how its runner treats it.
#[derive(Debug)]
pub struct Prepared {
    pub worker: WorkerSpec,
    pub bounds: Bounds,
    pub wall: Option<Duration>,
    pub keep_checkpoints: i64,
    /// Step of the checkpoint that it goes on from.
    pub resumed_step: Option<i64>,
    /// Steps of newer checkpoints that are damaged.
    pub unreadable: Vec<i64>,
}

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error("{}", .0.message)]
    Failure(Failure),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl From<Failure> for PrepareError {
    fn from(failure: Failure) -> PrepareError {
        PrepareError::Failure(failure)
    }
}

/// Finds what a job needs and makes its staging folder, from which earlier attempts are swept.
pub async fn prepare(context: &Context, claimed: &Claimed, device: &Device, staging: &Path) -> Result<Prepared, PrepareError> {
    let spec = Spec::read(claimed.spec.clone()).map_err(|error| {
        let message = format!("This version of the runner does not read the job's specification: {error}");
        match error {
            // Another runner may be the newer one.
            SpecError::Newer { .. } => failure::retryable(FailureCode::Internal, message),
            SpecError::Json(_) => failure::new(FailureCode::Internal, message),
        }
    })?;
    make_staging(staging.to_owned()).await?;
    let mut prepared = match spec {
        Spec::Ingest { source } => hostile(dataset::task(context, source, staging).await?),
        Spec::Tokenizer { vocabulary } => hostile(tokenizer::training(context, claimed, vocabulary, staging).await?),
        Spec::TokenizerImport { file } => hostile(tokenizer::import(context, &file, staging).await?),
        Spec::Statistics {} => hostile(statistics::task(context, claimed).await?),
        Spec::Train(spec) => train::prepare(context, claimed, spec, device, staging).await?,
    };
    prepared.worker.job = claimed.lease.job_id.clone();
    prepared.worker.attempt = claimed.lease.attempt;
    prepared.worker.threads = device.threads;
    Ok(prepared)
}

fn prepared(task: Task) -> Prepared {
    Prepared {
        worker: WorkerSpec { protocol: PROTOCOL_VERSION, job: String::new(), attempt: 0, threads: 1, task },
        bounds: Bounds::default(),
        wall: None,
        keep_checkpoints: i64::MAX,
        resumed_step: None,
        unreadable: Vec::new(),
    }
}

/// A task that reads what users uploaded, in bounds.
fn hostile(task: Task) -> Prepared {
    let memory_bytes = (machine::memory_bytes() / 2).clamp(LEAST_MEMORY_BYTES, HOSTILE_MEMORY_BYTES);
    let bounds = Bounds { memory_bytes: Some(memory_bytes), cpu_seconds: Some(HOSTILE_CPU_SECONDS) };
    Prepared { bounds, wall: Some(HOSTILE_WALL), ..prepared(task) }
}

/// An empty folder for this attempt. Those of earlier attempts go, as far as they can: the worker of one
/// that was lost may still write into its own, and housekeeping has the rest.
async fn make_staging(staging: PathBuf) -> Result<(), Failure> {
    let made = waiting::blocking(move || {
        if let Some(job) = staging.parent() {
            let _ = fs::remove_dir_all(job);
        }
        fs::create_dir_all(&staging)
    })
    .await;
    match made {
        Ok(made) => made.map_err(lathe_model::failure::io),
        Err(error) => Err(failure::retryable(FailureCode::Internal, error.to_string())),
    }
}

/// What a worker made, as it is published. Only folders below the attempt's staging are taken.
pub fn product(lease: &Lease, result: TaskResult, artifacts: &Artifacts) -> Result<Product, Failure> {
    let staging = artifacts.staging(&lease.job_id, lease.attempt);
    let inside = |folder: PathBuf| match folder.starts_with(&staging) && folder.is_dir() {
        true => Ok(folder),
        false => Err(failure::retryable(FailureCode::Internal, "The worker's result is not where it must be.")),
    };
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    Ok(match result {
        TaskResult::Model { folder, parameters, weights_sha256, trained_tokens, template } => Product::Model {
            folder: inside(folder)?,
            parameters: signed(parameters),
            weights_sha256,
            trained_tokens: signed(trained_tokens),
            template,
        },
        TaskResult::Tokenizer { folder, sha256, vocabulary, added_roles } => {
            Product::Tokenizer { folder: inside(folder)?, sha256, vocabulary, added_roles }
        }
        TaskResult::Dataset { folder, sha256, statistics } => Product::Dataset { folder: inside(folder)?, sha256, statistics },
        TaskResult::Statistics { statistics } => Product::Statistics { statistics },
        TaskResult::Rank => return Err(failure::retryable(FailureCode::Internal, "The job's first rank has made nothing.")),
    })
}

/// A ready dataset or tokenizer: its folder, and the hash of its content.
struct Resource {
    folder: PathBuf,
    sha256: String,
}

async fn dataset_folder(context: &Context, id: Option<&str>) -> Result<Resource, PrepareError> {
    let id = id.ok_or_else(|| gone("dataset", "none"))?;
    let row = sqlx::query!(
        r#"SELECT artifact AS "artifact!", sha256 AS "sha256!" FROM datasets
           WHERE id = $1 AND state = 'ready' AND deleted_at IS NULL AND artifact IS NOT NULL AND sha256 IS NOT NULL"#,
        id
    )
    .fetch_optional(&context.db)
    .await?
    .ok_or_else(|| gone("dataset", id))?;
    Ok(Resource { folder: fetched(context, &row.artifact).await?, sha256: row.sha256 })
}

/// `base` is the folder of a model that keeps its own copy, which stands in for a tokenizer that was
/// deleted since.
async fn tokenizer_folder(context: &Context, id: Option<&str>, base: Option<&Path>) -> Result<Resource, PrepareError> {
    let id = id.ok_or_else(|| gone("tokenizer", "none"))?;
    let row = sqlx::query!(
        r#"SELECT artifact, sha256 AS "sha256!" FROM tokenizers WHERE id = $1 AND state = 'ready' AND sha256 IS NOT NULL"#,
        id
    )
    .fetch_optional(&context.db)
    .await?
    .ok_or_else(|| gone("tokenizer", id))?;
    let folder = match (row.artifact, base) {
        (Some(artifact), _) => fetched(context, &artifact).await?,
        (None, Some(base)) => base.to_owned(),
        (None, None) => return Err(gone("tokenizer", id).into()),
    };
    Ok(Resource { folder, sha256: row.sha256 })
}

/// The path of a registered artifact.
async fn fetched(context: &Context, key: &str) -> Result<PathBuf, Failure> {
    match context.artifacts.fetch(key).await {
        Ok(Some(path)) => Ok(path),
        Ok(None) => {
            let message = format!("The artifact {key} is missing from {}.", context.artifacts.described());
            Err(failure::new(FailureCode::DependencyFailed, message))
        }
        Err(error) if error.is_disk_full() => Err(failure::retryable(FailureCode::DiskFull, error.to_string())),
        Err(error) => Err(failure::retryable(FailureCode::Internal, error.to_string())),
    }
}

fn gone(what: &str, id: &str) -> Failure {
    failure::new(
        FailureCode::DependencyFailed,
        format!("The {what} {id} that this job needs is not there any more. Create the job again with another one."),
    )
}
