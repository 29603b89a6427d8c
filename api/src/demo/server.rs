//! The server that the demo talks to: `lathe serve`, started as a user would start it.

use std::{
    ffi::OsString,
    fs::{DirBuilder, File, OpenOptions},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use tokio::process::{Child, Command};

use super::{DemoError, client::Client};
use crate::{children, config::ServeArgs, health_check::reachable};

/// A first start makes a database.
const START_LIMIT: Duration = Duration::from_secs(120);

/// `serve` stops within ten seconds.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// Flags of `demo` that `serve` does not have.
const OWN_FLAGS: [&str; 3] = ["--corpus", "--instructions", "--seed"];

pub struct Server {
    child: Child,
    log: PathBuf,
    /// `http://host:port`
    pub base: String,
    pub key: String,
}

impl Server {
    /// Starts the server and waits until it is ready. Refuses where something else listens.
    pub async fn start(args: &ServeArgs) -> Result<Server, DemoError> {
        let listen = args.api.listen;
        refuse_if_taken(listen).await?;
        let data_dir = &args.database.data_dir;
        make_private(data_dir)?;
        let log = data_dir.join("demo-server.log");
        let child = spawn(&log).await?;
        let base = format!("http://{}", reachable(listen));
        let mut server = Server { child, log, base, key: String::new() };
        if let Err(error) = server.ready(args).await {
            let _ = children::stop(&mut server.child, Signal::SIGTERM, STOP_LIMIT).await;
            return Err(error);
        }
        Ok(server)
    }

    async fn ready(&mut self, args: &ServeArgs) -> Result<(), DemoError> {
        let probe = Client::new(self.base.clone(), String::new())?;
        let begun = Instant::now();
        while !probe.ready().await {
            if let Some(status) = self.child.try_wait()? {
                return Err(self.ended(status));
            }
            if begun.elapsed() > START_LIMIT {
                return Err(DemoError::NotReady { seconds: START_LIMIT.as_secs(), log: self.log.clone() });
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.key = match &args.api.api_key {
            Some(key) => key.clone(),
            None => {
                let file = args.database.data_dir.join("api_key");
                std::fs::read_to_string(&file).map_err(|source| DemoError::NoKey { file, source })?.trim().to_owned()
            }
        };
        Ok(())
    }

    /// Resolves when the server ends by itself, which it should not.
    pub async fn end(&mut self) -> DemoError {
        match self.child.wait().await {
            Ok(status) => self.ended(status),
            Err(error) => error.into(),
        }
    }

    pub async fn stop(mut self) -> Result<(), DemoError> {
        children::stop(&mut self.child, Signal::SIGTERM, STOP_LIMIT).await?;
        Ok(())
    }

    /// With the log's last line, which says why.
    fn ended(&self, status: ExitStatus) -> DemoError {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it wrote nothing").to_owned();
        DemoError::ServerEnded { status, last, log: self.log.clone() }
    }
}

/// The data directory with the modes that `serve` gives it, since the log goes there first.
fn make_private(folder: &Path) -> std::io::Result<()> {
    let mode = if nix::unistd::geteuid().is_root() { 0o711 } else { 0o700 };
    DirBuilder::new().recursive(true).mode(mode).create(folder)
}

async fn refuse_if_taken(listen: SocketAddr) -> Result<(), DemoError> {
    match tokio::net::TcpListener::bind(listen).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Err(DemoError::PortTaken { port: listen.port() }),
        Err(error) => Err(error.into()),
    }
}

/// This binary as `serve` with the flags that the demo was given. Its log goes to a file, so that
/// the demo's own lines can be read.
async fn spawn(log: &Path) -> Result<Child, DemoError> {
    let out: File = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(log)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(serve_arguments(std::env::args_os().skip(1)));
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    Ok(children::Spawner::start()?.spawn(command, Signal::SIGTERM).await?)
}

/// The demo's arguments as those of `serve`.
fn serve_arguments(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let (mut kept, mut renamed, mut skip) = (Vec::new(), false, false);
    for argument in arguments {
        if std::mem::take(&mut skip) {
            continue;
        }
        let text = argument.to_string_lossy();
        if !renamed && text == "demo" {
            renamed = true;
            kept.push("serve".into());
        } else if OWN_FLAGS.contains(&text.as_ref()) {
            skip = true;
        } else if !OWN_FLAGS.iter().any(|flag| text.strip_prefix(flag).is_some_and(|rest| rest.starts_with('='))) {
            kept.push(argument);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_gets_the_flags_that_it_has() {
        let given = [
            "--log",
            "warn",
            "demo",
            "--corpus",
            "a.txt",
            "--listen",
            "127.0.0.1:9000",
            "--instructions=b.json",
            "--seed",
            "2",
            "--data-dir",
            "demo",
        ];
        let kept = serve_arguments(given.iter().map(OsString::from));
        assert_eq!(kept, ["--log", "warn", "serve", "--listen", "127.0.0.1:9000", "--data-dir", "demo"]);
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = taken.local_addr().expect("it is bound");
        let refusal = refuse_if_taken(address).await.expect_err("it is taken").to_string();
        assert!(refusal.contains(&address.port().to_string()), "{refusal}");
    }

    #[test]
    fn an_unspecified_address_is_reached_on_loopback() {
        assert_eq!(reachable("0.0.0.0:80".parse().expect("an address")).to_string(), "127.0.0.1:80");
    }
}
