//! A network between a stack and its database that can be cut: what is sent is swallowed, and no
//! connection is told.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use sqlx::postgres::PgConnectOptions;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

#[derive(Debug, Default)]
struct State {
    frozen: bool,
    /// Freezes when a client sends this.
    trigger: Option<String>,
}

/// Forwards connections until the process ends, on a thread of its own: tests block theirs.
#[derive(Clone, Debug)]
pub struct Network {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Network {
    /// To the server of these options, which must listen on TCP.
    pub fn to(server: &PgConnectOptions) -> Network {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("it is a socket");
        let network = Network { address: listener.local_addr().expect("it listens"), state: Arc::default() };
        let (target, state) = ((server.get_host().to_owned(), server.get_port()), network.state.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(accept(listener, target, state));
        });
        network
    }

    /// To the server that `DATABASE_URL` names.
    pub fn to_database() -> Network {
        let url = std::env::var("DATABASE_URL").expect("a database, as .ci/with_postgres.py starts one");
        Network::to(&url.parse().expect("DATABASE_URL is an address"))
    }

    /// The way to the same database over this network.
    pub fn through(&self, options: PgConnectOptions) -> PgConnectOptions {
        options.host("127.0.0.1").port(self.address.port())
    }

    pub fn is_frozen(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).frozen
    }

    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Nothing passes any more. A connection that has lost something stays dead.
    pub fn freeze(&self) {
        self.set(State { frozen: true, trigger: None });
    }

    /// Freezes as soon as a client sends `text`, which does not arrive.
    pub fn freeze_at(&self, text: &str) {
        self.set(State { frozen: false, trigger: Some(text.to_owned()) });
    }

    /// New connections work again, and those that have lost nothing.
    pub fn thaw(&self) {
        self.set(State::default());
    }
}

async fn accept(listener: std::net::TcpListener, target: (String, u16), state: Arc<Mutex<State>>) {
    let listener = TcpListener::from_std(listener).expect("it is one");
    while let Ok((client, _)) = listener.accept().await {
        let server = TcpStream::connect(&target).await.expect("the database listens");
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::spawn(forward(from_client, to_server, state.clone(), true));
        tokio::spawn(forward(from_server, to_client, state.clone(), false));
    }
}

async fn forward(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, state: Arc<Mutex<State>>, is_client: bool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if swallows(&state, &buffer[..read], is_client) {
            // Both ends stay open, and neither is told.
            std::future::pending::<()>().await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

fn swallows(state: &Mutex<State>, sent: &[u8], is_client: bool) -> bool {
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let meets = |text: &String| is_client && sent.windows(text.len()).any(|part| part == text.as_bytes());
    if state.trigger.as_ref().is_some_and(meets) {
        *state = State { frozen: true, trigger: None };
    }
    state.frozen
}
