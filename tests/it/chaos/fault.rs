//! What goes wrong.

use std::{
    fmt,
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use lathe_tests::{Kind, can_mount};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rand::{Rng, RngExt};
use sqlx::{Connection, PgConnection};

use super::work::{Bench, Made};

/// A process stands still for so long.
const PAUSE: Duration = Duration::from_secs(20);

/// The database's connections are taken, or the disk is full, for so long.
const SHORTAGE: Duration = Duration::from_secs(3);

const HOUR: i64 = 3600;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    KillWorker,
    KillEngine,
    KillRunner,
    KillApi,
    KillPostgres,
    PauseWorker,
    PauseRunner,
    CutConnections,
    TakeConnections,
    FillDisk,
    TruncateCheckpoint,
    FlipBitOfCheckpoint,
    MoveClockOfApi,
    MoveClockOfRunners,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Fault::KillWorker => "kill -9 of the worker",
            Fault::KillEngine => "kill -9 of the engine",
            Fault::KillRunner => "kill -9 of a runner",
            Fault::KillApi => "kill -9 of the api",
            Fault::KillPostgres => "kill -9 of PostgreSQL",
            Fault::PauseWorker => "SIGSTOP of the worker, 20 s",
            Fault::PauseRunner => "SIGSTOP of a runner, 20 s",
            Fault::CutConnections => "connections cut",
            Fault::TakeConnections => "connections exhausted",
            Fault::FillDisk => "disk full",
            Fault::TruncateCheckpoint => "checkpoint truncated",
            Fault::FlipBitOfCheckpoint => "checkpoint with a flipped bit",
            Fault::MoveClockOfApi => "clock of the api, an hour",
            Fault::MoveClockOfRunners => "clock of the runners, an hour",
        })
    }
}

impl Fault {
    const ALL: [Fault; 14] = [
        Fault::KillWorker,
        Fault::KillEngine,
        Fault::KillRunner,
        Fault::KillApi,
        Fault::KillPostgres,
        Fault::PauseWorker,
        Fault::PauseRunner,
        Fault::CutConnections,
        Fault::TakeConnections,
        Fault::FillDisk,
        Fault::TruncateCheckpoint,
        Fault::FlipBitOfCheckpoint,
        Fault::MoveClockOfApi,
        Fault::MoveClockOfRunners,
    ];

    /// One of all; a kill of the worker where this machine cannot do it, so that a seed is the same everywhere.
    pub fn any(random: &mut impl Rng) -> Fault {
        match Fault::ALL[random.random_range(0..Fault::ALL.len())] {
            // The disk of the stack's own needs a mount.
            Fault::FillDisk if !can_mount() => Fault::KillWorker,
            fault => fault,
        }
    }

    pub fn stops_postgres(self) -> bool {
        self == Fault::KillPostgres
    }

    /// What must be there before the job is.
    pub async fn prepare(self, bench: &Bench) {
        if self == Fault::KillEngine {
            bench.answers().await;
        }
    }

    /// Lets it happen, and says from when on a job can be expected to go on.
    pub async fn strike(self, bench: &Bench, made: &Made, random: &mut impl Rng) -> Instant {
        match self {
            Fault::KillWorker => kill_all(&bench.app.processes(Kind::Worker)),
            Fault::KillEngine => kill_all(&bench.app.processes(Kind::Engine)),
            Fault::KillRunner => kill_all(&one_of(bench.app.processes(Kind::Runner), random)),
            Fault::KillApi => kill_all(&bench.app.processes(Kind::Api)),
            Fault::KillPostgres => kill_all(&bench.app.processes(Kind::Postgres)),
            Fault::PauseWorker => return pause(one_of(bench.app.processes(Kind::Worker), random)).await,
            Fault::PauseRunner => return pause(one_of(bench.app.processes(Kind::Runner), random)).await,
            Fault::CutConnections => {
                let query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                             WHERE datname = current_database() AND pid <> pg_backend_pid()";
                sqlx::query(query).execute(&mut bench.connect().await).await.expect("the database is there");
            }
            Fault::TakeConnections => {
                let mut taken = Vec::new();
                while let Ok(conn) = PgConnection::connect(&bench.database_url).await {
                    taken.push(conn);
                }
                tokio::time::sleep(SHORTAGE).await;
            }
            Fault::FillDisk => {
                let path = bench.app.artifacts().join("filler");
                fill(&path);
                tokio::time::sleep(SHORTAGE).await;
                fs::remove_file(path).expect("it was made");
            }
            Fault::TruncateCheckpoint | Fault::FlipBitOfCheckpoint => {
                if let Some(checkpoint) = bench.newest_checkpoint(made) {
                    damage(&checkpoint, self == Fault::TruncateCheckpoint, random);
                }
                kill_all(&bench.app.processes(Kind::Worker));
            }
            Fault::MoveClockOfApi => bench.pretence.move_clock_of_api(either_way(random)),
            Fault::MoveClockOfRunners => bench.pretence.move_clock_of_runners(either_way(random)),
        }
        Instant::now()
    }

    /// When the job has ended.
    pub async fn after(self, bench: &Bench) {
        bench.pretence.reset();
        if self == Fault::KillEngine {
            bench.answers().await;
        }
    }
}

fn one_of(processes: Vec<Pid>, random: &mut impl Rng) -> Vec<Pid> {
    match processes.len() {
        0 => processes,
        count => vec![processes[random.random_range(0..count)]],
    }
}

/// There may be none, or none any more.
fn kill_all(processes: &[Pid]) {
    for process in processes {
        let _ = kill(*process, Signal::SIGKILL);
    }
}

/// Others may go on from the moment that it stands still.
async fn pause(processes: Vec<Pid>) -> Instant {
    let begun = Instant::now();
    for signal in [Signal::SIGSTOP, Signal::SIGCONT] {
        for process in &processes {
            // It may have ended, or been ended, meanwhile.
            let _ = kill(*process, signal);
        }
        if signal == Signal::SIGSTOP && !processes.is_empty() {
            tokio::time::sleep(PAUSE).await;
        }
    }
    begun
}

fn either_way(random: &mut impl Rng) -> i64 {
    if random.random_bool(0.5) { HOUR } else { -HOUR }
}

/// A file takes all that is free.
fn fill(path: &std::path::Path) {
    let file = File::create(path).expect("it is writable");
    loop {
        let found = nix::sys::statvfs::statvfs(path).expect("it is there");
        let size = file.metadata().expect("it is there").len();
        let free = found.blocks_available() * found.fragment_size();
        // Others write too, so that a little may be gone already.
        let length = i64::try_from(free.saturating_sub(1 << 16)).expect("a small disk");
        if length <= 0 || nix::fcntl::posix_fallocate(&file, i64::try_from(size).expect("a small disk"), length).is_ok() {
            return;
        }
    }
}

/// The largest file of a checkpoint loses its end, or one bit of it is another.
fn damage(checkpoint: &std::path::Path, truncated: bool, random: &mut impl Rng) {
    let files = fs::read_dir(checkpoint).into_iter().flatten().flatten();
    let sized = files.filter_map(|file| Some((file.metadata().ok()?.len(), file.path())));
    // It may be removed at this moment, being old.
    let Some((size, path)) = sized.max() else { return };
    let Ok(file) = File::options().read(true).write(true).open(path) else { return };
    let at = random.random_range(0..size.max(1));
    let damaged = if truncated {
        file.set_len(at)
    } else {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).and_then(|()| file.write_all_at(&[byte[0] ^ 1 << random.random_range(0..8)], at))
    };
    damaged.expect("a checkpoint's file is ours");
}
