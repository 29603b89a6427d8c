//! The data directory: the embedded database, the artifacts, the first key, the logs.
//!
//! It belongs to one server at a time, which holds the lock for life; what is in it is its owner's
//! alone. As root, the folder itself can be passed through (0711), so that the database's own user
//! reaches its files; what it holds stays closed.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use crate::auth;

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("another server{} uses the data directory {}; stop it, or choose another directory with --data-dir", pid(.holder), .path.display())]
    InUse { path: PathBuf, holder: String },
    #[error("the data directory {} cannot be used: {source}", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the key in {} is empty; delete the file to have one made", .0.display())]
    EmptyKey(PathBuf),
}

fn pid(holder: &str) -> String {
    match holder.trim() {
        "" => String::new(),
        pid => format!(" (process {pid})"),
    }
}

/// A folder that no other process uses, while this lives.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held for its drop")] Flock<File>);

impl Lock {
    /// Takes the lock of `folder` or says who holds it.
    pub fn take(folder: &Path) -> Result<Lock, DataDirError> {
        let path = folder.join("lock");
        let failed = |source| DataDirError::Io { path: folder.to_owned(), source };
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut held) => {
                held.set_len(0).and_then(|()| writeln!(held, "{}", std::process::id())).map_err(failed)?;
                Ok(Lock(held))
            }
            Err((mut file, nix::Error::EWOULDBLOCK)) => {
                let mut holder = String::new();
                // Without its id the sentence is still true.
                let _ = file.read_to_string(&mut holder);
                Err(DataDirError::InUse { path: folder.to_owned(), holder })
            }
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: Lock,
}

/// The first admin key.
#[derive(Debug)]
pub struct BootstrapKey {
    pub secret: String,
    /// It was made just now, and has not been shown yet.
    pub made: bool,
}

impl DataDir {
    /// Makes the folder if it is not there, and takes its lock.
    pub fn open(path: &Path) -> Result<DataDir, DataDirError> {
        let failed = |source| DataDirError::Io { path: path.to_owned(), source };
        let mode = if nix::unistd::geteuid().is_root() { 0o711 } else { 0o700 };
        if !path.exists() {
            // Parents get the usual mode, the folder itself its own.
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(failed)?;
            }
            match fs::DirBuilder::new().mode(mode).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                _ => fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?,
            }
        }
        let path = path.canonicalize().map_err(failed)?;
        let lock = Lock::take(&path)?;
        Ok(DataDir { path, _lock: lock })
    }

    /// Absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where [`DataDir::announce_database`] writes: the address of the embedded database.
    pub fn database_file(path: &Path) -> PathBuf {
        path.join("database_url")
    }

    /// Lets `lathe key` and `lathe migrate` find the running database.
    pub fn announce_database(&self, url: &str) -> Result<(), DataDirError> {
        self.write_private(&DataDir::database_file(&self.path), url)
    }

    /// The key that was given, else the one in `api_key`, which is made at first.
    pub fn bootstrap_key(&self, given: Option<&str>) -> Result<BootstrapKey, DataDirError> {
        if let Some(secret) = given {
            return Ok(BootstrapKey { secret: secret.to_owned(), made: false });
        }
        let file = self.key_file();
        match fs::read_to_string(&file) {
            Ok(text) if text.trim().is_empty() => Err(DataDirError::EmptyKey(file)),
            Ok(text) => Ok(BootstrapKey { secret: text.trim().to_owned(), made: false }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let secret = auth::new_secret();
                self.write_private(&file, &secret)?;
                Ok(BootstrapKey { secret, made: true })
            }
            Err(source) => Err(DataDirError::Io { path: file, source }),
        }
    }

    pub fn key_file(&self) -> PathBuf {
        self.path.join("api_key")
    }

    /// Whole or not at all, and never readable by others, not for a moment.
    fn write_private(&self, file: &Path, text: &str) -> Result<(), DataDirError> {
        let staged = file.with_extension("new");
        let written = (|| {
            let mut to = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&staged)?;
            writeln!(to, "{text}")?;
            to.sync_all()?;
            fs::rename(&staged, file)
        })();
        written.map_err(|source| DataDirError::Io { path: file.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("it is there").permissions().mode() & 0o777
    }

    #[test]
    fn a_second_server_is_refused_with_the_folder_and_the_first_ones_id() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let path = root.path().join("data");
        let first = DataDir::open(&path).expect("it is free");
        let refused = DataDir::open(&path).expect_err("it is taken").to_string();
        assert!(refused.contains(&first.path().display().to_string()), "{refused}");
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(first);
        DataDir::open(&path).expect("it is free again");
    }

    #[test]
    fn the_key_is_made_once_and_only_its_owner_reads_it() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let data = DataDir::open(&root.path().join("data")).expect("it is free");
        let made = data.bootstrap_key(None).expect("it is made");
        let again = data.bootstrap_key(None).expect("it is read");
        assert!(made.made && !again.made);
        assert_eq!(made.secret, again.secret);
        assert!(made.secret.starts_with("sk-lathe-") && made.secret.len() == 9 + 43, "{}", made.secret);
        assert_eq!(mode(&data.key_file()), 0o600);
        assert_eq!(mode(data.path()) & 0o066, 0, "others neither read nor write");
        assert_eq!(data.bootstrap_key(Some("given")).expect("it is given").secret, "given");
    }
}
