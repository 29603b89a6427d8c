//! `lathe demo`: an ordinary client of the API that trains, tunes and asks a small model.

use crate::config::DemoConfig;

/// Runs the demo and goes on serving until `shutdown`.
pub async fn run(_config: DemoConfig, shutdown: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
    shutdown.await;
    Ok(())
}
