//! The bucket behind the local folder, where an installation has one.
//!
//! A file is one object at its key. A folder is its files below its key and, written last, a list of them at
//! `<key>/.folder`: without the list the folder is not there, so nobody reads half of one, and a removal
//! begins with it. What a crash leaves of either is swept by housekeeping, which finds objects by their age.
//!
//! Nothing here is repeated for long: whoever meets [`BucketError::Away`] tries again when it can.

use std::{collections::BTreeMap, fmt, fs, io, path::Path as FilePath, sync::Arc, time::Duration};

use bytes::BytesMut;
use futures_util::{StreamExt, TryStreamExt};
use object_store::{
    ClientConfigKey, ObjectStore, ObjectStoreExt, RetryConfig, WriteMultipart,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    path::Path,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Lists the files of a folder, and makes it one.
const LIST: &str = ".folder";

/// How long one request is repeated before the bucket counts as away.
const PATIENCE: Duration = Duration::from_secs(10);
/// A connection on which nothing comes for so long is given up: before whoever waits for it is (see
/// [`crate::waiting::STUCK`]).
const SILENCE: &str = "10 seconds";
/// Bytes of a part; S3 takes ten thousand of them.
const PART: usize = 16 << 20;
const PARTS_AT_A_TIME: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    #[error("an artifact store is s3://BUCKET or s3://BUCKET/PREFIX, which {0:?} is not")]
    BadUrl(String),
    #[error("the bucket refuses: {0}")]
    Refused(object_store::Error),
    /// A repetition may succeed.
    #[error("the bucket does not answer: {0}")]
    Away(object_store::Error),
    #[error("{key} in the bucket is not what was written: {what}")]
    Damaged { key: String, what: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<object_store::Error> for BucketError {
    fn from(error: object_store::Error) -> BucketError {
        use object_store::Error;
        match error {
            Error::NotFound { .. }
            | Error::PermissionDenied { .. }
            | Error::Unauthenticated { .. }
            | Error::InvalidPath { .. }
            | Error::NotSupported { .. }
            | Error::NotImplemented { .. }
            | Error::UnknownConfigurationKey { .. } => BucketError::Refused(error),
            _ => BucketError::Away(error),
        }
    }
}

/// A bucket, or the part of one below a prefix.
#[derive(Clone, Debug)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.store, self.prefix)
    }
}

/// What lies at one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub key: String,
    /// Since its newest object was written, by the bucket's clock against this machine's.
    pub age: Duration,
}

#[derive(Debug, Serialize, Deserialize)]
struct FolderList {
    files: Vec<ListedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ListedFile {
    /// Relative, its parts divided by `/`.
    path: String,
    bytes: u64,
}

impl Bucket {
    /// `s3://bucket/prefix`; keys, region and endpoint are taken from the environment as Amazon's tools do
    /// (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …). Asks nothing yet.
    ///
    /// # Errors
    /// Another URL, or settings that contradict each other.
    pub fn open(url: &str) -> Result<Bucket, BucketError> {
        let (name, prefix) = parse(url).ok_or_else(|| BucketError::BadUrl(url.to_owned()))?;
        let retry = RetryConfig { retry_timeout: PATIENCE, ..RetryConfig::default() };
        let client = |key| AmazonS3ConfigKey::Client(key);
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(name)
            .with_retry(retry)
            .with_config(client(ClientConfigKey::ReadTimeout), SILENCE)
            // A request as a whole may take long: a part of a large file on a slow line.
            .with_config(client(ClientConfigKey::Timeout), "1 day")
            .build()?;
        Ok(Bucket::over(Arc::new(store), prefix))
    }

    /// Any store of objects, below a prefix.
    pub fn over(store: Arc<dyn ObjectStore>, prefix: Path) -> Bucket {
        Bucket { store, prefix }
    }

    fn at(&self, key: &str) -> Path {
        let parts = key.split('/').filter(|part| !part.is_empty());
        self.prefix.parts().chain(parts.map(Into::into)).collect()
    }

    /// Writes a file or a folder to `key`; there as a whole once this returns, or not at all. A folder that is there
    /// already is left as it is: what is at a key never changes.
    pub async fn put(&self, from: &FilePath, key: &str) -> Result<(), BucketError> {
        if is_file(key) {
            self.put_file(from, key).await?;
            return Ok(());
        }
        if self.contains(key).await? {
            return Ok(());
        }
        let folder = from.to_owned();
        let names = crate::waiting::blocking(move || files_below(&folder)).await.map_err(io::Error::other)??;
        let mut files = Vec::new();
        for path in names {
            let bytes = self.put_file(&from.join(&path), &format!("{key}/{path}")).await?;
            files.push(ListedFile { path, bytes });
        }
        let list = serde_json::to_vec(&FolderList { files }).map_err(io::Error::other)?;
        self.store.put(&self.at(&format!("{key}/{LIST}")), list.into()).await?;
        Ok(())
    }

    /// The bytes written. Whatever is larger than a part goes in parts, several at a time.
    async fn put_file(&self, from: &FilePath, key: &str) -> Result<u64, BucketError> {
        let mut file = tokio::fs::File::open(from).await?;
        let (bytes, to) = (file.metadata().await?.len(), self.at(key));
        if bytes <= PART as u64 {
            let mut content = Vec::new();
            file.read_to_end(&mut content).await?;
            let written = content.len() as u64;
            self.store.put(&to, content.into()).await?;
            return Ok(written);
        }
        let mut parts = WriteMultipart::new_with_chunk_size(self.store.put_multipart(&to).await?, PART);
        let mut written = 0;
        loop {
            let mut chunk = BytesMut::with_capacity(1 << 20);
            let read = async {
                parts.wait_for_capacity(PARTS_AT_A_TIME).await?;
                Ok::<_, BucketError>(file.read_buf(&mut chunk).await?)
            };
            match read.await {
                Ok(0) => break,
                Ok(read) => written += read as u64,
                Err(error) => {
                    // What stays of it, the bucket's own rules for unfinished uploads remove.
                    let _ = parts.abort().await;
                    return Err(error);
                }
            }
            parts.put(chunk.freeze());
        }
        parts.finish().await?;
        Ok(written)
    }

    /// The bytes of a small object; `None` where there is none.
    pub async fn read(&self, key: &str) -> Result<Option<Vec<u8>>, BucketError> {
        match self.store.get(&self.at(key)).await {
            Ok(found) => Ok(Some(found.bytes().await?.to_vec())),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub async fn write(&self, key: &str, content: &[u8]) -> Result<(), BucketError> {
        self.store.put(&self.at(key), content.to_vec().into()).await?;
        Ok(())
    }

    /// Whether a file or a whole folder is at `key`.
    pub async fn contains(&self, key: &str) -> Result<bool, BucketError> {
        match self.store.head(&self.at(&first_object(key))).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Copies what is at `key` to the local path `to`, where nothing must be; of a folder, the files for which
    /// `wanted` holds. `false`: there is nothing at the key. After an error, part of it may be there.
    pub async fn get(&self, key: &str, to: &FilePath, wanted: impl Fn(&str) -> bool) -> Result<bool, BucketError> {
        if is_file(key) {
            return Ok(self.get_file(key, to).await?.is_some());
        }
        let Some(list) = self.read(&first_object(key)).await? else { return Ok(false) };
        let damaged = |what: String| BucketError::Damaged { key: key.to_owned(), what };
        let list: FolderList = serde_json::from_slice(&list).map_err(|error| damaged(error.to_string()))?;
        for file in list.files.iter().filter(|file| wanted(&file.path)) {
            if !super::plain(&file.path) {
                return Err(damaged(format!("it lists {:?}", file.path)));
            }
            let bytes = self.get_file(&format!("{key}/{}", file.path), &to.join(&file.path)).await?;
            if bytes != Some(file.bytes) {
                return Err(damaged(format!("{} has {bytes:?} bytes of {}", file.path, file.bytes)));
            }
        }
        Ok(true)
    }

    /// The bytes of the object, once they are in the file; `None`: there is no such object.
    async fn get_file(&self, key: &str, to: &FilePath) -> Result<Option<u64>, BucketError> {
        let found = match self.store.get(&self.at(key)).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if let Some(parent) = to.parent() {
            tokio::fs::create_dir_all(parent).await?;
        }
        let (mut file, mut bytes) = (tokio::fs::File::create_new(to).await?, 0);
        let mut chunks = found.into_stream();
        while let Some(chunk) = chunks.try_next().await? {
            bytes += chunk.len() as u64;
            file.write_all(&chunk).await?;
        }
        file.flush().await?;
        Ok(Some(bytes))
    }

    /// Removes what is at `key`; nothing there counts as removed.
    pub async fn remove(&self, key: &str) -> Result<(), BucketError> {
        match self.store.delete(&self.at(&first_object(key))).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if is_file(key) {
            return Ok(());
        }
        let objects = self.store.list(Some(&self.at(key))).map_ok(|object| object.location).boxed();
        let removed = self.store.delete_stream(objects);
        removed.try_for_each(|_| async { Ok(()) }).await.or_else(|error| match error {
            object_store::Error::NotFound { .. } => Ok(()),
            other => Err(other.into()),
        })
    }

    /// The keys of `depth` parts below a folder of keys, whole or not.
    pub async fn list(&self, below: &str, depth: usize) -> Result<Vec<Stored>, BucketError> {
        let skipped = self.prefix.parts().count();
        let now = std::time::SystemTime::now();
        let mut newest: BTreeMap<String, Duration> = BTreeMap::new();
        let mut objects = self.store.list(Some(&self.at(below)));
        while let Some(object) = objects.try_next().await? {
            let parts: Vec<String> =
                object.location.parts().skip(skipped).take(depth).map(|part| part.as_ref().to_owned()).collect();
            let age = now.duration_since(object.last_modified.into()).unwrap_or_default();
            newest.entry(parts.join("/")).and_modify(|known| *known = age.min(*known)).or_insert(age);
        }
        Ok(newest.into_iter().map(|(key, age)| Stored { key, age }).collect())
    }
}

/// Whether one object is at the key, rather than a folder of them.
fn is_file(key: &str) -> bool {
    ["files/", "parts/"].iter().any(|folder| key.starts_with(folder)) || key.ends_with(".log")
}

/// What is removed first, and written last.
fn first_object(key: &str) -> String {
    if is_file(key) { key.to_owned() } else { format!("{key}/{LIST}") }
}

/// The bucket's name, and the prefix below which everything lies.
fn parse(url: &str) -> Option<(&str, Path)> {
    let (name, prefix) = url.strip_prefix("s3://").map(|rest| rest.split_once('/').unwrap_or((rest, "")))?;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let prefix = Path::parse(prefix).ok()?;
    ((3..=63).contains(&name.len()) && name.chars().all(plain)).then_some((name, prefix))
}

/// Relative paths of all files below a folder, in order. Blocks.
fn files_below(folder: &FilePath) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().into_string().map_err(|name| io::Error::other(format!("{name:?} is not a name")))?;
        match entry.file_type()?.is_dir() {
            true => found.extend(files_below(&entry.path())?.into_iter().map(|below| format!("{name}/{below}"))),
            false => found.push(name),
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_s_url() {
        for (url, name, prefix) in [("s3://abc", "abc", ""), ("s3://a.b-c/", "a.b-c", ""), ("s3://abc/x/y/", "abc", "x/y")] {
            assert_eq!(parse(url), Some((name, Path::from(prefix))), "{url}");
        }
        for url in ["abc", "s3://", "s3:///x", "s3://ab", "s3://ABC", "http://abc", "s3://abc/../x"] {
            assert_eq!(parse(url), None, "{url}");
        }
    }
}
