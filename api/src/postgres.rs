//! The embedded database: a PostgreSQL server that is a child of `lathe serve`.
//!
//! Listens on a Unix socket in a folder that is its user's alone, never on the network. Its durable
//! settings are left as they are. Made once, whole or not at all; one left behind by a killed server
//! is stopped before the next start, never shared. PostgreSQL refuses to run as root, so root starts
//! it as another user.

mod binaries;
mod home;

use std::{
    fs::{File, OpenOptions},
    io,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use sqlx::{Connection, PgConnection};
use tokio::process::{Child, Command};

use self::{
    binaries::Binaries,
    home::{Home, User},
};
use crate::{
    children::{self, Spawner},
    datadir::{DataDir, DataDirError},
};

/// The log is begun anew at a start that finds it larger.
const LOG_LIMIT: u64 = 16 << 20;

/// Recovery after a crash replays at most a few hundred megabytes.
const START_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    #[error(
        "no PostgreSQL of version 15 or newer was found in LATHE_POSTGRES_BIN, PATH, /usr/lib/postgresql or {}; \
         run `make setup`, install one, or set DATABASE_URL", .0.display()
    )]
    NotFound(PathBuf),
    #[error(
        "the database in {} was made by PostgreSQL {made_by}, and only version {found} was found; install PostgreSQL \
         {made_by}, or move the data as docs/operations.md says", .cluster.display()
    )]
    OtherVersion { cluster: PathBuf, made_by: u32, found: String },
    #[error("PostgreSQL does not run as root, and there is neither a user `postgres` nor `nobody` to run it as; add one")]
    NoUser,
    #[error("{}: the database could not be made: {said}", .cluster.display())]
    InitFailed { cluster: PathBuf, said: String },
    #[error("the database ended at its start; {} says why:\n{tail}", .log.display())]
    StartFailed { log: PathBuf, tail: String },
    #[error("the folder {} for the database's socket belongs to another user; remove it", .0.display())]
    ForeignSocketFolder(PathBuf),
    #[error("a database server that an earlier server left behind in {} does not stop; end process {pid}", .cluster.display())]
    Orphan { cluster: PathBuf, pid: i32 },
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    DataDir(#[from] DataDirError),
}

/// Attaches what was being done to an error of the system.
fn doing(what: impl Into<String>) -> impl FnOnce(io::Error) -> PostgresError {
    let what = what.into();
    move |source| PostgresError::Io { what, source }
}

/// A cluster that is ready to be started, over and over.
pub struct Postgres {
    home: Home,
    binaries: Binaries,
    spawner: Spawner,
}

impl Postgres {
    /// Finds the binaries and the cluster, which is made if it is not there, and stops an orphan.
    pub async fn prepare(data: &DataDir, spawner: Spawner) -> Result<Postgres, PostgresError> {
        let home = Home::find(data)?;
        let binaries = Binaries::find(home.cluster_version()?, &home)?;
        let postgres = Postgres { home, binaries, spawner };
        postgres.home.stop_orphans().await?;
        if postgres.home.cluster_version()?.is_none() {
            postgres.init().await?;
        }
        Ok(postgres)
    }

    /// How to reach it: `postgres://` with the socket's folder.
    pub fn url(&self) -> String {
        let folder: String = self.home.sockets().display().to_string().bytes().map(percent_encoded).collect();
        format!("postgres://lathe@localhost/postgres?host={folder}")
    }

    /// `initdb` into a folder beside the final one, renamed when it is whole.
    async fn init(&self) -> Result<(), PostgresError> {
        let (cluster, staged) = (self.home.cluster(), self.home.folder().join("cluster.new"));
        let mut said = String::new();
        // C.UTF-8 is not known everywhere; both sort by bytes.
        for locale in ["C.UTF-8", "C"] {
            if staged.exists() {
                std::fs::remove_dir_all(&staged).map_err(doing(format!("removing {}", staged.display())))?;
            }
            let mut command = self.command("initdb");
            command.args(["--username=lathe", "--encoding=UTF8", "--auth-local=trust", "--auth-host=reject"]);
            command.arg(format!("--locale={locale}")).arg("--pgdata").arg(&staged);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let child = self.spawner.spawn(command, Signal::SIGKILL).await.map_err(doing("starting initdb"))?;
            let output = child.wait_with_output().await.map_err(doing("waiting for initdb"))?;
            if output.status.success() {
                return std::fs::rename(&staged, &cluster).map_err(doing(format!("naming {}", cluster.display())));
            }
            said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        }
        Err(PostgresError::InitFailed { cluster, said })
    }

    /// Starts the server and waits until it answers.
    pub async fn start(&self) -> Result<Child, PostgresError> {
        self.home.stop_orphans().await?;
        let log = self.home.log();
        let began = File::open(&log).and_then(|file| file.metadata()).map_or(0, |metadata| metadata.len());
        let file = self.open_log(began).map_err(doing(format!("opening {}", log.display())))?;
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.home.cluster());
        for (name, value) in self.settings() {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let mut child = self.spawner.spawn(command, Signal::SIGINT).await.map_err(doing("starting postgres"))?;
        let (url, since) = (self.url(), Instant::now());
        loop {
            if let Some(_ended) = child.try_wait().map_err(doing("waiting for postgres"))? {
                let text = std::fs::read(&log).unwrap_or_default();
                let lines = String::from_utf8_lossy(&text).lines().rev().take(5).map(str::to_owned).collect::<Vec<_>>();
                return Err(PostgresError::StartFailed { log, tail: lines.into_iter().rev().collect::<Vec<_>>().join("\n") });
            }
            if let Ok(conn) = PgConnection::connect(&url).await {
                // The answer was all that was wanted.
                let _ = conn.close().await;
                return Ok(child);
            }
            if since.elapsed() > START_LIMIT {
                let _ = Postgres::stop(&mut child, Duration::from_secs(1)).await;
                return Err(PostgresError::StartFailed { log, tail: "it did not answer in two minutes".to_owned() });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Fast shutdown: open transactions are rolled back, everything is written. After `grace` the
    /// server is told to drop everything, which costs the next start a recovery and nothing else.
    pub async fn stop(child: &mut Child, grace: Duration) -> io::Result<()> {
        if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            // No such process: it has just ended.
            let _ = nix::sys::signal::kill(pid, Signal::SIGINT);
            if tokio::time::timeout(grace, child.wait()).await.is_ok() {
                return Ok(());
            }
        }
        children::stop(child, Signal::SIGQUIT, Duration::from_millis(500)).await.map(drop)
    }

    fn settings(&self) -> [(&'static str, String); 6] {
        let folder = self.home.sockets().display().to_string().replace('"', "\"\"");
        [
            ("listen_addresses", String::new()),
            ("unix_socket_directories", format!("\"{folder}\"")),
            ("unix_socket_permissions", "0600".to_owned()),
            ("max_connections", "200".to_owned()),
            ("shared_buffers", "64MB".to_owned()),
            ("log_line_prefix", "%m [%p] ".to_owned()),
        ]
    }

    fn open_log(&self, size: u64) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.create(true);
        match size > LOG_LIMIT {
            true => options.write(true).truncate(true),
            false => options.append(true),
        };
        options.open(self.home.log())
    }

    /// A program of PostgreSQL, as the right user and without the client's own settings.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.binaries.folder.join(program));
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        // Messages in one language; the current folder may be closed to the user.
        command.env("LC_MESSAGES", "C").current_dir(self.home.folder());
        // What the server has no use for, it is not told.
        for secret in ["LATHE_API_KEY", "LATHE_METRICS_TOKEN", "DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"] {
            command.env_remove(secret);
        }
        if let Some(User { uid, gid, .. }) = self.home.user() {
            command.uid(uid.as_raw()).gid(gid.as_raw());
        }
        command
    }
}

fn percent_encoded(byte: u8) -> String {
    match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    }
}
