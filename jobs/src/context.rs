//! What a runner is told and what its tasks share.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use sqlx::PgPool;
use tokio::sync::{Notify, broadcast, watch};

use crate::{
    artifacts::{Artifacts, bucket::Bucket},
    housekeeping,
    internal_addr::InternalAddr,
    machine, waiting,
};

#[derive(Clone, Debug)]
pub struct RunnerConfig {
    pub database_url: String,
    /// The folder of the artifact store: without a bucket, the same for every process of an installation.
    pub artifacts: PathBuf,
    /// Where artifacts lie, if not in the folder alone.
    pub bucket: Option<Bucket>,
    /// Shown in `runners`; by default the host's name.
    pub name: String,
    /// After this time without a heartbeat a runner has lost its jobs.
    pub lease_seconds: f64,
    /// Jobs of the light pool that run at a time.
    pub light_slots: usize,
    /// Whether jobs that need a device are taken here.
    pub offer_devices: bool,
    /// Ranks that run on this machine's cores at a time, which are divided among them; GPUs are one each.
    pub cpu_slots: usize,
    /// Where engines listen.
    pub internal_addr: InternalAddr,
    pub deterministic_decode: bool,
    /// Replicas that nobody has used for so long are unloaded.
    pub idle_seconds: f64,
    /// Memory that replicas may take together.
    pub replica_memory_bytes: u64,
    /// A worker that shows no sign of progress for so long is killed.
    pub stall: Duration,
    /// Free bytes of the artifacts' disk below which no job is claimed.
    pub disk_low_bytes: u64,
    /// How many times its size a compressed file may unfold to.
    pub decompression_ratio: u64,
    /// Entries of the audit log are kept for so many days.
    pub audit_days: u16,
    /// The newest migration that this binary knows; none: whatever the database is at will do.
    pub schema_version: Option<i64>,
    /// The collector that engines send their traces to.
    pub otlp_endpoint: Option<String>,
    /// Told what to log from now on; none: what the process was started with.
    pub log: fn(Option<&str>),
    /// The binary whose `worker` and `engine` are started.
    pub program: PathBuf,
}

impl RunnerConfig {
    /// The defaults, for a runner of this machine.
    pub fn new(database_url: impl Into<String>, artifacts: impl Into<PathBuf>) -> RunnerConfig {
        RunnerConfig {
            database_url: database_url.into(),
            artifacts: artifacts.into(),
            bucket: None,
            name: machine::host(),
            lease_seconds: 10.0,
            light_slots: 2,
            offer_devices: true,
            cpu_slots: 1,
            internal_addr: InternalAddr::LOOPBACK,
            deterministic_decode: false,
            idle_seconds: 600.0,
            replica_memory_bytes: machine::memory_bytes() / 2,
            stall: Duration::from_secs(1800),
            disk_low_bytes: 1 << 30,
            decompression_ratio: 100,
            audit_days: 365,
            schema_version: None,
            otlp_endpoint: None,
            log: |_| {},
            program: std::env::current_exe().unwrap_or_else(|_| "lathe".into()),
        }
    }
}

/// What the tasks of a runner share.
pub struct Context {
    pub db: PgPool,
    pub artifacts: Artifacts,
    pub config: RunnerConfig,
    pub runner_id: String,
    /// Set once, when the runner is to stop.
    pub(crate) stopping: watch::Receiver<bool>,
    /// Set once, when it can wait no longer.
    pub(crate) gone: watch::Receiver<bool>,
    /// Less of the artifacts' disk is free than must stay free.
    pub(crate) disk_low: watch::Sender<bool>,
    /// The schema is newer than this binary: no more work is taken.
    pub(crate) outdated: AtomicBool,
    /// Work may be there.
    pub(crate) wake: Notify,
    /// Replicas may be there.
    pub wake_replicas: Notify,
    /// Ids of jobs that changed.
    pub(crate) spoken_of: broadcast::Sender<String>,
}

impl Context {
    /// Resolves when the runner is to stop.
    pub async fn must_stop(&self) {
        raised(self.stopping.clone()).await;
    }

    /// Resolves when a stopping runner can wait no longer.
    pub async fn must_go(&self) {
        raised(self.gone.clone()).await;
    }

    /// Resolves when the disk of the artifacts is nearly full.
    pub async fn disk_is_low(&self) {
        raised(self.disk_low.subscribe()).await;
    }

    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Whether jobs and replicas are still claimed.
    pub(crate) fn takes_work(&self) -> bool {
        !self.is_stopping() && !self.outdated.load(Ordering::Relaxed)
    }

    /// Whether the disk is nearly full now, for everyone who waits for it. One that cannot be read is not.
    pub(crate) async fn look_at_disk(&self) -> bool {
        let (artifacts, low_bytes) = (self.artifacts.clone(), self.config.disk_low_bytes);
        let found = waiting::blocking(move || housekeeping::disk_state(&artifacts, low_bytes)).await;
        let low = matches!(found, Ok(Ok(disk)) if disk.low);
        let changed = self.disk_low.send_if_modified(|known| std::mem::replace(known, low) != low);
        match (changed, low) {
            (true, true) => {
                tracing::warn!("the disk of the artifacts is nearly full: trainings save and wait, no job is claimed")
            }
            (true, false) => tracing::info!("the disk of the artifacts has room again"),
            (false, _) => {}
        }
        low
    }
}

async fn raised(mut flag: watch::Receiver<bool>) {
    if flag.wait_for(|raised| *raised).await.is_err() {
        // Nobody is left to raise it.
        std::future::pending::<()>().await;
    }
}
