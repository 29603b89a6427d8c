//! A training job: its data, its tokenizer, its base model, and the checkpoint that it goes on from.

use std::path::{Path, PathBuf};

use lathe_model::{
    config::JobSpec,
    failure,
    protocol::{FailureCode, Task, TrainTask},
};

use super::{PrepareError, Prepared, dataset_folder, fetched, gone, prepared, tokenizer_folder};
use crate::{artifacts::SHARDS, checkpoints, context::Context, devices::Device, lease::Claimed, waiting};

pub async fn prepare(
    context: &Context,
    claimed: &Claimed,
    spec: JobSpec,
    device: &Device,
    staging: &Path,
) -> Result<Prepared, PrepareError> {
    let dataset = dataset_folder(context, claimed.dataset_id.as_deref()).await?;
    let validation_dataset = match claimed.validation_dataset_id.as_deref() {
        Some(id) => Some(dataset_folder(context, Some(id)).await?.folder),
        None => None,
    };
    let base_model = match claimed.base_model_id.as_deref() {
        Some(id) => Some(model_folder(context, id).await?),
        None => None,
    };
    let tokenizer = tokenizer_folder(context, claimed.tokenizer_id.as_deref(), base_model.as_deref()).await?;
    let resume = resume(context, claimed).await?;
    let keep_checkpoints = i64::try_from(spec.train.keep_checkpoints).unwrap_or(i64::MAX);
    let task = TrainTask {
        spec,
        dataset: dataset.folder,
        validation_dataset,
        tokenizer: tokenizer.folder,
        base_model,
        resume: resume.from.as_ref().map(|(_, folder)| folder.clone()),
        shard_cache: context.artifacts.path(SHARDS),
        dataset_sha256: dataset.sha256,
        tokenizer_sha256: tokenizer.sha256,
        staging: staging.to_owned(),
        device: device.choice,
        disk_low_bytes: context.config.disk_low_bytes,
        gang: None,
    };
    Ok(Prepared {
        keep_checkpoints,
        resumed_step: resume.from.map(|(step, _)| step),
        unreadable: resume.unreadable,
        ..prepared(Task::Train(Box::new(task)))
    })
}

async fn model_folder(context: &Context, id: &str) -> Result<PathBuf, PrepareError> {
    let artifact = sqlx::query_scalar!(
        r#"SELECT artifact AS "artifact!" FROM models WHERE id = $1 AND state = 'ready' AND deleted_at IS NULL AND artifact IS NOT NULL"#,
        id
    )
    .fetch_optional(&context.db)
    .await?;
    match artifact {
        Some(artifact) => Ok(fetched(context, &artifact).await?),
        None => Ok(checkpoint_folder(context, id).await?.ok_or_else(|| gone("model", id))?),
    }
}

/// A checkpoint may stand for a model; its folder holds what one needs.
async fn checkpoint_folder(context: &Context, name: &str) -> Result<Option<PathBuf>, PrepareError> {
    let mut conn = context.db.acquire().await?;
    let found = checkpoints::find_named(&mut conn, name).await?;
    match found {
        Some(checkpoint) => Ok(Some(fetched(context, &checkpoint.artifact).await?)),
        None => Ok(None),
    }
}

#[derive(Debug, Default)]
struct Resume {
    from: Option<(i64, PathBuf)>,
    unreadable: Vec<i64>,
}

/// The newest checkpoint that is whole.
async fn resume(context: &Context, claimed: &Claimed) -> Result<Resume, PrepareError> {
    let mut conn = context.db.acquire().await?;
    let registered = checkpoints::newest(&mut conn, &claimed.lease.job_id).await?;
    drop(conn);
    let mut resume = Resume::default();
    for checkpoint in registered {
        let folder = match context.artifacts.fetch(&checkpoint.artifact).await {
            Ok(folder) => folder.unwrap_or_else(|| context.artifacts.path(&checkpoint.artifact)),
            // Going on from an older one would throw work away for a network that comes back.
            Err(error) if error.is_away() => {
                return Err(failure::retryable(FailureCode::Internal, error.to_string()).into());
            }
            Err(error) => {
                tracing::error!(checkpoint.id = checkpoint.id, %error, "a checkpoint cannot be fetched");
                resume.unreadable.push(checkpoint.step);
                continue;
            }
        };
        let looked_at = folder.clone();
        match waiting::blocking(move || verify(&looked_at)).await {
            Ok(Ok(())) => {
                resume.from = Some((checkpoint.step, folder));
                break;
            }
            Ok(Err(reason)) => tracing::error!(checkpoint.id = checkpoint.id, reason, "a checkpoint is damaged"),
            Err(error) => tracing::error!(checkpoint.id = checkpoint.id, %error, "a checkpoint cannot be verified"),
        }
        resume.unreadable.push(checkpoint.step);
    }
    Ok(resume)
}

/// Whether a checkpoint's folder is whole: every tensor of its manifest is there with its hash.
fn verify(folder: &Path) -> Result<(), String> {
    lathe_model::checkpoint::verify(folder).map(drop).map_err(|failure| failure.message)
}
