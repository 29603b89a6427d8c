//! Sweeps what nothing refers to any more, and nothing else: expired files, uploads and idempotent
//! requests, staging folders of attempts that have ended, checkpoint folders without a row, and
//! temporary files. Also where the disk stands.
//!
//! Several runners may sweep at once; everything here may be repeated. A folder is touched only when
//! it has been left alone for [`LEFT_ALONE`], so nothing that is being published is mistaken for a leftover.

use std::{
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

use sqlx::PgPool;

use crate::{
    artifacts::{ArtifactError, Artifacts},
    publish::blocking,
};

const EVERY: Duration = Duration::from_secs(600);
const LEFT_ALONE: Duration = Duration::from_secs(3600);
/// An upload's bytes may come slowly; its file is touched with each of them.
const TEMPORARY: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskState {
    pub free_bytes: u64,
    pub total_bytes: u64,
    /// Less is free than must stay free: no job is claimed.
    pub low: bool,
}

/// How full the file system of the artifacts is.
pub fn disk_state(artifacts: &Artifacts, low_bytes: u64) -> io::Result<DiskState> {
    let (free_bytes, total_bytes) = artifacts.disk()?;
    Ok(DiskState { free_bytes, total_bytes, low: free_bytes < low_bytes })
}

/// Sweeps now and then, until it is dropped.
pub async fn run(db: PgPool, artifacts: Artifacts) {
    loop {
        if let Err(error) = sweep(&db, &artifacts).await {
            tracing::warn!(%error, "housekeeping could not finish its round");
        }
        tokio::time::sleep(EVERY).await;
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// One round.
pub async fn sweep(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    sqlx::query!("DELETE FROM idempotent_requests WHERE expires_at < now()").execute(db).await?;
    expired_files(db, artifacts).await?;
    expired_uploads(db, artifacts).await?;
    orphan_staging(db, artifacts).await?;
    orphan_checkpoints(db, artifacts).await?;
    let temporary = artifacts.clone();
    blocking(move || remove_old(&temporary, "tmp", TEMPORARY)).await?;
    Ok(())
}

/// Files past their time, unless something unfinished reads them. The row stays as a tombstone.
async fn expired_files(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let expired = sqlx::query_scalar!(
        "UPDATE files SET deleted_at = now()
         WHERE deleted_at IS NULL AND expires_at < now() AND NOT EXISTS (
             SELECT FROM jobs j WHERE j.finished_at IS NULL AND (
                 j.spec ->> 'file' = files.id OR j.spec #> '{source,files}' @> to_jsonb(files.id)))
         RETURNING artifact"
    )
    .fetch_all(db)
    .await?;
    remove(artifacts, expired).await
}

async fn expired_uploads(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    sqlx::query!("UPDATE uploads SET state = 'expired' WHERE state = 'pending' AND expires_at < now()").execute(db).await?;
    // A completed upload's bytes are its file's; an expired or cancelled one's parts are nobody's.
    let parts = sqlx::query_scalar!(
        "DELETE FROM upload_parts p USING uploads u WHERE u.id = p.upload_id AND u.state <> 'pending' RETURNING p.artifact"
    )
    .fetch_all(db)
    .await?;
    remove(artifacts, parts).await
}

async fn remove(artifacts: &Artifacts, keys: Vec<String>) -> Result<(), SweepError> {
    let artifacts = artifacts.clone();
    Ok(blocking(move || keys.iter().try_for_each(|key| artifacts.remove(key))).await?)
}

/// Scratch folders of jobs that no attempt works on.
async fn orphan_staging(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    for job in old_entries(artifacts, "staging").await? {
        let busy =
            sqlx::query_scalar!(r#"SELECT count(*) AS "busy!" FROM job_attempts WHERE job_id = $1 AND ended_at IS NULL"#, job)
                .fetch_one(db)
                .await?;
        if busy == 0 {
            remove(artifacts, vec![format!("staging/{job}")]).await?;
        }
    }
    Ok(())
}

/// Checkpoint folders that a crash left between the rename and the row, or between the row's end
/// and the folder's.
async fn orphan_checkpoints(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    for job in entries(artifacts, "checkpoints").await? {
        let known = sqlx::query_scalar!("SELECT artifact FROM checkpoints WHERE job_id = $1", job).fetch_all(db).await?;
        for attempt in entries(artifacts, &format!("checkpoints/{job}")).await? {
            for step in old_entries(artifacts, &format!("checkpoints/{job}/{attempt}")).await? {
                let key = format!("checkpoints/{job}/{attempt}/{step}");
                if !known.contains(&key) {
                    tracing::info!(key, "removing a checkpoint that no row names");
                    remove(artifacts, vec![key]).await?;
                }
            }
        }
    }
    Ok(())
}

/// Names below `key` that have been left alone for [`LEFT_ALONE`].
async fn old_entries(artifacts: &Artifacts, key: &str) -> Result<Vec<String>, ArtifactError> {
    list(artifacts, key, LEFT_ALONE).await
}

async fn entries(artifacts: &Artifacts, key: &str) -> Result<Vec<String>, ArtifactError> {
    list(artifacts, key, Duration::ZERO).await
}

async fn list(artifacts: &Artifacts, key: &str, age: Duration) -> Result<Vec<String>, ArtifactError> {
    let (artifacts, key) = (artifacts.clone(), key.to_owned());
    blocking(move || {
        let names = names(&artifacts.path(&key), age);
        names.map_err(|source| ArtifactError::Io { key, source })
    })
    .await
}

fn names(folder: &Path, age: Duration) -> io::Result<Vec<String>> {
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let mut names = Vec::new();
    for entry in listed {
        let entry = entry?;
        let Ok(metadata) = entry.metadata() else { continue };
        let old =
            metadata.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok()).unwrap_or_default();
        if old >= age
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

fn remove_old(artifacts: &Artifacts, key: &str, age: Duration) -> Result<(), ArtifactError> {
    let old = names(&artifacts.path(key), age).map_err(|source| ArtifactError::Io { key: key.to_owned(), source })?;
    old.iter().try_for_each(|name| artifacts.remove(&format!("{key}/{name}")))
}
