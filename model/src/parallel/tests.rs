//! Collectives between processes, and the pure parts.

mod collectives;
mod layouts;
mod schedules;

use std::{
    env,
    net::{SocketAddr, TcpListener},
    process::{Command, Stdio},
    time::Duration,
};

use crate::shim::c10d::Store;

const LOOPBACK: &str = "127.0.0.1";
const TIMEOUT: Duration = Duration::from_secs(60);

/// Gangs that the ranks of a test may form, one after the other, each of which wants a store of its own.
const STORES: usize = 16;

/// Runs `body` with the addresses of stores and each of the numbers below `ranks`, in a process of its own for each: `test`,
/// which is the caller's full name, started anew.
pub(crate) fn in_ranks(test: &str, ranks: usize, body: impl FnOnce([SocketAddr; STORES], usize)) {
    let variable = |name: &str| env::var(name).ok();
    if let (Some(rank), Some(stores)) = (variable("LATHE_TEST_RANK"), variable("LATHE_TEST_STORES")) {
        tch::set_num_threads(1);
        let stores: Vec<SocketAddr> = stores.split(' ').map(|address| address.parse().unwrap()).collect();
        return body(stores.try_into().unwrap(), rank.parse().unwrap());
    }
    let listeners: [TcpListener; STORES] = std::array::from_fn(|_| TcpListener::bind((LOOPBACK, 0)).unwrap());
    let addresses = listeners.iter().map(|listener| listener.local_addr().unwrap().to_string()).collect::<Vec<_>>().join(" ");
    let _stores = listeners.map(|listener| Store::host(listener, TIMEOUT).unwrap());
    let start = |rank: usize| {
        Command::new(env::current_exe().unwrap())
            .args([test, "--exact"])
            .envs([("LATHE_TEST_RANK", rank.to_string()), ("LATHE_TEST_STORES", addresses.clone())])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let started: Vec<_> = (0..ranks).map(start).collect();
    let ended: Vec<_> = started.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    for (rank, output) in ended.iter().enumerate() {
        let [said, complained] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        assert!(output.status.success() && said.contains("1 passed"), "rank {rank}: {said}{complained}");
    }
}
