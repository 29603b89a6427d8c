//! Where the cluster and its socket lie, and as whom it runs.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, geteuid},
};
use sha2::{Digest, Sha256};

use super::{PostgresError, doing};
use crate::datadir::{DataDir, Lock};

/// Where root's clusters lie whose user cannot reach the data directory.
pub const LIBRARY: &str = "/var/lib/lathe";

/// Bytes of a Unix socket's path, without the closing zero.
const SOCKET_PATH_LIMIT: usize = 107;

/// The name that PostgreSQL gives its socket.
const SOCKET: &str = ".s.PGSQL.5432";

/// The user whom root runs PostgreSQL as.
#[derive(Clone, Debug)]
pub struct User {
    pub uid: Uid,
    pub gid: Gid,
    name: String,
}

impl User {
    /// None unless this process is root.
    fn find() -> Result<Option<User>, PostgresError> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let known = ["postgres", "nobody"].iter().find_map(|name| nix::unistd::User::from_name(name).ok().flatten());
        known.map(|user| Some(User { uid: user.uid, gid: user.gid, name: user.name })).ok_or(PostgresError::NoUser)
    }

    /// Whether the permissions let this user pass through every folder above `path`.
    pub fn reaches(&self, path: &Path) -> bool {
        let open = |folder: &Path| {
            fs::metadata(folder).is_ok_and(|found| {
                let class = if found.uid() == self.uid.as_raw() {
                    0o100
                } else if found.gid() == self.gid.as_raw() {
                    0o010
                } else {
                    0o001
                };
                found.mode() & class != 0
            })
        };
        path.ancestors().skip(1).all(open)
    }
}

/// The folder of one cluster: `cluster`, `log`, `lock`, and mostly `run` with the socket.
#[derive(Debug)]
pub struct Home {
    folder: PathBuf,
    sockets: PathBuf,
    user: Option<User>,
    _lock: Lock,
}

impl Home {
    /// Finds the data directory's own, or makes it. The place is chosen once and written down in
    /// `postgres_folder`, so a change of permissions never leads to a second, empty database.
    pub fn find(data: &DataDir) -> Result<Home, PostgresError> {
        let user = User::find()?;
        let note = data.path().join("postgres_folder");
        let folder = match fs::read_to_string(&note) {
            // One inside is written relative to it, so that a copy of the directory has its own.
            Ok(text) => data.path().join(text.trim_end_matches('\n')),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let folder = choose(data.path(), user.as_ref());
                make_private(&folder, user.as_ref()).map_err(doing(format!("making {}", folder.display())))?;
                let named = folder.strip_prefix(data.path()).unwrap_or(&folder);
                fs::write(&note, format!("{}\n", named.display())).map_err(doing(format!("writing {}", note.display())))?;
                folder
            }
            Err(source) => return Err(doing(format!("reading {}", note.display()))(source)),
        };
        make_private(&folder, user.as_ref()).map_err(doing(format!("making {}", folder.display())))?;
        let lock = Lock::take(&folder)?;
        let sockets = socket_folder(&folder);
        make_private(&sockets, user.as_ref()).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory => PostgresError::ForeignSocketFolder(sockets.clone()),
            _ => doing(format!("making {}", sockets.display()))(error),
        })?;
        Ok(Home { folder, sockets, user, _lock: lock })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn cluster(&self) -> PathBuf {
        self.folder.join("cluster")
    }

    pub fn sockets(&self) -> &Path {
        &self.sockets
    }

    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    pub fn user(&self) -> Option<&User> {
        self.user.as_ref()
    }

    /// The major version of PostgreSQL that made the cluster; None before there is one.
    pub fn cluster_version(&self) -> Result<Option<u32>, PostgresError> {
        let file = self.cluster().join("PG_VERSION");
        match fs::read_to_string(&file) {
            Ok(text) => Ok(text.trim().parse().ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(doing(format!("reading {}", file.display()))(source)),
        }
    }

    /// Stops what an earlier server left behind on this cluster. The lock says that no server uses it
    /// now. A stale `postmaster.pid` is removed, since its number may since be another program's.
    pub async fn stop_orphans(&self) -> Result<(), PostgresError> {
        let cluster = self.cluster();
        let began = Instant::now();
        loop {
            let orphans = processes_in(&cluster);
            let Some(first) = orphans.first() else { break };
            let signal = match began.elapsed() {
                waited if waited < Duration::from_secs(5) => Signal::SIGINT,
                waited if waited < Duration::from_secs(7) => Signal::SIGQUIT,
                waited if waited < Duration::from_secs(10) => Signal::SIGKILL,
                _ => return Err(PostgresError::Orphan { cluster, pid: first.as_raw() }),
            };
            for orphan in &orphans {
                // One that has just ended is what is wanted.
                let _ = kill(*orphan, signal);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        match fs::remove_file(cluster.join("postmaster.pid")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(doing("removing a stale postmaster.pid")(error)),
            _ => Ok(()),
        }
    }
}

/// In the data directory, or, where root's other user cannot get there, below [`LIBRARY`].
fn choose(data: &Path, user: Option<&User>) -> PathBuf {
    let inside = data.join("postgres");
    match user {
        Some(user) if !user.reaches(&inside) => {
            let folder = Path::new(LIBRARY)
                .join(hex::encode(&Sha256::digest(format!("{}\0{}", data.display(), lathe_jobs::ids::secret()))[..8]));
            tracing::info!(user = user.name, folder = %folder.display(), "PostgreSQL does not run as root, and its user cannot reach the data directory: the database is kept here");
            folder
        }
        _ => inside,
    }
}

/// Inside `folder` where the socket's path is short enough, else below the folder for such things.
fn socket_folder(folder: &Path) -> PathBuf {
    let inside = folder.join("run");
    if inside.as_os_str().len() + 1 + SOCKET.len() <= SOCKET_PATH_LIMIT {
        return inside;
    }
    let name = format!("lathe-{}-{}", geteuid(), hex::encode(&Sha256::digest(folder.as_os_str().as_encoded_bytes())[..6]));
    let runtime = std::env::var_os("XDG_RUNTIME_DIR")
        .filter(|value| !value.is_empty() && !geteuid().is_root())
        .map(|value| PathBuf::from(value).join(&name));
    runtime
        .filter(|path| path.as_os_str().len() + 1 + SOCKET.len() <= SOCKET_PATH_LIMIT)
        .unwrap_or_else(|| Path::new("/tmp").join(name))
}

/// A folder that `user`, or else this process's own user, has to itself.
fn make_private(folder: &Path, user: Option<&User>) -> io::Result<()> {
    if let Some(parent) = folder.parent().filter(|parent| !parent.exists()) {
        fs::create_dir_all(parent)?;
        if parent == Path::new(LIBRARY) {
            fs::set_permissions(parent, fs::Permissions::from_mode(0o711))?;
        }
    }
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    // Of the entry itself: a link that someone else put there is not followed.
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let owner = user.map_or_else(geteuid, |user| user.uid);
    if found.uid() != owner.as_raw() {
        if !geteuid().is_root() || found.uid() != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        chown(folder, Some(owner.as_raw()), user.map(|user| user.gid.as_raw()))?;
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
}

/// Processes of a PostgreSQL server that work in `folder`, as all of one server's do in its cluster.
/// Where there is no `/proc`, the one that `postmaster.pid` names.
fn processes_in(folder: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        let text = fs::read_to_string(folder.join("postmaster.pid")).unwrap_or_default();
        let named = text.lines().next().and_then(|line| line.trim().parse().ok()).map(Pid::from_raw);
        return named.into_iter().filter(|pid| kill(*pid, None).is_ok()).collect();
    };
    let ours = |process: &Path| {
        let program = fs::read_link(process.join("exe")).unwrap_or_default();
        let named_postgres = program.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"postgres"));
        named_postgres && fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == folder)
    };
    let numbered = entries.flatten().filter_map(|entry| Some((entry.path(), entry.file_name().to_str()?.parse::<i32>().ok()?)));
    numbered.filter(|(process, _)| ours(process)).map(|(_, pid)| Pid::from_raw(pid)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_path_moves_the_socket_to_a_short_one() {
        assert_eq!(socket_folder(Path::new("/srv/lathe/postgres")), Path::new("/srv/lathe/postgres/run"));
        let long = PathBuf::from(format!("/{}", "x".repeat(120)));
        let moved = socket_folder(&long);
        assert!(moved.as_os_str().len() + 1 + SOCKET.len() <= SOCKET_PATH_LIMIT, "{}", moved.display());
        assert_ne!(moved, socket_folder(&long.join("other")));
    }

    #[test]
    fn a_private_folder_is_private_and_a_link_in_its_place_is_refused() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let folder = root.path().join("run");
        make_private(&folder, None).expect("it is made");
        make_private(&folder, None).expect("and found again");
        assert_eq!(fs::metadata(&folder).expect("it is there").mode() & 0o777, 0o700);
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&folder, &link).expect("a link");
        assert!(make_private(&link, None).is_err());
    }
}
