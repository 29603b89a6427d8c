//! From a worker's staging folder to a resource that is ready.
//!
//! [`register`] runs inside the transaction that ends the job: the folder is moved to its key while the
//! attempt is held. The key names the attempt, so a runner that has lost its lease without knowing never replaces
//! what a later attempt published. If the commit fails after the move, no row names the folder, and
//! housekeeping sweeps it.

use std::path::{Path, PathBuf};

use serde_json::Value;
use sqlx::PgConnection;

use crate::{
    artifacts::{ArtifactError, Artifacts},
    lease::{Lease, LeaseError},
    waiting,
};

/// What a job made; folders are staged and synced.
#[derive(Clone, Debug)]
pub enum Product {
    Model { folder: PathBuf, parameters: i64, weights_sha256: String, trained_tokens: i64, template: Option<String> },
    Tokenizer { folder: PathBuf, sha256: String, vocabulary: i64, added_roles: Vec<String> },
    Dataset { folder: PathBuf, sha256: String, statistics: Value },
    Statistics { statistics: Value },
}

/// The staged folder of a product, and the key that it is published at; `None` where there is no folder, or no row
/// waits for it.
pub async fn destination<'a>(
    conn: &mut PgConnection,
    lease: &Lease,
    product: &'a Product,
) -> Result<Option<(&'a Path, String)>, sqlx::Error> {
    let job = &lease.job_id;
    let (folder, kind, id) = match product {
        Product::Model { folder, .. } => {
            let id = sqlx::query_scalar!("SELECT id FROM models WHERE job_id = $1", job).fetch_optional(conn).await?;
            (folder, "models", id)
        }
        Product::Tokenizer { folder, .. } => {
            let id = sqlx::query_scalar!("SELECT id FROM tokenizers WHERE job_id = $1", job).fetch_optional(conn).await?;
            (folder, "tokenizers", id)
        }
        Product::Dataset { folder, .. } => {
            let id = sqlx::query_scalar!("SELECT id FROM datasets WHERE job_id = $1", job).fetch_optional(conn).await?;
            (folder, "datasets", id)
        }
        Product::Statistics { .. } => return Ok(None),
    };
    Ok(id.map(|id| (folder.as_path(), format!("{kind}/{id}/{}", lease.attempt))))
}

/// Moves the persisted product to its key and makes its row ready.
pub async fn register(tx: &mut PgConnection, artifacts: &Artifacts, lease: &Lease, product: &Product) -> Result<(), LeaseError> {
    let published = match destination(tx, lease, product).await? {
        Some((folder, key)) => Some((put(artifacts, folder, &key).await?, key)),
        None => None,
    };
    let (bytes, key) = published.unzip();
    let changed = match product {
        Product::Model { parameters, weights_sha256, trained_tokens, template, .. } => {
            // Steps that changed nothing leave no metrics, and so may be missing at the end.
            sqlx::query!(
                "UPDATE jobs SET trained_tokens = $2, step = coalesce(steps, step) WHERE id = $1",
                lease.job_id,
                trained_tokens
            )
            .execute(&mut *tx)
            .await?;
            sqlx::query!(
                "UPDATE models SET state = 'ready', artifact = $2, parameters = $3, weights_sha256 = $4, template = $5, bytes = $6
                 WHERE job_id = $1 AND state IN ('queued', 'running')",
                lease.job_id,
                key,
                parameters,
                weights_sha256,
                template.as_deref(),
                bytes,
            )
            .execute(tx)
            .await?
        }
        Product::Tokenizer { sha256, vocabulary, added_roles, .. } => {
            sqlx::query!(
                "UPDATE tokenizers SET state = 'ready', artifact = $2, sha256 = $3, vocabulary = $4, added_roles = $5, bytes = $6
                 WHERE job_id = $1 AND state IN ('queued', 'running')",
                lease.job_id,
                key,
                sha256,
                vocabulary,
                added_roles,
                bytes,
            )
            .execute(tx)
            .await?
        }
        Product::Dataset { sha256, statistics, .. } => {
            sqlx::query!(
                "UPDATE datasets SET state = 'ready', artifact = $2, sha256 = $3, statistics = $4, bytes = $5
                 WHERE job_id = $1 AND state IN ('queued', 'running')",
                lease.job_id,
                key,
                sha256,
                statistics,
                bytes,
            )
            .execute(tx)
            .await?
        }
        Product::Statistics { statistics } => {
            sqlx::query!("UPDATE dataset_token_statistics SET statistics = $2 WHERE job_id = $1", lease.job_id, statistics)
                .execute(tx)
                .await?
        }
    };
    if changed.rows_affected() == 0 {
        // Nothing is lost to a client by this: the row would have been there from the start.
        tracing::warn!(job.id = lease.job_id, "the job succeeded, but no row waits for what it made");
    }
    Ok(())
}

/// Moves a folder to its key off the async threads; its size in bytes.
async fn put(artifacts: &Artifacts, folder: &Path, key: &str) -> Result<i64, ArtifactError> {
    let (artifacts, folder, key) = (artifacts.clone(), folder.to_owned(), key.to_owned());
    blocking(move || {
        artifacts.put_folder(&folder, &key)?;
        artifacts.size(&key).map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX))
    })
    .await
}

/// Runs file work on the threads that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ArtifactError> + Send + 'static,
) -> Result<T, ArtifactError> {
    let stopped = |error| ArtifactError::Io { key: String::new(), source: std::io::Error::other(error) };
    waiting::blocking(work).await.map_err(stopped)?
}
