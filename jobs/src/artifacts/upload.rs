//! Files that come in pieces, as from a request.

use std::{fs, io, path::PathBuf};

use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::{ArtifactError, Artifacts, plain};
use crate::{ids, waiting};

/// Bytes of an upload between two looks at the disk.
const LOOK_EVERY: u64 = 64 << 20;

impl Artifacts {
    /// A file that is hashed while it is written and is at its key once finished; dropped before
    /// that, nothing remains. [`ArtifactError::Full`] where the reserve would be touched.
    pub async fn create(&self, key: &str) -> Result<Upload, ArtifactError> {
        if !plain(key) {
            return Err(ArtifactError::BadKey(key.to_owned()));
        }
        self.check_reserve().await?;
        let staged = self.root.join("tmp").join(ids::new("upload"));
        let file =
            tokio::fs::File::create_new(&staged).await.map_err(|source| ArtifactError::Io { key: key.to_owned(), source })?;
        Ok(Upload { artifacts: self.clone(), key: key.to_owned(), file, staged: Some(staged), digest: Sha256::new(), bytes: 0 })
    }

    async fn check_reserve(&self) -> Result<(), ArtifactError> {
        let artifacts = self.clone();
        let disk = waiting::blocking(move || artifacts.disk()).await;
        match disk {
            Ok(Ok((free, _))) if free < self.reserve_bytes => Err(ArtifactError::Full { free, reserve: self.reserve_bytes }),
            // A disk that cannot be asked is found out by writing.
            _ => Ok(()),
        }
    }
}

/// What a finished [`Upload`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub bytes: u64,
    /// Hex.
    pub sha256: String,
}

/// A file on its way into the store; see [`Artifacts::create`].
pub struct Upload {
    artifacts: Artifacts,
    key: String,
    file: tokio::fs::File,
    staged: Option<PathBuf>,
    digest: Sha256,
    bytes: u64,
}

impl Upload {
    pub async fn write(&mut self, chunk: &[u8]) -> Result<(), ArtifactError> {
        self.digest.update(chunk);
        let looks = self.bytes / LOOK_EVERY;
        self.bytes += chunk.len() as u64;
        if self.bytes / LOOK_EVERY > looks {
            self.artifacts.check_reserve().await?;
        }
        self.file.write_all(chunk).await.map_err(|source| ArtifactError::Io { key: self.key.clone(), source })
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Syncs the file and moves it to its key.
    pub async fn finish(mut self) -> Result<Written, ArtifactError> {
        let failed = |key: &str, source| ArtifactError::Io { key: key.to_owned(), source };
        self.file.flush().await.map_err(|source| failed(&self.key, source))?;
        let Some(staged) = self.staged.take() else {
            return Err(ArtifactError::BadKey(self.key.clone()));
        };
        if let Err(error) = self.artifacts.persist(&staged, &self.key).await {
            self.staged = Some(staged);
            return Err(error);
        }
        let (artifacts, key, from) = (self.artifacts.clone(), self.key.clone(), staged.clone());
        let published = waiting::blocking(move || artifacts.put_file(&from, &key)).await;
        match published {
            Ok(Ok(())) => Ok(Written { bytes: self.bytes, sha256: hex::encode(std::mem::take(&mut self.digest).finalize()) }),
            Ok(Err(error)) => {
                self.staged = Some(staged);
                Err(error)
            }
            Err(stopped) => {
                self.staged = Some(staged);
                Err(failed(&self.key, io::Error::other(stopped)))
            }
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(staged) = self.staged.take() {
            // A leftover is swept by housekeeping, so a failure here loses nothing.
            let _ = fs::remove_file(staged);
        }
    }
}
