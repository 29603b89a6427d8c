//! One LISTEN per process for all streams of events.
//!
//! A notification is a hint: whoever waits looks into the database again, and does so too after a
//! while without one, so that a notification lost with its connection costs seconds, never an event.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use lathe_jobs::{events::CHANNEL, waiting};
use sqlx::{PgPool, postgres::PgListener};
use tokio::sync::broadcast;

/// Notifications that a slow stream may fall behind; beyond that it looks into the database anyway.
const BACKLOG: usize = 1024;

/// How long a stream waits before it looks without having been told.
const POLL: Duration = Duration::from_secs(5);

/// Pause before a lost connection is tried again.
const RECONNECT: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct EventHub(OnceLock<broadcast::Sender<Arc<str>>>);

impl EventHub {
    /// Registers interest in a job; query only afterwards, so that nothing falls between.
    pub fn subscribe(&self, db: &PgPool, job_id: &str) -> Subscription {
        let sender = self.0.get_or_init(|| {
            let (sender, _) = broadcast::channel(BACKLOG);
            tokio::spawn(listen(db.clone(), sender.clone()));
            sender
        });
        Subscription { receiver: sender.subscribe(), job_id: job_id.to_owned() }
    }
}

/// Passes notifications on until the pool is closed.
async fn listen(db: PgPool, sender: broadcast::Sender<Arc<str>>) {
    while !db.is_closed() {
        if let Err(error) = pass_on(&db, &sender).await {
            tracing::warn!(%error, "listening for events broke off");
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

async fn pass_on(db: &PgPool, sender: &broadcast::Sender<Arc<str>>) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(db).await?;
    listener.listen(CHANNEL).await?;
    loop {
        // `None`: the connection was lost and made anew, and what was sent meanwhile is gone.
        let Some(notification) = waiting::notification(&mut listener).await? else { continue };
        // Nobody listening is no error.
        let _ = sender.send(notification.payload().into());
    }
}

pub struct Subscription {
    receiver: broadcast::Receiver<Arc<str>>,
    job_id: String,
}

impl Subscription {
    /// Returns when the job may have something new, spurious returns included.
    pub async fn changed(&mut self) {
        let told = async {
            loop {
                match self.receiver.recv().await {
                    Ok(job_id) if *job_id == *self.job_id => return,
                    Ok(_) => {}
                    Err(broadcast::error::RecvError::Lagged(_)) => return,
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        // Either way the caller looks again.
        let _ = tokio::time::timeout(POLL, told).await;
    }
}
