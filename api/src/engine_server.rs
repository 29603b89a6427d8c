//! `lathe engine`: one replica of a model.

use crate::config::EngineArgs;

/// Loads the model and serves it until `shutdown`.
pub async fn run(_config: EngineArgs, shutdown: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
    shutdown.await;
    Ok(())
}
