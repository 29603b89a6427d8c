//! A host's runner.

use std::{net::IpAddr, path::PathBuf};

/// What a runner is told from outside.
#[derive(Clone, Debug)]
pub struct RunnerConfig {
    pub database_url: String,
    /// The artifact store's folder.
    pub artifacts: PathBuf,
    /// Seconds after which a runner that is not heard of has lost its jobs.
    pub lease_seconds: f64,
    /// Where engines and ranks listen.
    pub internal_addr: IpAddr,
    /// Engines decode in batches of one fixed shape.
    pub deterministic_decode: bool,
}

/// Takes jobs and serves models until `shutdown`; then interrupts them, checkpoints released, within
/// eight seconds.
pub async fn run(_config: RunnerConfig, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), sqlx::Error> {
    shutdown.await;
    Ok(())
}
