//! A connection as the server reads it: a request's head must arrive in time once it has begun, and a
//! connection that waits for its next request is left alone for longer.
//!
//! hyper's own limit begins when a connection starts to wait for a head, so by itself it would either be
//! long or end connections that clients keep, in the very moment in which they send on them. Here hyper
//! has the long one, [`KEEP_ALIVE`], and [`Timed`] the one for a head that has begun.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

/// How long a connection may wait for its next request.
pub const KEEP_ALIVE: Duration = Duration::from_secs(120);

/// Whether a request is being answered; shared by a connection and the requests on it.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<AtomicBool>);

impl Activity {
    /// From a request's head until its answer and its body are done with, and so what this returns is dropped.
    pub fn begin(&self) -> Arc<Answering> {
        self.0.store(true, Ordering::Release);
        Arc::new(Answering(self.clone()))
    }
}

/// Held while a request is being answered.
#[derive(Debug)]
pub struct Answering(Activity);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Release);
    }
}

/// An answer's body, with which the answering ends.
pub struct Answer {
    body: axum::body::Body,
    _answering: Arc<Answering>,
}

impl Answer {
    pub fn new(body: axum::body::Body, answering: Arc<Answering>) -> Answer {
        Answer { body, _answering: answering }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A head is arriving, or is to arrive on a new connection.
    Head,
    Answering,
    /// Nothing of the next head has come.
    Idle,
}

/// The socket of a connection. Reading fails with [`io::ErrorKind::TimedOut`] once a head has been
/// arriving for too long.
pub struct Timed<Io> {
    io: Io,
    activity: Activity,
    limit: Duration,
    phase: Phase,
    deadline: Pin<Box<Sleep>>,
}

impl<Io> Timed<Io> {
    /// `limit`: time for a head, from its first byte, the first one's from now.
    pub fn new(io: Io, activity: Activity, limit: Duration) -> Timed<Io> {
        Timed { io, activity, limit, phase: Phase::Head, deadline: Box::pin(tokio::time::sleep(limit)) }
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for Timed<Io> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.phase = match this.phase {
            _ if this.activity.0.load(Ordering::Acquire) => Phase::Answering,
            Phase::Answering => Phase::Idle,
            other => other,
        };
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buffer);
        match this.phase {
            Phase::Head if read.is_pending() && this.deadline.as_mut().poll(cx).is_ready() => {
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            Phase::Idle if buffer.filled().len() > before => {
                this.phase = Phase::Head;
                this.deadline.as_mut().reset(Instant::now() + this.limit);
                read
            }
            Phase::Head | Phase::Idle | Phase::Answering => read,
        }
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for Timed<Io> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
