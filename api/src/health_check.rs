//! `lathe health`: asks the api on this machine whether it lives, for whoever watches a container.
//!
//! `/healthz` alone: an api whose database is away is restarted by nobody, since that would mend nothing.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

/// Longer than a busy api takes, shorter than a watcher waits.
const PATIENCE: Duration = Duration::from_secs(4);

/// # Errors
/// Where nothing answers, or something else than a healthy api.
pub async fn run(listen: SocketAddr) -> Result<(), reqwest::Error> {
    let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build()?;
    client.get(format!("http://{}/healthz", reachable(listen))).send().await?.error_for_status()?;
    Ok(())
}

/// Where a client on this machine finds a server that listens there.
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    match listen {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, v6.port()).into(),
        named => named,
    }
}
