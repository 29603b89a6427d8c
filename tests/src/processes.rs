//! The processes of one stack, found by the data directory in their environment, or by their log.

use std::{fs, path::Path};

use nix::unistd::Pid;

/// What a process of the stack does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Serve,
    Api,
    Runner,
    Worker,
    Engine,
    /// The embedded database's postmaster.
    Postgres,
}

/// A process and what it does; None for a kind of no interest, as a database's backend is.
pub fn of_stack(data_dir: &Path) -> Vec<(Pid, Option<Kind>)> {
    let marker = format!("LATHE_DATA_DIR={}", data_dir.display());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = processes.filter_map(|entry| Some((entry.path(), entry.file_name().to_str()?.parse::<i32>().ok()?)));
    let ours = numbered.filter(|(process, _)| {
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        // Workers and engines see little of the environment, but their standard error lies there.
        let logs_there = || fs::read_link(process.join("fd/2")).is_ok_and(|log| log.starts_with(data_dir));
        environment.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes()) || logs_there()
    });
    ours.filter_map(|(process, pid)| Some((Pid::from_raw(pid), kind(&process)?))).collect()
}

/// What runs on this data directory, for a stack that no [`crate::TestApp`] started.
pub fn still_running(data_dir: &Path) -> Vec<Pid> {
    of_stack(data_dir).into_iter().map(|(pid, _)| pid).collect()
}

/// None for a process that has just ended.
fn kind(process: &Path) -> Option<Option<Kind>> {
    let command = fs::read(process.join("cmdline")).ok().filter(|command| !command.is_empty())?;
    let mut words = command.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let (program, first) = (words.next()?, words.next().unwrap_or_default());
    let kind = match (program.rsplit('/').next()?, first.as_str()) {
        ("postgres", "-D") => Kind::Postgres,
        ("lathe", "serve") => Kind::Serve,
        ("lathe", "api") => Kind::Api,
        ("lathe", "runner") => Kind::Runner,
        ("lathe", "worker") => Kind::Worker,
        ("lathe", "engine") => Kind::Engine,
        _ => return Some(None),
    };
    Some(Some(kind))
}
