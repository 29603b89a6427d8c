//! Starting and stopping a stack.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use tempfile::TempDir;

use crate::{
    KEY, Kind, Network, Pretence,
    processes::{self},
    schema_of, within,
};

/// A server that has not said that it is ready by then will not.
const START_LIMIT: Duration = Duration::from_secs(60);

/// `serve` promises ten seconds; a busy machine gets a few more.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// The binary that was built beside this test.
pub fn lathe() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.ancestors().nth(2).expect("a test lies in target/<profile>/deps");
    let lathe = folder.join("lathe");
    assert!(lathe.exists(), "{} is not there: build it first with `cargo build -p lathe-api`", lathe.display());
    lathe
}

#[derive(Clone, Debug)]
pub struct Builder {
    runners: u16,
    lease_seconds: f64,
    embedded: bool,
    leaves_jobs: bool,
    left: Option<(i64, String)>,
    disk_bytes: Option<u64>,
    network: Option<Network>,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Default for Builder {
    fn default() -> Self {
        Builder {
            runners: 1,
            lease_seconds: 2.0,
            embedded: false,
            leaves_jobs: false,
            left: None,
            disk_bytes: None,
            network: None,
            arguments: Vec::new(),
            variables: Vec::new(),
        }
    }
}

impl Builder {
    pub fn runners(mut self, runners: u16) -> Self {
        self.runners = runners;
        self
    }

    pub fn lease_seconds(mut self, seconds: f64) -> Self {
        self.lease_seconds = seconds;
        self
    }

    /// A database server of its own, run by `serve`.
    pub fn embedded(mut self) -> Self {
        self.embedded = true;
        self
    }

    /// The test ends with unfinished jobs, on purpose.
    pub fn leaves_jobs(mut self) -> Self {
        self.leaves_jobs = true;
        self
    }

    /// On a database (of the server at `DATABASE_URL`) as an older version left it: its schema, and these rows.
    pub fn left_by(mut self, version: i64, rows: &str) -> Self {
        self.left = Some((version, rows.to_owned()));
        self
    }

    /// Artifacts on a file system of their own and of this size, in a mount namespace of the stack's; its
    /// content goes with the stack. See [`can_mount`].
    pub fn small_disk(mut self, bytes: u64) -> Self {
        self.disk_bytes = Some(bytes);
        self
    }

    /// The stack reaches its database over this network; the test does not.
    pub fn through(mut self, network: &Network) -> Self {
        self.network = Some(network.clone());
        self
    }

    /// One more argument of `lathe serve`.
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// The stack believes what is pretended.
    pub fn believing(self, pretence: &Pretence) -> Self {
        pretence.on(self)
    }

    /// A variable in the stack's environment.
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the stack and waits until it is ready.
    pub async fn start(self) -> TestApp {
        let folder = tempfile::Builder::new().prefix("lathe-test-").tempdir().expect("a temporary folder");
        // The embedded database's user must be able to pass through.
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("it is ours");
        let data_dir = folder.path().canonicalize().expect("it is there").join("data");
        let server = std::env::var("DATABASE_URL").ok().filter(|url| !url.is_empty() && !self.embedded);
        let database = match server {
            Some(server) => Some(Database::create(&server).await),
            None => None,
        };
        if let Some((version, rows)) = &self.left {
            database.as_ref().expect("DATABASE_URL names a server").fill(*version, rows).await;
        }
        let mut app = TestApp {
            url: String::new(),
            key: KEY.to_owned(),
            client: reqwest::Client::new(),
            data_dir,
            serve: None,
            database,
            builder: self,
            folder,
        };
        app.start_again();
        app
    }
}

/// A database on a shared server, dropped with the app.
struct Database {
    server: PgConnectOptions,
    name: String,
    url: String,
}

impl Database {
    async fn create(server: &str) -> Database {
        let server: PgConnectOptions = server.parse().expect("DATABASE_URL is an address");
        let name = lathe_jobs::ids::new("lathe_test").to_lowercase();
        let mut conn = PgConnection::connect_with(&server).await.expect("DATABASE_URL's server is there");
        // The name is made here, of letters, digits and underscores.
        sqlx::query(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&mut conn)
            .await
            .expect("databases can be made");
        let url = server.clone().database(&name).to_url_lossy().to_string();
        Database { server, name, url }
    }

    fn options(&self) -> PgConnectOptions {
        self.server.clone().database(&self.name)
    }

    /// Brings the schema up to a version, and inserts rows.
    async fn fill(&self, version: i64, rows: &str) {
        let mut conn = PgConnection::connect(&self.url).await.expect("the server is there");
        schema_of(version).run(&mut conn).await.expect("the migrations run");
        sqlx::raw_sql(sqlx::AssertSqlSafe(rows)).execute(&mut conn).await.expect("the rows fit the schema");
    }

    async fn remove(self) {
        let mut conn = PgConnection::connect_with(&self.server).await.expect("the server is there");
        let removed =
            sqlx::query(sqlx::AssertSqlSafe(format!("DROP DATABASE {} WITH (FORCE)", self.name))).execute(&mut conn).await;
        removed.expect("the database is dropped");
    }
}

/// A running stack.
pub struct TestApp {
    pub url: String,
    pub key: String,
    pub client: reqwest::Client,
    pub data_dir: PathBuf,
    serve: Option<Child>,
    database: Option<Database>,
    builder: Builder,
    /// Removed last.
    folder: TempDir,
}

impl TestApp {
    /// One runner, leases of two seconds.
    pub async fn start() -> TestApp {
        TestApp::builder().start().await
    }

    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Starts `serve` on the same data directory, after [`TestApp::stop`] or a kill; blocks until it
    /// is ready and says how long that took.
    pub fn start_again(&mut self) -> Duration {
        let began = Instant::now();
        let log = File::options().create(true).append(true).open(self.log()).expect("the folder is ours");
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut serve = command.spawn().expect("lathe starts");
        let stdout = serve.stdout.take().expect("it is piped");
        self.serve = Some(serve);
        let (said, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The test may have ended; the pipe is still to be drained.
                let _ = said.send(line);
            }
        });
        let ready = lines.recv_timeout(START_LIMIT).unwrap_or_else(|_| panic!("serve is not ready:\n{}", self.log_text()));
        let url = ready.strip_prefix("Lathe is ready at ").and_then(|rest| rest.split_whitespace().next());
        self.url = url.unwrap_or_else(|| panic!("not a ready line: {ready}")).to_owned();
        began.elapsed()
    }

    /// `lathe serve` as this app runs it.
    pub fn command(&self) -> Command {
        let mut command = match self.builder.disk_bytes {
            Some(bytes) => self.in_namespace(bytes),
            None => Command::new(lathe()),
        };
        command.args(["serve", "--listen", "127.0.0.1:0", "--runners", &self.builder.runners.to_string()]);
        command.args(["--lease-seconds", &self.builder.lease_seconds.to_string()]).args(&self.builder.arguments);
        command.env("LATHE_DATA_DIR", &self.data_dir).env("LATHE_API_KEY", KEY).env_remove("DATABASE_URL");
        command.envs(self.builder.variables.iter().map(|(name, value)| (name, value)));
        if let Some(database) = &self.database {
            let url = match &self.builder.network {
                Some(network) => network.through(database.options()).to_url_lossy().to_string(),
                None => database.url.clone(),
            };
            command.env("DATABASE_URL", url);
        }
        command
    }

    /// `lathe` with a tmpfs at its artifacts, which only its processes see.
    fn in_namespace(&self, bytes: u64) -> Command {
        let artifacts = self.data_dir.join("artifacts");
        fs::create_dir_all(&artifacts).expect("the folder is ours");
        let mut command = unshare();
        command.args(["sh", "-c", r#"mount -t tmpfs -o size="$0",mode=700 tmpfs "$1" && shift && exec "$@""#]);
        command.arg(bytes.to_string()).arg(artifacts).arg(lathe());
        command
    }

    /// The artifacts as the stack sees them.
    pub fn artifacts(&self) -> PathBuf {
        let inside = self.data_dir.join("artifacts");
        match (self.builder.disk_bytes, &self.serve) {
            (Some(_), Some(serve)) => {
                let root = PathBuf::from(format!("/proc/{}/root", serve.id()));
                root.join(inside.strip_prefix("/").expect("it is absolute"))
            }
            _ => inside,
        }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("serve.log")
    }

    /// What the whole stack has logged.
    pub fn log_text(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The address of the app's database.
    pub fn database_url(&self) -> String {
        match &self.database {
            Some(database) => database.url.clone(),
            None => fs::read_to_string(self.data_dir.join("database_url")).expect("serve wrote it").trim().to_owned(),
        }
    }

    pub fn processes(&self, kind: Kind) -> Vec<Pid> {
        processes::of_stack(&self.data_dir).into_iter().filter(|(_, found)| *found == Some(kind)).map(|(pid, _)| pid).collect()
    }

    /// All of the embedded database's processes.
    pub fn database_processes(&self) -> Vec<Pid> {
        let is_postgres =
            |pid: &Pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program.ends_with("postgres"));
        processes::of_stack(&self.data_dir).into_iter().map(|(pid, _)| pid).filter(is_postgres).collect()
    }

    /// `kill -9` to every process of this kind; there must be one. Gives their ids.
    #[track_caller]
    pub fn kill(&self, kind: Kind) -> Vec<Pid> {
        let killed = self.processes(kind);
        assert!(!killed.is_empty(), "no {kind:?} to kill");
        for pid in &killed {
            kill(*pid, Signal::SIGKILL).expect("it is ours");
        }
        killed
    }

    /// Waits until a process of this kind runs that is none of `before`.
    #[track_caller]
    pub fn replaced(&self, kind: Kind, before: &[Pid]) -> Pid {
        within(START_LIMIT, "a new process", || self.processes(kind).into_iter().find(|pid| !before.contains(pid)))
    }

    /// SIGTERM to `serve`; gives the time until it had ended.
    #[track_caller]
    pub fn stop(&mut self) -> Duration {
        self.stop_by(Signal::SIGTERM)
    }

    /// The same by another signal.
    #[track_caller]
    pub fn stop_by(&mut self, signal: Signal) -> Duration {
        let began = Instant::now();
        let Some(mut serve) = self.serve.take() else { return Duration::ZERO };
        kill(pid_of(&serve), signal).expect("it is ours");
        let ended = (|| {
            while began.elapsed() < STOP_LIMIT {
                if let Some(status) = serve.try_wait().expect("it is our child") {
                    return Some(status);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            None
        })();
        if ended.is_none() {
            serve.kill().and_then(|()| serve.wait()).expect("it is our child");
            panic!("serve did not stop within {STOP_LIMIT:?}:\n{}", self.log_text());
        }
        began.elapsed()
    }

    /// `kill -9` to `serve` itself.
    pub fn kill_serve(&mut self) {
        if let Some(mut serve) = self.serve.take() {
            serve.kill().and_then(|()| serve.wait()).expect("it is our child");
        }
    }

    /// Ids and states of jobs that have not ended. Blocks, on a thread with a runtime of its own, so
    /// that a drop can ask.
    fn unfinished_jobs(&self) -> Vec<(String, String)> {
        let url = self.database_url();
        let asked = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let mut conn = PgConnection::connect(&url).await.expect("the database is there");
                sqlx::query_as("SELECT id, state FROM jobs WHERE finished_at IS NULL")
                    .fetch_all(&mut conn)
                    .await
                    .expect("the table is there")
            })
        });
        asked.join().expect("the question is answered")
    }
}

/// A command in a mount namespace of its own; for other users than root, in a user namespace too.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.arg("--");
    command
}

/// Whether this machine lets this user have a file system of a small size.
pub fn can_mount() -> bool {
    let tried = unshare().args(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/tmp"]).output();
    tried.is_ok_and(|output| output.status.success())
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a process id"))
}

impl Drop for TestApp {
    fn drop(&mut self) {
        let failing = std::thread::panicking();
        let mut complaints = Vec::new();
        if !failing && self.serve.is_some() && !self.builder.leaves_jobs {
            complaints.extend(self.unfinished_jobs().into_iter().map(|(id, state)| format!("job {id} is still {state}")));
        }
        if failing {
            eprintln!("--- log of the stack\n{}---", self.log_text());
            self.kill_serve();
        } else {
            self.stop();
        }
        complaints
            .extend(left_running(&self.data_dir).into_iter().map(|(pid, kind)| format!("process {pid} ({kind:?}) is left")));
        self.remove_cluster();
        if let Some(database) = self.database.take() {
            let removed = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(database.remove());
            });
            if removed.join().is_err() {
                complaints.push("the test's database could not be dropped".to_owned());
            }
        }
        if !failing {
            assert!(complaints.is_empty(), "{}", complaints.join("; "));
        }
    }
}

/// What still runs some seconds after `serve` has ended; it is killed then.
fn left_running(data_dir: &Path) -> Vec<(Pid, Option<Kind>)> {
    let began = Instant::now();
    loop {
        let left = processes::of_stack(data_dir);
        if left.is_empty() || began.elapsed() > Duration::from_secs(10) {
            for (pid, _) in &left {
                // One that has just ended is what is wanted.
                let _ = kill(*pid, Signal::SIGKILL);
            }
            return left;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl TestApp {
    /// Root's cluster may lie outside the data directory.
    fn remove_cluster(&self) {
        let Ok(note) = fs::read_to_string(self.data_dir.join("postgres_folder")) else { return };
        let folder = Path::new(note.trim());
        if folder.starts_with("/var/lib/lathe") {
            // What cannot be removed is left for a person to see.
            let _ = fs::remove_dir_all(folder);
        }
    }
}
