//! The workers of an attempt with several ranks.
//!
//! The first rank speaks for all, so its worker is talked with like any other ([`super::conversation`]); the others only
//! tell how far they are. They meet in a store that this process holds. A rank that ends before the first, and not well, ends the
//! attempt: the others would wait for it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use lathe_model::{
    protocol::{Exit, Membership, Report, Task, WorkerSpec},
    shim::c10d::Store,
};
use tokio::task::JoinSet;

use super::attempt::Attempt;
use crate::{
    child::{Child, Start, crash_message},
    devices::Device,
    events, waiting,
};

/// Ranks of one machine meet here.
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const STORE_TIMEOUT: Duration = Duration::from_secs(60);

/// The ranks after the first. Dropped, they are killed.
pub struct Members {
    /// Where all ranks meet; it must outlive them.
    _store: Option<Store>,
    running: JoinSet<Option<String>>,
}

impl Members {
    /// Of a job with one rank.
    pub fn none() -> Members {
        Members { _store: None, running: JoinSet::new() }
    }

    /// Makes `first` the first rank of a gang on these devices, and starts the others by `start`.
    ///
    /// # Errors
    /// With a sentence for the log.
    pub async fn start(
        attempt: &Arc<Attempt>,
        first: &mut WorkerSpec,
        devices: &[Device],
        start: impl Fn(&WorkerSpec) -> Start,
    ) -> Result<Members, String> {
        if devices.len() < 2 {
            return Ok(Members::none());
        }
        let listener = TcpListener::bind((ADDRESS, 0)).map_err(|error| error.to_string())?;
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        let store = waiting::blocking(move || Store::host(listener, STORE_TIMEOUT)).await.map_err(|error| error.to_string())?;
        let store = store.map_err(|error| error.to_string())?;
        let mut running = JoinSet::new();
        for (rank, device) in devices.iter().enumerate().skip(1) {
            let worker = as_rank(first, rank, device, address);
            let (spec, start) = (serde_json::to_string(&worker).map_err(|error| error.to_string())?, start(&worker));
            let log = start.log.clone();
            let mut child = Child::start(start).await.map_err(|error| error.to_string())?;
            child.tell(&spec).await;
            running.spawn(attend(attempt.clone(), rank, child, log));
        }
        *first = as_rank(first, 0, &devices[0], address);
        Ok(Members { _store: Some(store), running })
    }

    /// Resolves, with a sentence, once one of them has ended otherwise than by its work or by what it was told.
    pub async fn lost(&mut self) -> String {
        while let Some(ended) = self.running.join_next().await {
            match ended {
                Ok(None) => {}
                Ok(Some(lost)) => return lost,
                Err(error) => return format!("The task that attends a rank ended by itself: {error}."),
            }
        }
        std::future::pending().await
    }
}

fn as_rank(worker: &WorkerSpec, rank: usize, device: &Device, store: SocketAddr) -> WorkerSpec {
    let mut worker = worker.clone();
    worker.threads = device.threads;
    if let Task::Train(task) = &mut worker.task {
        task.device = device.choice;
        task.gang = Some(Membership { rank, store, address: ADDRESS.to_string() });
    }
    worker
}

/// Hears a rank until it ends; a sentence if that is a loss.
async fn attend(attempt: Arc<Attempt>, rank: usize, mut child: Child, log: impl AsRef<Path>) -> Option<String> {
    let (mut line, mut failure) = (Vec::new(), None);
    while child.report(&mut line).await.unwrap_or(false) {
        match serde_json::from_slice(&std::mem::take(&mut line)) {
            Ok(Report::Progress { step, .. }) => {
                attempt.steps[rank].store(i64::try_from(step).unwrap_or(i64::MAX), Ordering::Relaxed);
            }
            Ok(Report::Failed { failure: reason }) => failure = Some(events::clean(&reason.message)),
            _ => {}
        }
    }
    let status = child.wait().await;
    let code = status.as_ref().ok().and_then(|status| status.code());
    if [Exit::Done, Exit::Stopped].iter().any(|&exit| code == Some(exit as i32)) {
        return None;
    }
    Some(failure.map_or_else(
        || crash_message(&format!("worker of rank {rank}"), status, log.as_ref()),
        |reason| format!("Rank {rank} failed: {reason}"),
    ))
}
