//! The proof that api and runners use one artifact store.
//!
//! The database names its store by an id, and the api writes that id into the store's folder. A runner
//! that reads another id there, or none, would fail every job, so it takes none and says why.

use sqlx::PgConnection;

use crate::{
    artifacts::{ArtifactError, Artifacts},
    ids,
};

/// Beside the folders of the store.
const FILE: &str = "store_id";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "{store} is another database's (its {FILE} says {found}, this database's is {expected}): give the one that belongs to it (--artifacts, --artifact-store)"
    )]
    Other { store: String, found: String, expected: String },
    #[error(
        "{store} lacks {key}, which the database says is stored: give the one that belongs to it (--artifacts, --artifact-store), or restore it"
    )]
    Lacks { store: String, key: String },
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// The api's half: gives the database's store its id, and writes it into the folder where it is missing.
/// A database without files, datasets, tokenizers or models takes a folder as it is, so that a restored
/// folder may come before its rows.
///
/// # Errors
/// A folder of another database, or one that lacks what this database's rows name.
pub async fn write(conn: &mut PgConnection, artifacts: &Artifacts) -> Result<(), StoreError> {
    sqlx::query!("INSERT INTO artifact_store (id) VALUES ($1) ON CONFLICT (single) DO NOTHING", ids::new("store"))
        .execute(&mut *conn)
        .await?;
    let expected = sqlx::query_scalar!("SELECT id FROM artifact_store").fetch_one(&mut *conn).await?;
    let stored = newest_artifacts(conn).await?;
    match read(artifacts).await? {
        Some(found) if found == expected => Ok(()),
        Some(found) if stored.is_empty() => {
            sqlx::query!("UPDATE artifact_store SET id = $1", found).execute(conn).await?;
            Ok(())
        }
        Some(found) => Err(StoreError::Other { store: artifacts.described(), found, expected }),
        None => {
            // One that is being deleted may be gone already; all of them are not.
            let mut lacking = None;
            for key in stored {
                if artifacts.contains(&key).await? {
                    lacking = None;
                    break;
                }
                lacking = lacking.or(Some(key));
            }
            match lacking {
                Some(key) => Err(StoreError::Lacks { store: artifacts.described(), key }),
                None => Ok(artifacts.write_small(FILE, format!("{expected}\n").as_bytes()).await?),
            }
        }
    }
}

/// Why a runner must not take work from a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub sentence: String,
    /// So it also looks while an api is starting for the first time.
    pub may_pass: bool,
}

/// The runner's half: why it must not take work from this folder; `None`: it may.
pub async fn refusal(conn: &mut PgConnection, artifacts: &Artifacts) -> Result<Option<Refusal>, StoreError> {
    let expected = sqlx::query_scalar!("SELECT id FROM artifact_store").fetch_optional(conn).await?;
    let store = artifacts.described();
    let (sentence, may_pass) = match (read(artifacts).await?, expected) {
        (Some(found), Some(expected)) if found == expected => return Ok(None),
        (Some(found), Some(expected)) => (StoreError::Other { store, found, expected }.to_string(), false),
        (None, Some(_)) => (
            format!(
                "{store} of this runner is not the api's: it lacks the file {FILE}, which the api has written; give the runner \
                 the same folder (--artifacts), or mount it, or the same bucket (--artifact-store)"
            ),
            true,
        ),
        (_, None) => ("no api has written to the artifact folder yet; start `lathe api`".to_owned(), true),
    };
    Ok(Some(Refusal { sentence, may_pass }))
}

/// What the newest rows say is stored.
async fn newest_artifacts(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"SELECT artifact AS "artifact!" FROM (
               (SELECT artifact, created_at FROM files WHERE deleted_at IS NULL ORDER BY created_at DESC LIMIT 3)
               UNION ALL
               (SELECT artifact, created_at FROM datasets WHERE deleted_at IS NULL AND artifact IS NOT NULL ORDER BY created_at DESC LIMIT 3)
               UNION ALL
               (SELECT artifact, created_at FROM tokenizers WHERE deleted_at IS NULL AND artifact IS NOT NULL ORDER BY created_at DESC LIMIT 3)
               UNION ALL
               (SELECT artifact, created_at FROM models WHERE deleted_at IS NULL AND artifact IS NOT NULL ORDER BY created_at DESC LIMIT 3)
           ) newest"#
    )
    .fetch_all(conn)
    .await
}

async fn read(artifacts: &Artifacts) -> Result<Option<String>, ArtifactError> {
    Ok(artifacts.read_small(FILE).await?.map(|content| String::from_utf8_lossy(&content).trim().to_owned()))
}
