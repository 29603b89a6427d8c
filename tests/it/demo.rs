//! `lathe demo` as a person meets it: on a terminal, beside another server, and stopped half way.
//! What it scores is not tested here; `make demo` says so itself.

use std::{
    fs::File,
    io::Read,
    net::TcpListener,
    process::{Command, Output, Stdio},
    sync::mpsc,
    time::Duration,
};

use lathe_tests::{lathe, still_running, within};
use nix::{
    pty::openpty,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// What the contract promises for an end, with room for the demo's own.
const STOPPED: Duration = Duration::from_secs(12);

/// The demo on a port of its own; DATABASE_URL stays, so that no second server has to start.
fn demo(port: u16, data_dir: &std::path::Path) -> Command {
    let mut command = Command::new(lathe());
    command.args(["demo", "--listen", &format!("127.0.0.1:{port}")]).env("LATHE_DATA_DIR", data_dir).env_remove("LATHE_API_KEY");
    command
}

#[test]
fn beside_another_server_it_names_the_port_and_starts_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("it listens").port();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data_dir = folder.path().join("data");
    let Output { status, stderr, .. } = demo(port, &data_dir).output().expect("lathe runs");
    let said = String::from_utf8_lossy(&stderr);
    assert!(!status.success());
    assert!(said.contains(&format!("port {port} is in use")), "{said}");
    assert!(!data_dir.exists(), "it made a data directory");
}

#[test]
fn on_a_terminal_it_draws_and_ctrl_c_ends_it_half_way() {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
    let folder = tempfile::Builder::new().prefix("lathe-test-").tempdir().expect("a temporary folder");
    // The embedded database's user must be able to pass through.
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("it is ours");
    let data_dir = folder.path().canonicalize().expect("it is there").join("data");

    let terminal = openpty(None, None).expect("a terminal");
    let stdout = Stdio::from(terminal.slave);
    let mut command = demo(port, &data_dir);
    // Every terminal says what it is, even where the tests run without one.
    command.env("TERM", "xterm").env_remove("DATABASE_URL").stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    let mut running = command.spawn().expect("lathe runs");
    drop(command);
    let screen = watch(File::from(terminal.master));

    let mut seen = String::new();
    within(Duration::from_secs(120), "a dataset is being made", || {
        seen.extend(screen.try_iter());
        seen.contains("Datasets by rule").then_some(())
    });
    let pid = Pid::from_raw(i32::try_from(running.id()).expect("a process id"));
    kill(pid, Signal::SIGINT).expect("it is ours");
    let status = within(STOPPED, "the demo ends", || running.try_wait().expect("it is our child"));
    seen.extend(screen.iter());

    let mut complaints = String::new();
    running.stderr.take().expect("it is piped").read_to_string(&mut complaints).expect("it is text");
    assert!(status.success(), "{status}: {complaints}\n{seen}");
    assert!(seen.contains("Starting the server") && seen.contains("\u{1b}["), "no bars were drawn: {seen:?}");
    assert!(!seen.contains('%'), "the one percentage is the score: {seen:?}");
    let left = still_running(&data_dir);
    assert!(left.is_empty(), "{left:?}");
    let note = std::fs::read_to_string(data_dir.join("postgres_folder")).unwrap_or_default();
    if note.starts_with("/var/lib/lathe") {
        std::fs::remove_dir_all(note.trim()).expect("it is ours");
    }
}

/// What appears on the terminal, until its last writer has gone.
fn watch(mut master: File) -> mpsc::Receiver<String> {
    let (said, screen) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        // Reading fails with EIO once nobody holds the other side.
        while let Ok(length @ 1..) = master.read(&mut bytes) {
            if said.send(String::from_utf8_lossy(&bytes[..length]).into_owned()).is_err() {
                return;
            }
        }
    });
    screen
}
