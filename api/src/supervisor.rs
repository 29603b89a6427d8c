//! `lathe serve`: keeps PostgreSQL, the api and the runners alive on one machine.
//!
//! Starts them in order, restarts each when it dies, and stops them in reverse within ten seconds:
//! api and runners first, so that running jobs are checkpointed and released while the database is
//! there. Holds the data directory's lock and the listening socket for life; killed itself, it takes
//! its children along. Does no work of its own.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::{AsRawFd, FromRawFd, RawFd},
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use sqlx::{Connection, PgConnection};
use tokio::{process::Command, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    children::{self, Spawner},
    config::{ApiOptions, DatabaseArgs, LISTEN_FD, LogOptions, ServeArgs},
    datadir::{BootstrapKey, DataDir, DataDirError},
    health_check::reachable,
    migrate::{self, SchemaError},
    postgres::{Postgres, PostgresError},
};

/// What the runner gets to save its jobs.
const RUNNER_GRACE: Duration = Duration::from_millis(8_200);
const API_GRACE: Duration = Duration::from_secs(6);
const POSTGRES_GRACE: Duration = Duration::from_secs(1);

/// The pause before a restart: doubled each time, reset by a life longer than [`HEALTHY`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const HEALTHY: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    #[error(transparent)]
    Schema(#[from] SchemaError),
    #[error("port {} of {} is in use by another program; stop it, or choose another with --listen", .0.port(), .0.ip())]
    PortInUse(SocketAddr),
    #[error("cannot listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the database cannot be reached: {0}")]
    Connect(#[source] sqlx::Error),
    #[error("a process cannot be started: {0}")]
    Spawn(#[from] io::Error),
}

/// A database that can be used, with whatever keeps it running.
pub struct Database {
    pub url: String,
    embedded: Option<Embedded>,
}

struct Embedded {
    keeper: JoinHandle<()>,
    stop: CancellationToken,
    /// Held until the server has stopped; none where another server runs it.
    _data: Option<Arc<DataDir>>,
}

impl Database {
    /// The database of one's own, else the embedded one: a running server's, or started for the
    /// moment. For `lathe key` and `lathe migrate`.
    pub async fn attach(args: &DatabaseArgs) -> Result<Database, ServeError> {
        if let Some(url) = &args.database_url {
            return Ok(Database { url: url.clone(), embedded: None });
        }
        match DataDir::open(&args.data_dir) {
            Ok(data) => Database::embedded(Arc::new(data), &Spawner::start()?).await,
            Err(in_use @ DataDirError::InUse { .. }) => match std::fs::read_to_string(DataDir::database_file(&args.data_dir)) {
                Ok(url) => Ok(Database { url: url.trim().to_owned(), embedded: None }),
                Err(_) => Err(in_use.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    async fn embedded(data: Arc<DataDir>, spawner: &Spawner) -> Result<Database, ServeError> {
        let postgres = Postgres::prepare(&data, spawner.clone()).await?;
        let (url, stop) = (postgres.url(), CancellationToken::new());
        let first = postgres.start().await?;
        data.announce_database(&url)?;
        let keeper = tokio::spawn(keep_postgres(postgres, first, stop.clone()));
        Ok(Database { url, embedded: Some(Embedded { keeper, stop, _data: Some(data) }) })
    }

    pub async fn connect(&self) -> Result<PgConnection, ServeError> {
        PgConnection::connect(&self.url).await.map_err(ServeError::Connect)
    }

    /// Stops what was started for it.
    pub async fn close(self) {
        if let Some(embedded) = self.embedded {
            embedded.stop.cancel();
            // A keeper that panicked has left its server to the signal of this process's death.
            let _ = embedded.keeper.await;
        }
    }
}

/// Restarts the server whenever it dies.
async fn keep_postgres(postgres: Postgres, first: tokio::process::Child, stop: CancellationToken) {
    let mut running = Some(first);
    let mut pause = FIRST_PAUSE;
    loop {
        let began = Instant::now();
        if let Some(mut child) = running.take() {
            tokio::select! {
                ended = child.wait() => tracing::warn!(status = %described(ended), "the database ended and is started again"),
                () = stop.cancelled() => {
                    if let Err(error) = Postgres::stop(&mut child, POSTGRES_GRACE).await {
                        tracing::warn!(%error, "the database could not be stopped");
                    }
                    return;
                }
            }
        }
        pause = next_pause(pause, began.elapsed());
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
        match postgres.start().await {
            Ok(child) => running = Some(child),
            Err(error) => tracing::error!(%error, "the database could not be started; trying again"),
        }
    }
}

fn next_pause(last: Duration, lived: Duration) -> Duration {
    if lived >= HEALTHY { FIRST_PAUSE } else { (last * 2).min(LONGEST_PAUSE) }
}

fn described(ended: io::Result<std::process::ExitStatus>) -> String {
    ended.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// One part of the stack, as its process is started again and again.
struct Part {
    name: &'static str,
    environment: Vec<(&'static str, String)>,
    /// Becomes descriptor 3.
    socket: Option<RawFd>,
    grace: Duration,
}

impl Part {
    fn command(&self) -> io::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(self.name).stdin(Stdio::null());
        // A part knows what it needs and no more: the runner has no use for the first key.
        for secret in ["LATHE_API_KEY", "LATHE_METRICS_TOKEN", LISTEN_FD] {
            command.env_remove(secret);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(socket) = self.socket {
            command.env(LISTEN_FD, "3");
            // SAFETY: between fork and exec the closure only makes the system call dup2 or fcntl.
            unsafe {
                command.pre_exec(move || {
                    // A duplicate does not close at exec; the same number would, unless told otherwise.
                    let done = if socket == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(socket, 3) };
                    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
                });
            }
        }
        Ok(command)
    }

    /// Runs the part until `stop`.
    async fn keep(self, spawner: Spawner, stop: CancellationToken) {
        let mut pause = FIRST_PAUSE;
        while !stop.is_cancelled() {
            let began = Instant::now();
            let spawned = match self.command() {
                Ok(command) => spawner.spawn(command, Signal::SIGTERM).await,
                Err(error) => Err(error),
            };
            match spawned {
                Ok(mut child) => tokio::select! {
                    ended = child.wait() => tracing::warn!(part = self.name, status = %described(ended), "a part of the stack ended and is started again"),
                    () = stop.cancelled() => {
                        if let Err(error) = children::stop(&mut child, Signal::SIGTERM, self.grace).await {
                            tracing::warn!(part = self.name, %error, "a part of the stack could not be stopped");
                        }
                        return;
                    }
                },
                Err(error) => tracing::error!(part = self.name, %error, "a part of the stack could not be started; trying again"),
            }
            pause = next_pause(pause, began.elapsed());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

/// The whole stack, running. [`Stack::stop`] must be awaited; dropped without it, the children go
/// with the process.
pub struct Stack {
    /// Where clients on this machine find it, `http://127.0.0.1:8080`.
    pub url: String,
    pub key: BootstrapKey,
    pub key_file: PathBuf,
    database: Database,
    parts: Vec<JoinHandle<()>>,
    stop: CancellationToken,
    _listener: TcpListener,
    _data: Arc<DataDir>,
}

impl Stack {
    /// Starts everything; [`Stack::ready`] waits for it to answer.
    pub async fn start(args: &ServeArgs, log: &LogOptions) -> Result<Stack, ServeError> {
        let data = Arc::new(DataDir::open(&args.database.data_dir)?);
        // Whatever is made from here on is this user's alone, the children's files included.
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        let listener = listen(args.api.listen)?;
        let address = listener.local_addr()?;
        let key = data.bootstrap_key(args.api.api_key.as_deref().filter(|key| !key.is_empty()))?;
        let spawner = Spawner::start()?;
        let database = match &args.database.database_url {
            Some(url) => Database { url: url.clone(), embedded: None },
            None => Database::embedded(data.clone(), &spawner).await?,
        };
        let migrated = match database.connect().await {
            Ok(mut conn) => migrate::run(&mut conn).await.map_err(ServeError::from),
            Err(error) => Err(error),
        };
        if let Err(error) = migrated {
            database.close().await;
            return Err(error);
        }
        let stop = CancellationToken::new();
        let parts = parts(args, log, &data, &database.url, &key.secret, &listener);
        let parts = parts.into_iter().map(|part| tokio::spawn(part.keep(spawner.clone(), stop.clone()))).collect();
        let key_file = data.key_file();
        Ok(Stack {
            url: format!("http://{}", reachable(address)),
            key,
            key_file,
            database,
            parts,
            stop,
            _listener: listener,
            _data: data,
        })
    }

    /// Waits until the api answers and a runner is there.
    pub async fn ready(&self) {
        let (client, url) = (reqwest::Client::new(), format!("{}/readyz", self.url));
        let mut said = Instant::now();
        loop {
            // Bounded, since a connection waits in the socket's queue while the api starts.
            let answer = client.get(&url).timeout(Duration::from_secs(2)).send().await;
            let waiting = match answer {
                Ok(answer) if answer.status().is_success() => return,
                Ok(answer) => answer.text().await.unwrap_or_default(),
                Err(error) => error.to_string(),
            };
            if said.elapsed() > Duration::from_secs(10) {
                tracing::warn!(waiting, "not ready yet");
                said = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        for part in self.parts {
            // A panicked keeper's child goes with this process.
            let _ = part.await;
        }
        self.database.close().await;
    }
}

fn parts(args: &ServeArgs, log: &LogOptions, data: &DataDir, database_url: &str, key: &str, listener: &TcpListener) -> Vec<Part> {
    let artifacts = args
        .store
        .artifacts
        .as_ref()
        .map_or_else(|| data.path().join("artifacts"), |folder| std::path::absolute(folder).unwrap_or_else(|_| folder.clone()));
    let mut common = log.environment();
    common.push(("DATABASE_URL", database_url.to_owned()));
    common.push(("LATHE_DATA_DIR", data.path().display().to_string()));
    common.push(("LATHE_ARTIFACTS", artifacts.display().to_string()));
    common.extend(args.store.artifact_store.clone().map(|url| ("LATHE_ARTIFACT_STORE", url)));
    common.push(("LATHE_DISK_LOW", args.store.disk_low_bytes.to_string()));
    let with = |more: Vec<(&'static str, String)>| common.iter().cloned().chain(more).collect();
    let mut api = args.api.clone();
    api.api_key = Some(key.to_owned());
    let mut parts =
        vec![Part { name: "api", environment: with(api.environment()), socket: Some(listener.as_raw_fd()), grace: API_GRACE }];
    parts.extend((0..args.runners).map(|_| Part {
        name: "runner",
        environment: with(args.runner.environment()),
        socket: None,
        grace: RUNNER_GRACE,
    }));
    parts
}

fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "this address can be reached from other machines, and Lathe speaks plain HTTP: put a proxy with TLS in front of it");
    }
    TcpListener::bind(address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::PortInUse(address),
        _ => ServeError::Listen { address, source },
    })
}

/// The api's listening socket: its parent's, else one of its own.
pub fn listener(options: &ApiOptions) -> Result<tokio::net::TcpListener, ServeError> {
    let listener = match options.listen_fd {
        // SAFETY: the parent made this descriptor for this purpose, and nothing else here uses it.
        Some(descriptor) => unsafe { TcpListener::from_raw_fd(descriptor) },
        None => listen(options.listen)?,
    };
    listener.set_nonblocking(true)?;
    Ok(tokio::net::TcpListener::from_std(listener)?)
}

/// Runs the stack until `shutdown`.
pub async fn serve(args: &ServeArgs, log: &LogOptions, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
    let stack = Stack::start(args, log).await?;
    tokio::pin!(shutdown);
    tokio::select! {
        () = stack.ready() => {
            announce(&stack);
            shutdown.await;
        }
        () = &mut shutdown => {}
    }
    stack.stop().await;
    Ok(())
}

fn announce(stack: &Stack) {
    println!("Lathe is ready at {url}  (docs: {url}/docs)", url = stack.url);
    if stack.key.made {
        println!("API key: {}  (shown this once; kept in {})", stack.key.secret, stack.key_file.display());
    }
}
