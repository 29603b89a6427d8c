//! Workers' logs. Each is a file of the machine that its worker ran on; with a bucket, the runner copies it there
//! with every checkpoint and at the end of the attempt, for an api on another machine.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{ArtifactError, Artifacts, in_bucket};
use crate::ids;

impl Artifacts {
    /// The log of one attempt's worker.
    pub fn log(&self, job_id: &str, attempt: i32) -> PathBuf {
        self.path(&key(job_id, attempt))
    }

    /// Copies the log of an attempt to the bucket, if there is one, for apis on other machines. A log is worth
    /// no failure.
    pub async fn share_log(&self, job_id: &str, attempt: i32) {
        let (Some(bucket), log) = (&self.bucket, self.log(job_id, attempt)) else { return };
        if is_there(&log).await
            && let Err(error) = bucket.put(&log, &key(job_id, attempt)).await
        {
            tracing::warn!(job.id = job_id, %error, "a log could not be copied to the artifact store");
        }
    }

    /// A file in which the log of an attempt is: the worker's own, or a copy as of its last checkpoint, which goes
    /// when it is dropped. Neither need be there.
    pub async fn fetch_log(&self, job_id: &str, attempt: i32) -> Result<Log, ArtifactError> {
        let path = self.log(job_id, attempt);
        let Some(bucket) = &self.bucket else { return Ok(Log::Own(path)) };
        if is_there(&path).await {
            return Ok(Log::Own(path));
        }
        let (key, copy) = (key(job_id, attempt), self.root.join("tmp").join(ids::new("log")));
        let log = Log::Copy(copy.clone());
        bucket.get(&key, &copy, |_| true).await.map_err(in_bucket(&key))?;
        Ok(log)
    }
}

/// A worker's log on this machine; see [`Artifacts::fetch_log`].
pub enum Log {
    Own(PathBuf),
    Copy(PathBuf),
}

impl Log {
    pub fn path(&self) -> &Path {
        match self {
            Log::Own(path) | Log::Copy(path) => path,
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if let Log::Copy(path) = self {
            let _ = fs::remove_file(path);
        }
    }
}

async fn is_there(path: &Path) -> bool {
    tokio::fs::try_exists(path).await.unwrap_or_default()
}

fn key(job_id: &str, attempt: i32) -> String {
    format!("logs/{job_id}/{attempt}.log")
}
