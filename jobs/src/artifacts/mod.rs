//! The artifact store: files and folders under keys, each there as a whole or not at all.
//!
//! A local folder that every process of an installation sees, or a [`Bucket`] that all of them reach, of
//! which each machine's folder is then a working copy. Content is written under `tmp/` or `staging/` in the
//! same file system, synced, copied to the bucket, and renamed to its key, so a reader never meets half an
//! artifact and a crash leaves only what housekeeping sweeps. Keys are `files/<id>`, `parts/<id>`,
//! `datasets/<id>/<attempt>`, `tokenizers/<id>/<attempt>`, `models/<id>/<attempt>` and
//! `checkpoints/<job>/<attempt>/<step>`; what is at a key never changes, and a key never leaves the root.

pub mod bucket;
mod logs;
mod upload;

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use self::bucket::{Bucket, BucketError};
pub use self::{
    logs::Log,
    upload::{Upload, Written},
};
use crate::{ids, publish, waiting};

#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    #[error("{0:?} is not a key of the artifact store")]
    BadKey(String),
    #[error("artifact {key}: {source}")]
    Io {
        key: String,
        #[source]
        source: io::Error,
    },
    #[error("{free} bytes of the disk are free, and {reserve} are kept free")]
    Full { free: u64, reserve: u64 },
    #[error("artifact {key}: {source}")]
    Bucket {
        key: String,
        #[source]
        source: BucketError,
    },
}

impl ArtifactError {
    /// The file system has no room left.
    pub fn is_disk_full(&self) -> bool {
        match self {
            ArtifactError::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            ArtifactError::Full { .. } => true,
            ArtifactError::Bucket { source: BucketError::Io(source), .. } => source.kind() == io::ErrorKind::StorageFull,
            ArtifactError::BadKey(_) | ArtifactError::Bucket { .. } => false,
        }
    }

    /// The bucket does not answer; the same may succeed later.
    pub fn is_away(&self) -> bool {
        matches!(self, ArtifactError::Bucket { source: BucketError::Away(_), .. })
    }
}

/// What befell an artifact in the bucket.
pub(crate) fn in_bucket(key: &str) -> impl FnOnce(BucketError) -> ArtifactError {
    move |source| ArtifactError::Bucket { key: key.to_owned(), source }
}

/// Token shards, shared by all jobs of a store and named by their content.
pub const SHARDS: &str = "cache/shards";

/// Single files of folders that lie in a bucket.
pub(crate) const EXCERPTS: &str = "cache/excerpts";

#[derive(Clone, Debug)]
pub struct Artifacts {
    root: Arc<Path>,
    reserve_bytes: u64,
    bucket: Option<Bucket>,
}

impl Artifacts {
    /// Opens the store at `root`, making the folder if it is not there.
    pub fn open(root: impl AsRef<Path>) -> Result<Artifacts, ArtifactError> {
        let root = root.as_ref();
        let opened = (|| {
            for folder in ["tmp", "staging", "logs"] {
                fs::create_dir_all(root.join(folder))?;
            }
            root.canonicalize()
        })();
        let root = opened.map_err(|source| ArtifactError::Io { key: root.display().to_string(), source })?;
        Ok(Artifacts { root: root.into(), reserve_bytes: 0, bucket: None })
    }

    /// Uploads leave this much of the disk free, so that running jobs can still save.
    pub fn with_reserve(self, reserve_bytes: u64) -> Artifacts {
        Artifacts { reserve_bytes, ..self }
    }

    /// What is published lies in this bucket too.
    pub fn with_bucket(self, bucket: Option<Bucket>) -> Artifacts {
        Artifacts { bucket, ..self }
    }

    pub(crate) fn bucket(&self) -> Option<&Bucket> {
        self.bucket.as_ref()
    }

    /// The store's name in a sentence.
    pub fn described(&self) -> String {
        match &self.bucket {
            Some(bucket) => format!("the artifact store {bucket}"),
            None => format!("the artifact folder {}", self.root.display()),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the content of `key` lies on this machine, whether or not it is there. A key that is not made of plain
    /// names stays inside the root all the same: it points at a name that is never written.
    pub fn path(&self, key: &str) -> PathBuf {
        match plain(key) {
            true => self.root.join(key),
            false => self.root.join("tmp").join("not-a-key"),
        }
    }

    /// The scratch folder of one attempt; on the same file system, so that publishing is a rename.
    pub fn staging(&self, job_id: &str, attempt: i32) -> PathBuf {
        self.path(&format!("staging/{job_id}/{attempt}"))
    }

    /// Writes a staged file or folder through to disk, and to the bucket where there is one: its publication
    /// at `key` is then only a rename. Repeated after it was published, it does nothing.
    pub async fn persist(&self, staged: &Path, key: &str) -> Result<(), ArtifactError> {
        let (path, published) = (staged.to_owned(), self.path(key));
        let synced = waiting::blocking(move || match !path.exists() && published.exists() {
            true => Ok(false),
            false => sync_tree(&path).map(|()| true),
        });
        let synced = synced.await.map_err(io::Error::other).flatten();
        match (synced.map_err(|source| ArtifactError::Io { key: key.to_owned(), source })?, &self.bucket) {
            (true, Some(bucket)) => bucket.put(staged, key).await.map_err(in_bucket(key)),
            _ => Ok(()),
        }
    }

    /// The path of what is at `key`, which is copied from the bucket where this machine lacks it; `None` where
    /// the store has no such artifact.
    pub async fn fetch(&self, key: &str) -> Result<Option<PathBuf>, ArtifactError> {
        let path = self.path(key);
        let (looked_at, touched) = (path.clone(), self.bucket.is_some());
        let there = publish::blocking(move || {
            // Housekeeping removes copies by when they were last asked for.
            Ok(looked_at.exists() && (!touched || fs::File::open(&looked_at).and_then(|copy| touch(&copy)).is_ok()))
        });
        if there.await? {
            return Ok(Some(path));
        }
        self.copy(key, key, |_| true).await
    }

    /// A folder in which these files of the folder at `key` are, as far as it has them: its own, or another in
    /// which they alone were copied from the bucket.
    pub async fn fetch_files(&self, key: &str, names: &[&str]) -> Result<Option<PathBuf>, ArtifactError> {
        let excerpt = format!("{EXCERPTS}/{key}");
        let whole = self.path(key);
        for path in [whole, self.path(&excerpt)] {
            if tokio::fs::try_exists(&path).await.unwrap_or_default() {
                return Ok(Some(path));
            }
        }
        self.copy(key, &excerpt, |name| names.contains(&name)).await
    }

    /// The wanted files of what the bucket has at `key`, at `local`.
    async fn copy(&self, key: &str, local: &str, wanted: impl Fn(&str) -> bool) -> Result<Option<PathBuf>, ArtifactError> {
        let Some(bucket) = self.bucket.as_ref().filter(|_| plain(key)) else { return Ok(None) };
        let staged = self.root.join("tmp").join(ids::new("copy"));
        let copied = bucket.get(key, &staged, wanted).await.map_err(in_bucket(key));
        let (artifacts, local) = (self.clone(), local.to_owned());
        publish::blocking(move || {
            let path = artifacts.path(&local);
            let placed = match copied {
                Ok(false) => Ok(None),
                // Another task of this machine may have been faster; what is at a key is the same for all.
                Ok(true) => artifacts
                    .publish(&local, |to| fs::rename(&staged, to))
                    .or_else(|error| match path.exists() {
                        true => Ok(()),
                        false => Err(error),
                    })
                    .map(|()| Some(path)),
                Err(error) => Err(error),
            };
            let _ = fs::remove_dir_all(&staged).or_else(|_| fs::remove_file(&staged));
            placed
        })
        .await
    }

    /// A small file of the store itself; `None` where there is none.
    pub async fn read_small(&self, key: &str) -> Result<Option<Vec<u8>>, ArtifactError> {
        if let Some(bucket) = &self.bucket {
            return bucket.read(key).await.map_err(in_bucket(key));
        }
        match tokio::fs::read(self.path(key)).await {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ArtifactError::Io { key: key.to_owned(), source }),
        }
    }

    /// Replaces a small file of the store itself, whole or not at all.
    pub async fn write_small(&self, key: &str, content: &[u8]) -> Result<(), ArtifactError> {
        if let Some(bucket) = &self.bucket {
            return bucket.write(key, content).await.map_err(in_bucket(key));
        }
        let mut file = self.create(key).await?;
        file.write(content).await?;
        file.finish().await.map(drop)
    }

    /// Whether the store has an artifact.
    pub async fn contains(&self, key: &str) -> Result<bool, ArtifactError> {
        match &self.bucket {
            Some(bucket) => bucket.contains(key).await.map_err(in_bucket(key)),
            None => Ok(tokio::fs::try_exists(self.path(key)).await.unwrap_or_default()),
        }
    }

    /// Whether the store lacks a file, without asking a bucket, which may have it whatever lies here.
    pub async fn is_missing_here(&self, key: &str) -> bool {
        self.bucket.is_none() && !tokio::fs::try_exists(self.path(key)).await.unwrap_or_default()
    }

    /// Removes artifacts from the store and from this machine; the first failure ends it.
    pub async fn remove_all(&self, keys: Vec<String>) -> Result<(), ArtifactError> {
        if let Some(bucket) = &self.bucket {
            for key in keys.iter().filter(|key| plain(key)) {
                bucket.remove(key).await.map_err(in_bucket(key))?;
            }
        }
        let artifacts = self.clone();
        publish::blocking(move || keys.iter().try_for_each(|key| artifacts.remove(key))).await
    }

    /// Moves a persisted file to `key`, replacing what is there. Blocks.
    fn put_file(&self, from: &Path, key: &str) -> Result<(), ArtifactError> {
        self.publish(key, |to| {
            touch(&fs::File::open(from)?)?;
            fs::rename(from, to)
        })
    }

    /// Moves a folder of the same file system to `key`, replacing what is there; repeated after it
    /// has moved, it does nothing. Blocks.
    pub fn put_folder(&self, from: &Path, key: &str) -> Result<(), ArtifactError> {
        self.publish(key, |to| {
            if !from.exists() && to.exists() {
                return Ok(());
            }
            touch(&fs::File::open(from)?)?;
            sync_tree(from)?;
            if !to.exists() {
                return fs::rename(from, to);
            }
            let replaced = self.root.join("tmp").join(ids::new("replaced"));
            fs::rename(to, &replaced)?;
            fs::rename(from, to)?;
            fs::remove_dir_all(replaced)
        })
    }

    /// Removes a file or folder from this machine; one that is not there counts as removed. A folder is first
    /// renamed away, so no reader sees it half removed. Blocks.
    pub fn remove(&self, key: &str) -> Result<(), ArtifactError> {
        if !plain(key) {
            return Err(ArtifactError::BadKey(key.to_owned()));
        }
        let removed = (|| {
            let path = self.root.join(key);
            match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
                Ok(metadata) if metadata.is_dir() => {
                    let doomed = self.root.join("tmp").join(ids::new("removed"));
                    fs::rename(&path, &doomed)?;
                    fs::remove_dir_all(doomed)
                }
                Ok(_) => fs::remove_file(&path),
            }
        })();
        self.remove_empty_parents(key);
        removed.map_err(|source| ArtifactError::Io { key: key.to_owned(), source })
    }

    /// Bytes free to this process, and bytes in all, on the store's file system. Blocks.
    pub fn disk(&self) -> io::Result<(u64, u64)> {
        let found = nix::sys::statvfs::statvfs(self.root())?;
        let size = found.fragment_size();
        Ok((found.blocks_available().saturating_mul(size), found.blocks().saturating_mul(size)))
    }

    /// Folders between the root's own and a removed key; one that something else is in stays.
    fn remove_empty_parents(&self, key: &str) {
        for parent in Path::new(key).ancestors().skip(1).filter(|parent| parent.components().count() > 1) {
            if fs::remove_dir(self.root.join(parent)).is_err() {
                return;
            }
        }
    }

    /// Bytes in all files below `key`. Blocks.
    pub fn size(&self, key: &str) -> Result<u64, ArtifactError> {
        tree_size(&self.path(key)).map_err(|source| ArtifactError::Io { key: key.to_owned(), source })
    }

    fn publish(&self, key: &str, rename: impl Fn(&Path) -> io::Result<()>) -> Result<(), ArtifactError> {
        if !plain(key) {
            return Err(ArtifactError::BadKey(key.to_owned()));
        }
        let to = self.root.join(key);
        let published = (|| {
            let parent = to.parent().unwrap_or(&self.root);
            fs::create_dir_all(parent)?;
            match rename(&to) {
                // Somebody removed the parent, empty as it was, between the two.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !parent.exists() => {
                    fs::create_dir_all(parent)?;
                    rename(&to)?;
                }
                renamed => renamed?,
            }
            fs::File::open(parent)?.sync_all()
        })();
        published.map_err(|source| ArtifactError::Io { key: key.to_owned(), source })
    }
}

/// Marks as new what may have waited long for its publication, so that no sweep takes it for a leftover.
fn touch(entry: &fs::File) -> io::Result<()> {
    entry.set_modified(std::time::SystemTime::now())
}

/// Whether a key is a relative path of plain names.
fn plain(key: &str) -> bool {
    !key.is_empty() && Path::new(key).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Syncs a file, or a folder with every file and folder below it, to disk. Blocks.
fn sync_tree(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_tree(&entry?.path())?;
        }
    }
    fs::File::open(path)?.sync_all()
}

fn tree_size(path: &Path) -> io::Result<u64> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    fs::read_dir(path)?.try_fold(0, |sum, entry| Ok(sum + tree_size(&entry?.path())?))
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn store() -> (tempfile::TempDir, Artifacts) {
        let root = tempfile::tempdir().expect("a temporary folder");
        let artifacts = Artifacts::open(root.path()).expect("it is writable");
        (root, artifacts)
    }

    fn left_in_tmp(artifacts: &Artifacts) -> usize {
        fs::read_dir(artifacts.root().join("tmp")).expect("it is there").count()
    }

    #[tokio::test]
    async fn a_file_is_there_once_finished_and_never_before() {
        let (_root, artifacts) = store();
        let mut upload = artifacts.create("files/a").await.expect("a plain key");
        upload.write(b"hello ").await.expect("there is room");
        upload.write(b"world").await.expect("there is room");
        assert!(!artifacts.path("files/a").exists());
        let written = upload.finish().await.expect("it is published");
        assert_eq!(written, Written { bytes: 11, sha256: hex::encode(Sha256::digest(b"hello world")) });
        assert_eq!(fs::read(artifacts.path("files/a")).expect("it is there"), b"hello world");
        assert_eq!(left_in_tmp(&artifacts), 0);
    }

    #[tokio::test]
    async fn a_dropped_upload_leaves_nothing() {
        let (_root, artifacts) = store();
        let mut upload = artifacts.create("files/a").await.expect("a plain key");
        upload.write(b"half").await.expect("there is room");
        drop(upload);
        assert!(!artifacts.path("files/a").exists());
        assert_eq!(left_in_tmp(&artifacts), 0);
    }

    #[tokio::test]
    async fn the_reserve_is_refused_to_uploads() {
        let (_root, artifacts) = store();
        let bounded = artifacts.clone().with_reserve(u64::MAX);
        let refused = bounded.create("files/a").await.err().expect("nothing is free above the reserve");
        assert!(refused.is_disk_full(), "{refused}");
        assert_eq!(left_in_tmp(&artifacts), 0);
    }

    #[test]
    fn a_folder_is_published_whole_and_replaced_whole() {
        let (_root, artifacts) = store();
        for content in ["first", "second"] {
            let staged = artifacts.staging("job_1", 1).join("model");
            fs::create_dir_all(&staged).expect("staging is writable");
            fs::write(staged.join("weights"), content).expect("staging is writable");
            artifacts.put_folder(&staged, "models/m").expect("it is published");
            assert!(!staged.exists());
            artifacts.put_folder(&staged, "models/m").expect("repeating it does nothing");
        }
        assert_eq!(fs::read_to_string(artifacts.path("models/m/weights")).expect("it is there"), "second");
        assert_eq!(artifacts.size("models/m").expect("it is there"), 6);
        artifacts.remove("models/m").expect("it is removed");
        artifacts.remove("models/m").expect("removing twice is removing");
        assert!(!artifacts.path("models/m").exists());
        assert_eq!(left_in_tmp(&artifacts), 0);
    }

    #[test]
    fn no_key_leaves_the_root() {
        let (_root, artifacts) = store();
        for key in ["../x", "/etc/passwd", "", "files/../../x"] {
            assert!(artifacts.path(key).starts_with(artifacts.root()), "{key}");
            assert!(matches!(artifacts.remove(key), Err(ArtifactError::BadKey(_))), "{key}");
        }
    }
}
