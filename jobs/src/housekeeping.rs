//! Sweeps what nothing refers to any more, and nothing else: expired files, uploads and idempotent
//! requests, old entries of the audit log, artifacts and checkpoint folders without a row, checkpoints that an ended job need not keep,
//! staging folders of attempts that have ended, logs of deleted jobs, temporary files, and token shards and
//! copies of what lies in a bucket that were not used for long or are too many. Also where the disk stands.
//!
//! Several runners may sweep at once; everything here may be repeated. What lies in the store is touched
//! only when it has been left alone for [`LEFT_ALONE`] (publishing counts as a touch), and its rows are
//! asked after it was listed, so nothing that is being published is mistaken for a leftover. What is swept
//! from the store goes from its bucket too; other machines' copies go when they sweep.

use std::{
    fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use sqlx::PgPool;

use crate::{
    artifacts::{ArtifactError, Artifacts, EXCERPTS, SHARDS, in_bucket},
    audit::{self, Actor, Deed, Entry},
    checkpoints,
    context::Context,
    publish::blocking,
    waiting::{self, unless_stuck},
};

/// Where artifacts lie, and how many levels below.
const KINDS: [(&str, usize); 6] =
    [("files", 1), ("parts", 1), ("datasets", 2), ("tokenizers", 2), ("models", 2), ("checkpoints", 3)];

const EVERY: Duration = Duration::from_secs(600);
const LEFT_ALONE: Duration = Duration::from_secs(3600);
/// Logs of engines that are gone.
const ENGINE_LOGS: Duration = Duration::from_secs(7 * 24 * 3600);
/// Clocks of machines that share a store may differ by this much.
const CLOCKS: Duration = Duration::from_secs(600);

/// How much of the shard cache is kept, and of the copies of what lies in a bucket. Whatever is lost is made or
/// copied again when it is needed.
#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    pub unused_for: Duration,
    /// Of all of a kind together, those in use aside; the ones used longest ago go first.
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

/// Sweeps now and then, until it is dropped.
pub async fn run(context: Arc<Context>) {
    let (db, artifacts) = (&context.db, &context.artifacts);
    loop {
        let cache = limits(artifacts, context.config.disk_low_bytes).await;
        // Its questions are asked of whole tables, so they may take long.
        match unless_stuck(EVERY, round(db, artifacts, cache, context.config.audit_days)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "housekeeping could not finish its round"),
            Err(stuck) => tracing::warn!(error = %stuck, "housekeeping gave its round up"),
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// The api's part: where artifacts lie in a bucket, the copies on its machine are swept as a runner's are.
pub async fn keep_copies(db: PgPool, artifacts: Artifacts, disk_low_bytes: u64) {
    if artifacts.bucket().is_none() {
        return;
    }
    loop {
        let cache = limits(&artifacts, disk_low_bytes).await;
        match unless_stuck(EVERY, unused(&db, &artifacts, cache)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "copies of artifacts could not be swept"),
            Err(stuck) => tracing::warn!(error = %stuck, "copies of artifacts could not be swept"),
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// On a disk that is nearly full nothing is kept that is not in use.
async fn limits(artifacts: &Artifacts, disk_low_bytes: u64) -> CacheLimits {
    let store = artifacts.clone();
    match waiting::blocking(move || disk_state(&store, disk_low_bytes)).await {
        Ok(Ok(disk)) if disk.low => CacheLimits { bytes: 0, ..CacheLimits::default() },
        _ => CacheLimits::default(),
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
    unused(db, artifacts, cache).await?;
    orphan_artifacts(db, artifacts).await?;
    orphan_checkpoints(db, artifacts).await?;
    surplus_checkpoints(db, artifacts).await?;
    orphan_logs(db, artifacts).await?;
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
    Ok(artifacts.remove_all(expired.into_iter().map(|file| file.artifact).collect()).await?)
}

async fn expired_uploads(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    sqlx::query!("UPDATE uploads SET state = 'expired' WHERE state = 'pending' AND expires_at < now()").execute(db).await?;
    // A completed upload's bytes are its file's; an expired or cancelled one's parts are nobody's.
    let parts = sqlx::query_scalar!(
        "DELETE FROM upload_parts p USING uploads u WHERE u.id = p.upload_id AND u.state <> 'pending' RETURNING p.artifact"
    )
    .fetch_all(db)
    .await?;
    Ok(artifacts.remove_all(parts).await?)
}

async fn remove_here(artifacts: &Artifacts, keys: Vec<String>) -> Result<(), SweepError> {
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
            remove_here(artifacts, vec![format!("staging/{job}")]).await?;
        }
    }
    Ok(())
}

/// What a crash left between the rename and the row, or between the row's end and the artifact's. What an attempt
/// makes may wait for long in the bucket until the attempt ends.
async fn orphan_artifacts(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let mut keys = Vec::new();
    for (folder, depth) in KINDS.into_iter().filter(|(folder, _)| *folder != "checkpoints") {
        keys.extend(stored(artifacts, folder, depth, LEFT_ALONE).await?);
    }
    let orphans = sqlx::query_scalar!(
        r#"SELECT key AS "key!" FROM unnest($1::text[]) AS key
           WHERE NOT EXISTS (SELECT FROM files r WHERE r.artifact = key AND r.deleted_at IS NULL)
             AND NOT EXISTS (SELECT FROM upload_parts r WHERE r.artifact = key)
             AND NOT EXISTS (SELECT FROM datasets r WHERE r.artifact = key)
             AND NOT EXISTS (SELECT FROM tokenizers r WHERE r.artifact = key)
             AND NOT EXISTS (SELECT FROM models r WHERE r.artifact = key)
             AND NOT EXISTS (SELECT FROM job_attempts a JOIN (
                     SELECT 'datasets/' || id AS key, job_id FROM datasets UNION ALL
                     SELECT 'tokenizers/' || id, job_id FROM tokenizers UNION ALL
                     SELECT 'models/' || id, job_id FROM models) made USING (job_id)
                 WHERE a.ended_at IS NULL AND made.key || '/' || a.n = key.key)"#,
        &keys,
    )
    .fetch_all(db)
    .await?;
    orphans.iter().for_each(|key| tracing::info!(key, "removing an artifact that no row names"));
    Ok(artifacts.remove_all(orphans).await?)
}

/// The same for checkpoints; those of a running attempt are left until it has ended.
async fn orphan_checkpoints(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let keys = stored(artifacts, "checkpoints", 3, LEFT_ALONE).await?;
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
    Ok(artifacts.remove_all(orphans).await?)
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
        artifacts.remove_all(removed).await?;
    }
    Ok(())
}

/// Logs of jobs that were deleted, and of engines that went long ago.
async fn orphan_logs(db: &PgPool, artifacts: &Artifacts) -> Result<(), SweepError> {
    let logs = stored(artifacts, "logs", 1, LEFT_ALONE).await?;
    let jobs: Vec<String> =
        logs.iter().filter_map(|key| key.strip_prefix("logs/")).filter(|job| *job != "replicas").map(Into::into).collect();
    let gone = sqlx::query_scalar!(
        r#"SELECT id AS "id!" FROM unnest($1::text[]) AS id
           WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = id.id AND j.deleted_at IS NULL)"#,
        &jobs,
    )
    .fetch_all(db)
    .await?;
    artifacts.remove_all(gone.into_iter().map(|job| format!("logs/{job}")).collect()).await?;
    let logs = list(artifacts, "logs/replicas", ENGINE_LOGS).await?;
    let gone = sqlx::query_scalar!(
        r#"SELECT log AS "log!" FROM unnest($1::text[]) AS log
           WHERE NOT EXISTS (SELECT FROM replicas r WHERE r.id || '.log' = log AND r.stopped_at IS NULL)"#,
        &logs,
    )
    .fetch_all(db)
    .await?;
    remove_here(artifacts, gone.into_iter().map(|log| format!("logs/replicas/{log}")).collect()).await
}

/// Token shards, and copies of what lies in a bucket, each touched by whoever opens it. What was touched since
/// the oldest running job began may be in use and stays.
pub async fn unused(db: &PgPool, artifacts: &Artifacts, limits: CacheLimits) -> Result<(), SweepError> {
    let busy_seconds = sqlx::query_scalar!(
        "SELECT extract(epoch FROM now() - min(started_at))::float8 FROM job_attempts WHERE ended_at IS NULL"
    )
    .fetch_one(db)
    .await?;
    let in_use = busy_seconds.map_or(Duration::ZERO, |seconds| Duration::from_secs_f64(seconds.max(0.0)) + CLOCKS);
    let store = artifacts.clone();
    let shards = blocking(move || old_shards(&store, in_use)).await?;
    for key in surplus(shards, limits) {
        tracing::info!(key, "removing token shards that were not used for long");
        remove_here(artifacts, vec![key]).await?;
    }
    let Some(bucket) = artifacts.bucket() else { return Ok(()) };
    let (store, left_alone) = (artifacts.clone(), in_use.max(LEFT_ALONE));
    let copies = blocking(move || old_copies(&store, left_alone)).await?;
    for key in surplus(copies, limits) {
        let original = key.strip_prefix(EXCERPTS).map_or(key.as_str(), |key| key.trim_start_matches('/'));
        // Whatever the bucket lacks is no copy.
        if bucket.contains(original).await.map_err(in_bucket(&key))? {
            tracing::info!(key, "removing the copy of an artifact that was not used for long");
            remove_here(artifacts, vec![key]).await?;
        }
    }
    Ok(())
}

/// How long ago something was used, its bytes, and its key.
type Used = (Duration, u64, String);

/// What exceeds the limits, the least recently used first to go.
fn surplus(mut used: Vec<Used>, limits: CacheLimits) -> Vec<String> {
    used.sort();
    let mut kept = 0;
    let exceeds = |(age, bytes, key): Used| {
        let goes = age > limits.unused_for || kept + bytes > limits.bytes;
        kept += if goes { 0 } else { bytes };
        goes.then_some(key)
    };
    used.into_iter().filter_map(exceeds).collect()
}

/// Shards that nobody may be using; what killed workers left half made is removed. Blocks.
fn old_shards(artifacts: &Artifacts, in_use: Duration) -> Result<Vec<Used>, ArtifactError> {
    let failed = |source| ArtifactError::Io { key: SHARDS.to_owned(), source };
    let mut shards = Vec::new();
    for (name, age) in aged(&artifacts.path(SHARDS)).map_err(failed)? {
        let key = format!("{SHARDS}/{name}");
        if name.ends_with(".tmp") {
            if age > TEMPORARY {
                artifacts.remove(&key)?;
            }
        } else if age >= in_use {
            shards.push((age, artifacts.size(&key)?, key));
        }
    }
    Ok(shards)
}

/// Everything of the store that lies here and has not been asked for in this time. Blocks.
fn old_copies(artifacts: &Artifacts, left_alone: Duration) -> Result<Vec<Used>, ArtifactError> {
    let mut copies = Vec::new();
    for below in ["".to_owned(), format!("{EXCERPTS}/")] {
        for (folder, depth) in KINDS {
            for (key, age) in at_depth(artifacts, &format!("{below}{folder}"), depth)? {
                if age >= left_alone {
                    copies.push((age, artifacts.size(&key)?, key));
                }
            }
        }
    }
    Ok(copies)
}

/// Keys of artifacts below a folder that have been left alone for so long, here or in the bucket.
async fn stored(artifacts: &Artifacts, folder: &'static str, depth: usize, age: Duration) -> Result<Vec<String>, ArtifactError> {
    let store = artifacts.clone();
    let mut keys = blocking(move || at_depth(&store, folder, depth)).await?;
    if let Some(bucket) = artifacts.bucket() {
        let listed = bucket.list(folder, depth + 1).await.map_err(in_bucket(folder))?;
        keys.extend(listed.into_iter().map(|stored| (stored.key, stored.age)));
    }
    Ok(keys.into_iter().filter(|(_, old)| *old >= age).map(|(key, _)| key).collect())
}

/// The keys so many levels below a folder on this machine, and how long each has been left alone. Blocks.
fn at_depth(artifacts: &Artifacts, folder: &str, depth: usize) -> Result<Vec<(String, Duration)>, ArtifactError> {
    let listed = aged(&artifacts.path(folder)).map_err(|source| ArtifactError::Io { key: folder.to_owned(), source })?;
    let listed = listed.into_iter().map(|(name, age)| (format!("{folder}/{name}"), age));
    if depth == 1 {
        return Ok(listed.collect());
    }
    let mut found = Vec::new();
    for (below, _) in listed {
        found.extend(at_depth(artifacts, &below, depth - 1)?);
    }
    Ok(found)
}

/// Names below `key` that have been left alone for [`LEFT_ALONE`].
async fn old_entries(artifacts: &Artifacts, key: &str) -> Result<Vec<String>, ArtifactError> {
    list(artifacts, key, LEFT_ALONE).await
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
