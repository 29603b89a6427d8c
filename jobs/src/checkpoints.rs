//! Checkpoints: from a worker's staging folder to a row, and from the newest whole row to a resume.
//!
//! Publishing, registering and pruning are three steps, each safe to be the last before a crash: a
//! folder without a row is swept by housekeeping, a row too many is pruned after the next one. The
//! newest and the best checkpoint are never pruned, nor one that is served or that an unfinished job
//! starts from.
//!
//! A checkpoint is a model too, named [`model_name`]: its folder holds what an engine and a tuning need.

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

/// Between a model's id and a step, in the name of a checkpoint as a model.
const AS_MODEL: &str = ":ckpt-step-";

/// The name under which a checkpoint of the job that makes `model_id` is served and tuned.
pub fn model_name(model_id: &str, step: i64) -> String {
    format!("{model_id}{AS_MODEL}{step}")
}

/// The model's id and the step in such a name; `None` for any other name.
fn parse_model_name(name: &str) -> Option<(&str, i64)> {
    let (model_id, step) = name.rsplit_once(AS_MODEL)?;
    // One spelling a step: no sign, no zero in front.
    let parsed = step.parse::<i64>().ok().filter(|parsed| *parsed >= 0 && parsed.to_string() == step)?;
    Some((model_id, parsed))
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
    // Before the attempt is held, which is then only for a rename.
    artifacts.persist(&staged.folder, &key).await?;
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
/// names a folder that is gone. One in use stays.
pub async fn prune(conn: &mut PgConnection, artifacts: &Artifacts, lease: &Lease, keep: i64) -> Result<(), LeaseError> {
    let mut tx = conn.begin().await?;
    lease::fence(&mut tx, lease).await?;
    let removed = remove_surplus(&mut tx, &lease.job_id, keep).await?;
    tx.commit().await?;
    Ok(artifacts.remove_all(removed).await?)
}

/// The database's half of [`prune`], for whoever may write about the job; the keys of the folders to
/// remove after the commit.
pub(crate) async fn remove_surplus(tx: &mut PgConnection, job_id: &str, keep: i64) -> Result<Vec<String>, sqlx::Error> {
    // Locked by a statement of its own: who uses them is asked only once nobody can begin to.
    let surplus = sqlx::query_scalar!(
        "SELECT id FROM checkpoints WHERE job_id = $1 AND NOT best
           AND id NOT IN (SELECT id FROM checkpoints WHERE job_id = $1 ORDER BY step DESC, attempt DESC LIMIT $2)
         ORDER BY id FOR UPDATE",
        job_id,
        keep.max(1),
    )
    .fetch_all(&mut *tx)
    .await?;
    sqlx::query_scalar!(
        "DELETE FROM checkpoints c WHERE id = ANY($1)
           AND NOT EXISTS (SELECT FROM replicas r WHERE r.checkpoint_id = c.id AND r.state IN ('queued', 'starting', 'ready', 'stopping'))
           AND NOT EXISTS (SELECT FROM jobs j JOIN models m ON m.job_id = c.job_id
                           WHERE j.finished_at IS NULL AND j.base_model_id = m.id || ':ckpt-step-' || c.step)
         RETURNING artifact",
        &surplus,
    )
    .fetch_all(tx)
    .await
}

/// A checkpoint that is named as a model.
#[derive(Clone, Debug)]
pub struct NamedCheckpoint {
    pub id: String,
    /// The model that its job makes.
    pub model_id: String,
    pub artifact: String,
    pub created_at: time::OffsetDateTime,
}

/// The checkpoint of that name ([`model_name`]); the newest attempt's, where several saved the step.
/// `None` for another kind of name, and once it is pruned or the model or its job is deleted.
pub async fn find_named(conn: &mut PgConnection, name: &str) -> Result<Option<NamedCheckpoint>, sqlx::Error> {
    let Some((model_id, step)) = parse_model_name(name) else { return Ok(None) };
    sqlx::query_as!(
        NamedCheckpoint,
        "SELECT c.id, m.id AS model_id, c.artifact, c.created_at FROM models m JOIN checkpoints c ON c.job_id = m.job_id
         WHERE m.id = $1 AND m.deleted_at IS NULL AND c.step = $2 ORDER BY c.attempt DESC LIMIT 1",
        model_id,
        step,
    )
    .fetch_optional(conn)
    .await
}

/// Keeps a checkpoint from being pruned until the transaction ends; false: it is gone.
pub async fn hold(tx: &mut PgConnection, id: &str) -> Result<bool, sqlx::Error> {
    let held = sqlx::query_scalar!("SELECT id FROM checkpoints WHERE id = $1 FOR KEY SHARE", id).fetch_optional(tx).await?;
    Ok(held.is_some())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_s_name_is_read_back_and_nothing_else_is_one() {
        let name = model_name("ft:model-1:org:a:b", 120);
        assert_eq!(name, "ft:model-1:org:a:b:ckpt-step-120");
        assert_eq!(parse_model_name(&name), Some(("ft:model-1:org:a:b", 120)));
        for other in [
            "model-1",
            "model-1:ckpt-step-",
            "model-1:ckpt-step--1",
            "model-1:ckpt-step-+1",
            "model-1:ckpt-step-01",
            "model-1:ckpt-step-1x",
        ] {
            assert_eq!(parse_model_name(other), None, "{other}");
        }
    }
}
