//! Waiting for a database that may never answer.
//!
//! PostgreSQL ends slow statements itself, but a server that stands still, or a network that swallows
//! packets, answers nothing at all, and sqlx would wait for ever. An answer wakes whoever waits for it; so
//! a future that nothing has woken for long waits for something that does not come, and is given up
//! ([`unless_stuck`]). What waits for something else that may take long says so ([`patient`]).

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use sqlx::{
    Connection, PgConnection,
    postgres::{PgListener, PgNotification, PgPoolOptions},
};
use tokio::task::JoinError;

/// How long nothing may be heard before waiting is given up. Longer than any statement of the api's may take.
pub const STUCK: Duration = Duration::from_secs(15);

/// Patience shows this often.
const SIGN: Duration = Duration::from_secs(1);

/// How long a connection may take to say that it is in order.
const PING: Duration = Duration::from_secs(5);

/// A listener that has heard nothing for so long asks whether its connection still stands.
const SILENCE: Duration = Duration::from_secs(30);

/// Nothing woke the future in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the database does not answer")]
pub struct Stuck;

impl From<Stuck> for sqlx::Error {
    fn from(stuck: Stuck) -> sqlx::Error {
        sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, stuck))
    }
}

/// The future's output, unless nothing wakes it for `limit`; then it is dropped.
pub async fn unless_stuck<F: Future>(limit: Duration, future: F) -> Result<F::Output, Stuck> {
    let mut future = pin!(future);
    let mut silence = pin!(tokio::time::sleep(limit));
    let bell = Arc::new(Bell { rung: AtomicBool::new(true), whom: Mutex::default() });
    let waker = Waker::from(bell.clone());
    poll_fn(|cx| {
        bell.hang(cx.waker());
        // Polled for something else in the same task, the future has not been woken.
        if bell.rung.swap(false, Ordering::AcqRel) {
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Poll::Ready(Ok(output));
            }
            silence.as_mut().reset(tokio::time::Instant::now() + limit);
        }
        silence.as_mut().poll(cx).map(|()| Err(Stuck))
    })
    .await
}

/// Remembers that a future was woken, and wakes whoever polls it.
struct Bell {
    rung: AtomicBool,
    whom: Mutex<Option<Waker>>,
}

impl Bell {
    fn hang(&self, waker: &Waker) {
        let mut whom = self.whom.lock().unwrap_or_else(PoisonError::into_inner);
        if !whom.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *whom = Some(waker.clone());
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        let whom = self.whom.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(waker) = whom {
            waker.wake();
        }
    }
}

/// What the database answers, or that it does not.
pub async fn answered<T, E: From<sqlx::Error>>(question: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    unless_stuck(STUCK, question).await.unwrap_or_else(|stuck| Err(sqlx::Error::from(stuck).into()))
}

/// The same future; who waits for it knows that it may take long.
pub async fn patient<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        tokio::select! {
            biased;
            output = &mut future => return output,
            () = tokio::time::sleep(SIGN) => {}
        }
    }
}

/// Runs work on the threads that may block, as long as it takes.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    patient(tokio::task::spawn_blocking(work)).await
}

/// A pool that closes connections which come back in the middle of something and do not get out of it; by
/// itself it would wait for them, and in the end have none left. It asks each of them once more, without a
/// deadline that could be set: what is lost between the two questions is given back when TCP gives up.
pub fn pool_options() -> PgPoolOptions {
    PgPoolOptions::new().after_release(|conn, _| Box::pin(is_in_order(conn)))
}

async fn is_in_order(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    match tokio::time::timeout(PING, conn.ping()).await {
        Ok(answered) => answered.map(|()| true),
        Err(_) => Err(Stuck.into()),
    }
}

/// The next notification; `None`: some may have been lost. A connection that no longer carries anything
/// looks like one with nothing to tell, so a long silence is asked about.
pub async fn notification(listener: &mut PgListener) -> Result<Option<PgNotification>, sqlx::Error> {
    loop {
        match tokio::time::timeout(SILENCE, listener.try_recv()).await {
            Ok(heard) => return heard,
            Err(_) => match tokio::time::timeout(PING, sqlx::query("SELECT 1").execute(&mut *listener)).await {
                Ok(answered) => _ = answered?,
                Err(_) => return Err(Stuck.into()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn what_nothing_wakes_is_given_up() {
        let began = Instant::now();
        assert_eq!(unless_stuck(LIMIT, std::future::pending::<()>()).await, Err(Stuck));
        assert!(began.elapsed() >= LIMIT);
    }

    #[tokio::test]
    async fn what_is_woken_now_and_then_may_take_long() {
        let slow = async {
            for _ in 0..10 {
                tokio::time::sleep(LIMIT / 4).await;
            }
            7
        };
        assert_eq!(unless_stuck(LIMIT, slow).await, Ok(7));
    }

    #[tokio::test]
    async fn what_else_goes_on_in_its_task_wakes_nothing() {
        let others = async {
            loop {
                tokio::time::sleep(LIMIT / 4).await;
            }
        };
        tokio::select! {
            biased;
            given_up = unless_stuck(LIMIT, std::future::pending::<()>()) => assert_eq!(given_up, Err(Stuck)),
            () = others => {}
            () = tokio::time::sleep(LIMIT * 20) => panic!("it waits for ever"),
        }
    }

    #[tokio::test]
    async fn patience_is_told() {
        let work = async { blocking(|| std::thread::sleep(SIGN * 2)).await.is_ok() };
        assert_eq!(unless_stuck(SIGN + LIMIT, work).await, Ok(true));
    }
}
