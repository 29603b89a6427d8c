//! Checkpoints: from a worker's staging folder to a row, and from the newest whole row to a resume.
//!
//! Publishing, registering and pruning are three steps, each safe to be the last before a crash: a
//! folder without a row is swept by housekeeping, a row too many is pruned after the next one. The
//! newest and the best checkpoint are never pruned.

use std::path::PathBuf;

use sqlx::{Connection, PgConnection};

use crate::{
    artifacts::Artifacts,
    events, ids,
    lease::{self, Lease, LeaseError},
    publish::blocking,
};

/// A checkpoint as a worker reports it.
#[derive(Clone, Debug, PartialEq)]
pub struct Staged {
    pub step: i64,
    pub folder: PathBuf,
    pub loss: Option<f64>,
    pub validation_loss: Option<f64>,
    pub best: bool,
}

pub fn key(job_id: &str, attempt: i32, step: i64) -> String {
    format!("checkpoints/{job_id}/{attempt}/{step}")
}

/// Publishes a staged checkpoint under the lease and adds its row; its id. Repeating it changes
/// nothing.
pub async fn register(
    conn: &mut PgConnection,
    artifacts: &Artifacts,
    lease: &Lease,
    staged: &Staged,
) -> Result<String, LeaseError> {
    let key = key(&lease.job_id, lease.attempt, staged.step);
    let synced = staged.folder.clone();
    // Written through to disk before the attempt is held, which is then only for a rename.
    blocking(move || {
        let _ = crate::artifacts::sync_tree(&synced);
        Ok(())
    })
    .await?;
    let mut tx = conn.begin().await?;
    lease::fence(&mut tx, lease).await?;
    let bytes = {
        let (artifacts, folder, key) = (artifacts.clone(), staged.folder.clone(), key.clone());
        blocking(move || {
            artifacts.put_folder(&folder, &key)?;
            artifacts.size(&key)
        })
        .await?
    };
    if staged.best {
        sqlx::query!("UPDATE checkpoints SET best = false WHERE job_id = $1 AND best", lease.job_id).execute(&mut *tx).await?;
    }
    let id = sqlx::query_scalar!(
        "INSERT INTO checkpoints (id, job_id, attempt, step, artifact, bytes, loss, validation_loss, best)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         ON CONFLICT (job_id, attempt, step) DO UPDATE SET bytes = excluded.bytes, best = excluded.best
         RETURNING id",
        ids::new("ftckpt"),
        lease.job_id,
        lease.attempt,
        staged.step,
        key,
        i64::try_from(bytes).unwrap_or(i64::MAX),
        staged.loss,
        staged.validation_loss,
        staged.best,
    )
    .fetch_one(&mut *tx)
    .await?;
    events::wake(&mut tx, &lease.job_id).await?;
    tx.commit().await?;
    Ok(id)
}

/// Removes all but the `keep` newest checkpoints and the best one: the row first, so that no row
/// names a folder that is gone. One that a replica serves stays.
pub async fn prune(conn: &mut PgConnection, artifacts: &Artifacts, lease: &Lease, keep: i64) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    lease::fence(&mut tx, lease).await?;
    let removed = sqlx::query_scalar!(
        "DELETE FROM checkpoints WHERE job_id = $1 AND NOT best
           AND id NOT IN (SELECT id FROM checkpoints WHERE job_id = $1 ORDER BY step DESC, attempt DESC LIMIT $2)
           AND NOT EXISTS (SELECT FROM replicas r WHERE r.checkpoint_id = checkpoints.id AND r.state IN ('queued', 'starting', 'ready'))
         RETURNING artifact",
        lease.job_id,
        keep.max(1),
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    let artifacts = artifacts.clone();
    blocking(move || removed.iter().try_for_each(|key| artifacts.remove(key))).await?;
    Ok(())
}

/// One registered checkpoint.
#[derive(Clone, Debug)]
pub struct Registered {
    pub id: String,
    pub step: i64,
    pub artifact: String,
}

/// A job's checkpoints, the newest first.
pub async fn newest(conn: &mut PgConnection, job_id: &str) -> Result<Vec<Registered>, sqlx::Error> {
    sqlx::query_as!(
        Registered,
        "SELECT id, step, artifact FROM checkpoints WHERE job_id = $1 ORDER BY step DESC, attempt DESC",
        job_id
    )
    .fetch_all(conn)
    .await
}
