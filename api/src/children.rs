//! Child processes that never outlive this one.
//!
//! Each child is in a process group of its own, so a terminal's Ctrl-C reaches the supervisor alone,
//! and asks the kernel for a signal at its parent's death. That signal fires when the *thread* that
//! forked ends, so all children are started from one thread that lives as long as the process.

use std::{io, process::ExitStatus, time::Duration};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    sync::oneshot,
};

/// A command, and the signal that its process gets when this one dies.
struct Request {
    command: Command,
    on_parent_death: Signal,
    reply: oneshot::Sender<io::Result<Child>>,
}

/// Hands commands to the thread that starts them. Cheap to clone.
#[derive(Clone)]
pub struct Spawner(std::sync::mpsc::Sender<Request>);

impl Spawner {
    /// Starts the thread. Must be called within a tokio runtime, which waits for the children.
    pub fn start() -> io::Result<Spawner> {
        let (sender, requests) = std::sync::mpsc::channel::<Request>();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new().name("children".to_owned()).spawn(move || {
            let _guard = runtime.enter();
            for Request { mut command, on_parent_death, reply } in &requests {
                die_with_parent(&mut command, on_parent_death);
                // A receiver that is gone has been cancelled, and so has its whole stack.
                let _ = reply.send(command.process_group(0).spawn());
            }
            // Every sender is gone. Ending now would signal the children that still stop.
            loop {
                std::thread::park();
            }
        })?;
        Ok(Spawner(sender))
    }

    pub async fn spawn(&self, command: Command, on_parent_death: Signal) -> io::Result<Child> {
        let (reply, started) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts processes has ended");
        self.0.send(Request { command, on_parent_death, reply }).map_err(|_| gone())?;
        started.await.map_err(|_| gone())?
    }
}

/// Runs after the change of user, which would clear the setting.
#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command, signal: Signal) {
    let parent = std::process::id();
    // SAFETY: between fork and exec the closure only makes the system calls prctl and getppid.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) == -1 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the call.
            match libc::getppid() as u32 == parent {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ECANCELED)),
            }
        });
    }
}

/// Elsewhere an orphan is found by the next start.
#[cfg(not(target_os = "linux"))]
fn die_with_parent(_command: &mut Command, _signal: Signal) {}

/// Asks a child to stop, waits for at most `grace`, then kills its whole group.
pub async fn stop(child: &mut Child, signal: Signal, grace: Duration) -> io::Result<ExitStatus> {
    let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw) else {
        return child.wait().await;
    };
    // The one error, no such process, means that it has just ended.
    let _ = kill(pid, signal);
    if let Ok(ended) = tokio::time::timeout(grace, child.wait()).await {
        return ended;
    }
    tracing::warn!(process.id = pid.as_raw(), "a process did not stop in time and is killed");
    let _ = killpg(pid, Signal::SIGKILL);
    child.wait().await
}
