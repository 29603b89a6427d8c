//! Where a runner's engines and ranks listen, so that the other processes of an installation reach them.
//!
//! Never beyond what was asked for: an address that was named is taken as it is, and `auto` opens one
//! interface, that which already carries the database's traffic.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use sqlx::postgres::PgConnectOptions;
use tokio::net::{UdpSocket, lookup_host};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InternalAddr {
    /// The address from which this machine reaches the database; loopback where the database is local.
    Auto,
    Named(IpAddr),
}

impl InternalAddr {
    pub const LOOPBACK: InternalAddr = InternalAddr::Named(IpAddr::V4(Ipv4Addr::LOCALHOST));

    /// The address now: that of a container or a laptop may change while its runner lives.
    ///
    /// # Errors
    /// Where the database's name is not known or no route leads to it.
    pub async fn resolve(self, database: &PgConnectOptions) -> io::Result<IpAddr> {
        match self {
            InternalAddr::Named(address) => Ok(address),
            InternalAddr::Auto if database.get_socket().is_some() || database.get_host().starts_with('/') => {
                Ok(IpAddr::V4(Ipv4Addr::LOCALHOST))
            }
            InternalAddr::Auto => facing(database.get_host(), database.get_port()).await,
        }
    }
}

/// This machine's own address on the way to `host`. Connecting a datagram socket sends nothing: the
/// system only chooses the route.
async fn facing(host: &str, port: u16) -> io::Result<IpAddr> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for there in lookup_host((host.trim_matches(['[', ']']), port)).await? {
        let any: IpAddr = if there.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let chosen = async {
            let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
            socket.connect(there).await?;
            socket.local_addr()
        };
        match chosen.await {
            Ok(here) => return Ok(here.ip()),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

impl FromStr for InternalAddr {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<InternalAddr, &'static str> {
        match text {
            "auto" => Ok(InternalAddr::Auto),
            _ => text.parse().map(InternalAddr::Named).map_err(|_| "an IP address, or auto"),
        }
    }
}

impl fmt::Display for InternalAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InternalAddr::Auto => f.write_str("auto"),
            InternalAddr::Named(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn auto_faces_the_database() {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let options = PgConnectOptions::new_without_pgpass();
        for database in [options.clone().host("127.0.0.1"), options.clone().socket("/run/postgresql")] {
            assert_eq!(InternalAddr::Auto.resolve(&database).await.ok(), Some(loopback));
        }
        let named = IpAddr::from([192, 0, 2, 7]);
        assert_eq!(InternalAddr::Named(named).resolve(&options.clone().host("127.0.0.1")).await.ok(), Some(named));
        let nowhere = options.host("no-such-host.invalid");
        assert!(InternalAddr::Auto.resolve(&nowhere).await.is_err());
    }

    #[test]
    fn what_is_written_is_read() {
        for text in ["auto", "127.0.0.1", "::1"] {
            assert_eq!(text.parse::<InternalAddr>().map(|address| address.to_string()), Ok(text.to_owned()));
        }
        assert!("eth0".parse::<InternalAddr>().is_err());
    }
}
