//! From a worker's staging folder to a resource that is ready.
//!
//! Runs inside the transaction that ends the job: the folder is moved to its key while the attempt is
//! held. The key names the attempt, so a runner that has lost its lease without knowing never replaces
//! what a later attempt published. If the commit fails after the move, no row names the folder, and
//! housekeeping sweeps it.

use std::path::PathBuf;

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

impl Product {
    /// The staged folder, where there is one.
    pub fn folder(&self) -> Option<&std::path::Path> {
        match self {
            Product::Model { folder, .. } | Product::Tokenizer { folder, .. } | Product::Dataset { folder, .. } => Some(folder),
            Product::Statistics { .. } => None,
        }
    }
}

/// Moves the product to its key and makes its row ready.
pub async fn register(tx: &mut PgConnection, artifacts: &Artifacts, lease: &Lease, product: &Product) -> Result<(), LeaseError> {
    let changed = match product {
        Product::Model { folder, parameters, weights_sha256, trained_tokens, template } => {
            let Some(id) =
                sqlx::query_scalar!("SELECT id FROM models WHERE job_id = $1", lease.job_id).fetch_optional(&mut *tx).await?
            else {
                unclaimed(lease);
                return Ok(());
            };
            let key = format!("models/{id}/{}", lease.attempt);
            let bytes = put(artifacts, folder, &key).await?;
            // Steps that changed nothing leave no metrics, and so may be missing at the end.
            sqlx::query!(
                "UPDATE jobs SET trained_tokens = $2, step = coalesce(steps, step) WHERE id = $1",
                lease.job_id,
                trained_tokens
            )
            .execute(&mut *tx)
            .await?;
            sqlx::query!(
                "UPDATE models SET state = 'ready', artifact = $3, parameters = $4, weights_sha256 = $5, template = $6, bytes = $7
                 WHERE id = $1 AND job_id = $2 AND state IN ('queued', 'running')",
                id,
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
        Product::Tokenizer { folder, sha256, vocabulary, added_roles } => {
            let Some(id) =
                sqlx::query_scalar!("SELECT id FROM tokenizers WHERE job_id = $1", lease.job_id).fetch_optional(&mut *tx).await?
            else {
                unclaimed(lease);
                return Ok(());
            };
            let key = format!("tokenizers/{id}/{}", lease.attempt);
            let bytes = put(artifacts, folder, &key).await?;
            sqlx::query!(
                "UPDATE tokenizers SET state = 'ready', artifact = $3, sha256 = $4, vocabulary = $5, added_roles = $6, bytes = $7
                 WHERE id = $1 AND job_id = $2 AND state IN ('queued', 'running')",
                id,
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
        Product::Dataset { folder, sha256, statistics } => {
            let Some(id) =
                sqlx::query_scalar!("SELECT id FROM datasets WHERE job_id = $1", lease.job_id).fetch_optional(&mut *tx).await?
            else {
                unclaimed(lease);
                return Ok(());
            };
            let key = format!("datasets/{id}/{}", lease.attempt);
            let bytes = put(artifacts, folder, &key).await?;
            sqlx::query!(
                "UPDATE datasets SET state = 'ready', artifact = $3, sha256 = $4, statistics = $5, bytes = $6
                 WHERE id = $1 AND job_id = $2 AND state IN ('queued', 'running')",
                id,
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
        unclaimed(lease);
    }
    Ok(())
}

/// Nothing is lost to a client by this: the row would have been there from the start.
fn unclaimed(lease: &Lease) {
    tracing::warn!(job.id = lease.job_id, "the job succeeded, but no row waits for what it made");
}

/// Moves a folder to its key off the async threads; its size in bytes.
async fn put(artifacts: &Artifacts, folder: &std::path::Path, key: &str) -> Result<i64, ArtifactError> {
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
