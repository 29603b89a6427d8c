//! Sweeps what nothing refers to any more, and nothing else: expired files, uploads and idempotent
//! requests, old entries of the audit log, artifacts and checkpoint folders without a row, checkpoints that an ended job need not keep,
//! staging folders of attempts that have ended, logs of deleted jobs, temporary files, and token shards
//! that were not used for long or are too many. Also where the disk stands.
//!
//! Several runners may sweep at once; everything here may be repeated. What lies in the store is touched
//! only when it has been left alone for [`LEFT_ALONE`] (publishing counts as a touch), and its rows are
//! asked after it was listed, so nothing that is being published is mistaken for a leftover.

use std::{
    fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use sqlx::PgPool;

use crate::{
    artifacts::{ArtifactError, Artifacts, SHARDS},
    audit::{self, Actor, Deed, Entry},
    checkpoints,
    context::Context,
    publish::blocking,
    waiting::{self, unless_stuck},
};

const EVERY: Duration = Duration::from_secs(600);
const LEFT_ALONE: Duration = Duration::from_secs(3600);
/// Logs of engines that are gone.
const ENGINE_LOGS: Duration = Duration::from_secs(7 * 24 * 3600);
/// Clocks of machines that share a store may differ by this much.
const CLOCKS: Duration = Duration::from_secs(600);

/// How much of the shard cache is kept. Whatever is lost is made again when it is needed.
#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    pub unused_for: Duration,
    /// Of all shards together, those in use aside; the ones used longest ago go first.
    pub bytes: u64,
}

impl Default for CacheLimits {
    fn default() -> Self {
        CacheLimits { unused_for: Duration::from_secs(14 * 24 * 3600), bytes: 64 << 30 }
    }
}

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

/// Sweeps now and then, until it is dropped. On a disk that is nearly full no shard is kept that is not in use.
pub async fn run(context: Arc<Context>) {
    let (db, artifacts, disk_low_bytes) = (&context.db, &context.artifacts, context.config.disk_low_bytes);
    loop {
        let store = artifacts.clone();
        let disk = waiting::blocking(move || disk_state(&store, disk_low_bytes)).await;
        let cache = match disk {
            Ok(Ok(disk)) if disk.low => CacheLimits { bytes: 0, ..CacheLimits::default() },
            _ => CacheLimits::default(),
        };
        // Its questions are asked of whole tables, so they may take long.
        match unless_stuck(EVERY, round(db, artifacts, cache, context.config.audit_days)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "housekeeping could not finish its round"),
            Err(stuck) => tracing::warn!(error = %stuck, "housekeeping gave its round up"),
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

async fn round(db: &PgPool, artifacts: &Artifacts, cache: CacheLimits, audit_days: u16) -> Result<(), SweepError> {
    sweep(db, artifacts, cache).await?;
    Ok(audit::prune(db, audit_days).await?)
}

/// One round, but for the audit log.
pub async fn sweep(db: &PgPool, artifacts: &Artifacts, cache: CacheLimits) -> Result<(), SweepError> {
    sqlx::query!("DELETE FROM idempotent_requests WHERE expires_at < now()").execute(db).await?;
    expired_files(db, artifacts).await?;
    expired_uploads(db, artifacts).await?;
    orphan_staging(db, artifacts).await?;
    orphan_artifacts(db, artifacts).await?;
    orphan_checkpoints(db, artifacts).await?;
    surplus_checkpoints(db, artifacts).await?;
    orphan_logs(db, artifacts).await?;
    unused_shards(db, artifacts, cache).await?;
    let temporary = artifacts.clone();
    blocking(move || remove_old(&temporary, "tmp", TEMPORARY)).await?;
    Ok(())
}

/// Files past their time, unless something unfinished reads them. The row stays as a tombstone.
async fn expired_files(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let mut tx = db.begin().await?;
    // Whoever is about to refer to a file holds its row; those are left for the next round.
    let candidates = sqlx::query_scalar!(
        "SELECT id FROM files WHERE deleted_at IS NULL AND expires_at < now() ORDER BY id FOR UPDATE SKIP LOCKED"
    )
    .fetch_all(&mut *tx)
    .await?;
    // Asked by a statement of its own, which sees whoever referred to one before it was locked.
    let expired = sqlx::query!(
        "UPDATE files SET deleted_at = now()
         WHERE id = ANY($1)
           AND NOT EXISTS (SELECT FROM dataset_files f JOIN datasets d ON d.id = f.dataset_id
                           WHERE f.file_id = files.id AND d.deleted_at IS NULL AND d.state IN ('queued', 'running'))
           AND NOT EXISTS (SELECT FROM tokenizers t
                           WHERE t.file_id = files.id AND t.deleted_at IS NULL AND t.state IN ('queued', 'running'))
         RETURNING id, project_id, artifact",
        &candidates,
    )
    .fetch_all(&mut *tx)
    .await?;
    for file in &expired {
        let entry = Entry { project_id: &file.project_id, actor: Actor::System, deed: Deed::FileDeleted, resource_id: &file.id };
        audit::record(&mut tx, entry).await?;
    }
    tx.commit().await?;
    remove(artifacts, expired.into_iter().map(|file| file.artifact).collect()).await
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

/// What a crash left between the rename and the row, or between the row's end and the artifact's.
async fn orphan_artifacts(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let mut keys = Vec::new();
    for folder in ["files", "parts"] {
        keys.extend(old_entries(artifacts, folder).await?.into_iter().map(|name| format!("{folder}/{name}")));
    }
    for folder in ["datasets", "tokenizers", "models"] {
        for id in entries(artifacts, folder).await? {
            let attempts = old_entries(artifacts, &format!("{folder}/{id}")).await?;
            keys.extend(attempts.into_iter().map(|attempt| format!("{folder}/{id}/{attempt}")));
        }
    }
    let orphans = sqlx::query_scalar!(
        r#"SELECT key AS "key!" FROM unnest($1::text[]) AS key
           WHERE NOT EXISTS (SELECT FROM files r WHERE r.artifact = key AND r.deleted_at IS NULL)
             AND NOT EXISTS (SELECT FROM upload_parts r WHERE r.artifact = key)
             AND NOT EXISTS (SELECT FROM datasets r WHERE r.artifact = key)
             AND NOT EXISTS (SELECT FROM tokenizers r WHERE r.artifact = key)
             AND NOT EXISTS (SELECT FROM models r WHERE r.artifact = key)"#,
        &keys,
    )
    .fetch_all(db)
    .await?;
    orphans.iter().for_each(|key| tracing::info!(key, "removing an artifact that no row names"));
    remove(artifacts, orphans).await
}

/// The same for checkpoints; those of a running attempt are left until it has ended.
async fn orphan_checkpoints(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let mut keys = Vec::new();
    for job in entries(artifacts, "checkpoints").await? {
        for attempt in entries(artifacts, &format!("checkpoints/{job}")).await? {
            for step in old_entries(artifacts, &format!("checkpoints/{job}/{attempt}")).await? {
                keys.push(format!("checkpoints/{job}/{attempt}/{step}"));
            }
        }
    }
    let orphans = sqlx::query_scalar!(
        r#"SELECT key AS "key!" FROM unnest($1::text[]) AS key
           WHERE NOT EXISTS (SELECT FROM checkpoints c WHERE c.artifact = key)
             AND NOT EXISTS (SELECT FROM job_attempts a
                             WHERE a.job_id = split_part(key, '/', 2) AND a.n::text = split_part(key, '/', 3) AND a.ended_at IS NULL)"#,
        &keys,
    )
    .fetch_all(db)
    .await?;
    orphans.iter().for_each(|key| tracing::info!(key, "removing a checkpoint that no row names"));
    remove(artifacts, orphans).await
}

/// What an ended job kept because it was in use then.
async fn surplus_checkpoints(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let jobs = sqlx::query!(
        r#"SELECT j.id, (j.spec #>> '{train,keep_checkpoints}')::bigint AS "keep!"
           FROM jobs j JOIN checkpoints c ON c.job_id = j.id
           WHERE j.finished_at IS NOT NULL AND j.spec #>> '{train,keep_checkpoints}' IS NOT NULL
           GROUP BY j.id HAVING count(*) FILTER (WHERE NOT c.best) > (j.spec #>> '{train,keep_checkpoints}')::bigint"#
    )
    .fetch_all(db)
    .await?;
    for job in jobs {
        let mut tx = db.begin().await?;
        let removed = checkpoints::remove_surplus(&mut tx, &job.id, job.keep).await?;
        tx.commit().await?;
        remove(artifacts, removed).await?;
    }
    Ok(())
}

/// Logs of jobs that were deleted, and of engines that went long ago.
async fn orphan_logs(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let jobs: Vec<String> = old_entries(artifacts, "logs").await?.into_iter().filter(|name| name != "replicas").collect();
    let gone = sqlx::query_scalar!(
        r#"SELECT id AS "id!" FROM unnest($1::text[]) AS id
           WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = id.id AND j.deleted_at IS NULL)"#,
        &jobs,
    )
    .fetch_all(db)
    .await?;
    remove(artifacts, gone.into_iter().map(|job| format!("logs/{job}")).collect()).await?;
    let logs = list(artifacts, "logs/replicas", ENGINE_LOGS).await?;
    let gone = sqlx::query_scalar!(
        r#"SELECT log AS "log!" FROM unnest($1::text[]) AS log
           WHERE NOT EXISTS (SELECT FROM replicas r WHERE r.id || '.log' = log AND r.stopped_at IS NULL)"#,
        &logs,
    )
    .fetch_all(db)
    .await?;
    remove(artifacts, gone.into_iter().map(|log| format!("logs/replicas/{log}")).collect()).await
}

/// Token shards, each touched by whoever opens it. One that was touched since the oldest running training
/// began may be in use and stays.
async fn unused_shards(db: &PgPool, artifacts: &Artifacts, limits: CacheLimits) -> Result<(), SweepError> {
    let busy_seconds = sqlx::query_scalar!(
        "SELECT extract(epoch FROM now() - min(a.started_at))::float8 FROM job_attempts a JOIN jobs j ON j.id = a.job_id
         WHERE a.ended_at IS NULL AND j.kind = 'train'"
    )
    .fetch_one(db)
    .await?;
    let in_use = busy_seconds.map_or(Duration::ZERO, |seconds| Duration::from_secs_f64(seconds.max(0.0)) + CLOCKS);
    let artifacts = artifacts.clone();
    Ok(blocking(move || sweep_shards(&artifacts, limits, in_use)).await?)
}

/// `in_use`: what was touched within this time stays.
fn sweep_shards(artifacts: &Artifacts, limits: CacheLimits, in_use: Duration) -> Result<(), ArtifactError> {
    let failed = |source| ArtifactError::Io { key: SHARDS.to_owned(), source };
    let mut shards = Vec::new();
    for (name, age) in aged(&artifacts.path(SHARDS)).map_err(failed)? {
        let key = format!("{SHARDS}/{name}");
        if name.ends_with(".tmp") {
            // Of a worker that was killed while it made it.
            if age > TEMPORARY {
                artifacts.remove(&key)?;
            }
        } else if age >= in_use {
            shards.push((age, artifacts.size(&key)?, key));
        }
    }
    shards.sort();
    let mut kept = 0;
    for (age, bytes, key) in shards {
        if age > limits.unused_for || kept + bytes > limits.bytes {
            tracing::info!(key, bytes, "removing token shards that were not used for long");
            artifacts.remove(&key)?;
        } else {
            kept += bytes;
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
    Ok(aged(folder)?.into_iter().filter(|(_, old)| *old >= age).map(|(name, _)| name).collect())
}

/// The entries of a folder, and how long ago each was changed. No folder: no entries.
fn aged(folder: &Path) -> io::Result<Vec<(String, Duration)>> {
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let mut found = Vec::new();
    for entry in listed {
        let entry = entry?;
        let Ok(modified) = entry.metadata().and_then(|metadata| metadata.modified()) else { continue };
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, SystemTime::now().duration_since(modified).unwrap_or_default()));
        }
    }
    Ok(found)
}

fn remove_old(artifacts: &Artifacts, key: &str, age: Duration) -> Result<(), ArtifactError> {
    let old = names(&artifacts.path(key), age).map_err(|source| ArtifactError::Io { key: key.to_owned(), source })?;
    old.iter().try_for_each(|name| artifacts.remove(&format!("{key}/{name}")))
}
