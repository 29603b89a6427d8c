//! Child processes: how workers and engines are started, told, heard and ended.
//!
//! A child has its own process group, no secret in its environment, standard error in a log file,
//! reports on descriptor 3 and commands on standard input. It dies with its runner: the kernel kills
//! it when the thread that started it ends, which is why one thread that lives as long as the process
//! starts all of them.

use std::{
    borrow::Cow,
    ffi::OsString,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    time::Duration,
};

use lathe_model::protocol::REPORT_FD;
use nix::{
    sys::{
        resource::{Resource, setrlimit},
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::unix::pipe,
    process::{ChildStdin, Command},
    sync::oneshot,
};

use crate::events;

/// Longest report that is read; a longer line ends the reading.
const MAX_REPORT_BYTES: usize = 64 << 20;

/// Variables that a child may see, by their beginnings.
const INHERITED: [&str; 15] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_",
    "LD_LIBRARY_PATH",
    "LIBTORCH",
    "LATHE_CACHE",
    "LATHE_LOG",
    "LATHE_TORCH",
    "RUST_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "MALLOC_",
];

/// What a child may use; `None`: no bound.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// Of its address space.
    pub memory_bytes: Option<u64>,
    /// Of all its threads together.
    pub cpu_seconds: Option<u64>,
}

/// A child to be.
#[derive(Debug)]
pub struct Start {
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// Added to what is inherited.
    pub environment: Vec<(Cow<'static, str>, String)>,
    /// Standard error is appended here.
    pub log: PathBuf,
    pub bounds: Bounds,
}

/// A running child. Dropped, it is killed with its group.
#[derive(Debug)]
pub struct Child {
    process: tokio::process::Child,
    group: Pid,
    commands: Option<ChildStdin>,
    reports: BufReader<pipe::Receiver>,
}

impl Child {
    /// Starts a process on the thread that lives as long as this one.
    pub async fn start(start: Start) -> io::Result<Child> {
        static STARTER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
        let starter = STARTER.get_or_init(|| {
            let (sender, requests) = mpsc::channel::<Request>();
            std::thread::spawn(move || {
                for Request { start, runtime, answer } in requests {
                    let _entered = runtime.enter();
                    // Whoever asked may be gone; then the child is dropped and killed.
                    let _ = answer.send(spawn(start));
                }
            });
            sender
        });
        let (answer, started) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts children has ended");
        starter.send(Request { start, runtime: tokio::runtime::Handle::current(), answer }).map_err(|_| gone())?;
        started.await.map_err(|_| gone())?
    }

    pub fn pid(&self) -> i32 {
        self.group.as_raw()
    }

    /// Writes one line to the child's standard input. A child that has ended hears nothing, and
    /// that is seen elsewhere.
    pub async fn tell(&mut self, line: &str) {
        if let Some(commands) = &mut self.commands
            && let Err(error) = async { commands.write_all(format!("{line}\n").as_bytes()).await }.await
        {
            tracing::debug!(%error, "a child no longer reads its commands");
            self.commands = None;
        }
    }

    /// The next line of its reports; `None` once it will send no more. Safe to cancel between lines
    /// only if `line` is kept and given again.
    pub async fn report(&mut self, line: &mut Vec<u8>) -> io::Result<bool> {
        let read = self.reports.read_until(b'\n', line).await?;
        if line.len() > MAX_REPORT_BYTES {
            return Err(io::Error::other("a report is longer than 64 MiB"));
        }
        Ok(read > 0)
    }

    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.process.wait().await
    }

    /// Kills it and whatever it has started.
    pub fn kill(&self) {
        let _ = killpg(self.group, Signal::SIGKILL);
    }

    /// Asks it to end, and kills it where it has not after `grace`. How it ended.
    pub async fn stop(&mut self, grace: Duration) -> io::Result<ExitStatus> {
        let _ = killpg(self.group, Signal::SIGTERM);
        match tokio::time::timeout(grace, self.process.wait()).await {
            Ok(status) => status,
            Err(_) => {
                self.kill();
                self.process.wait().await
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The id may have been given to another process once this one was waited for.
        if self.process.id().is_some() {
            self.kill();
        }
    }
}

struct Request {
    start: Start,
    runtime: tokio::runtime::Handle,
    answer: oneshot::Sender<io::Result<Child>>,
}

fn spawn(start: Start) -> io::Result<Child> {
    if let Some(folder) = start.log.parent() {
        fs::create_dir_all(folder)?;
    }
    let log = File::options().create(true).append(true).open(&start.log)?;
    let (reports, writer) = io::pipe()?;
    let descriptor = writer.as_raw_fd();
    let mut command = Command::new(&start.program);
    command.args(&start.arguments).stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log).env_clear().process_group(0);
    command.envs(inherited());
    command.envs(start.environment.iter().map(|(name, value)| (&**name, value.as_str())));
    let (parent, bounds) = (std::process::id(), start.bounds);
    // SAFETY: between fork and exec the closure makes system calls only: no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have ended before the line above.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            restrict(bounds)?;
            // `dup2` onto itself would leave the descriptor to be closed at exec.
            let passed = if descriptor == REPORT_FD {
                libc::fcntl(descriptor, libc::F_SETFD, 0)
            } else {
                libc::dup2(descriptor, REPORT_FD)
            };
            if passed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut process = command.spawn()?;
    drop(writer);
    let group = process.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    let group = group.ok_or_else(|| io::Error::other("the child ended at once"))?;
    let commands = process.stdin.take();
    let reports = BufReader::new(pipe::Receiver::from_owned_fd(OwnedFd::from(reports))?);
    Ok(Child { process, group, commands, reports })
}

/// The part of this process's environment that a child may see.
pub fn inherited() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os().filter(|(name, _)| INHERITED.iter().any(|known| name.to_string_lossy().starts_with(known)))
}

/// Bounds on a child, and a place in front of this machine's other processes when memory runs out.
fn restrict(bounds: Bounds) -> io::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    if let Some(bytes) = bounds.memory_bytes {
        setrlimit(Resource::RLIMIT_AS, bytes, bytes)?;
    }
    if let Some(seconds) = bounds.cpu_seconds {
        setrlimit(Resource::RLIMIT_CPU, seconds, seconds)?;
    }
    // SAFETY: the path and the text are constants that outlive the calls. Where the file cannot be
    // written the child keeps the default.
    unsafe {
        let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file >= 0 {
            libc::write(file, b"500".as_ptr().cast(), 3);
            libc::close(file);
        }
    }
    Ok(())
}

/// How a child came to its end, in a sentence, with the last line of its log.
pub fn crash_message(what: &str, status: io::Result<ExitStatus>, log: &Path) -> String {
    let how = match status {
        Ok(status) => match (status.code(), status.signal()) {
            (_, Some(libc::SIGKILL)) => "was killed by signal 9, which is what happens when memory runs out".to_owned(),
            (_, Some(libc::SIGXCPU)) => "used more processor time than a job of this kind may".to_owned(),
            (_, Some(signal)) => format!("was ended by signal {signal}"),
            (Some(code), None) => format!("ended with status {code} and no result"),
            (None, None) => "ended".to_owned(),
        },
        Err(error) => format!("cannot be waited for ({error})"),
    };
    match last_line(log) {
        Some(line) => format!("The {what} {how}. Its log ends with: {line}"),
        None => format!("The {what} {how}."),
    }
}

/// The end of a log, short enough for a message.
fn last_line(log: &Path) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(4096))).ok()?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail);
    let line = tail.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(events::clean(&line.chars().take(300).collect::<String>()))
}
