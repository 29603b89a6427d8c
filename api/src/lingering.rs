//! The part of a request's body that its handler does not read.
//!
//! Most clients read no answer before they have sent their whole body, so a connection that ends with the
//! refusal of a large upload shows them a broken pipe in the answer's place, which SDKs take for a fault of
//! the network and try again. What is left of such a body is therefore read and thrown away, for
//! [`TOTAL`] at most and as long as it keeps coming; then the connection ends.
//!
//! Nothing is read for a client that waits to be told to send (`Expect: 100-continue`).

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Bytes,
    http::{HeaderMap, header},
};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio_util::sync::CancellationToken;

use crate::connection::Answering;

/// How long an unwanted body may take, and how long it may pause.
const TOTAL: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(5);

/// A request's body, of which whatever is unread when it is dropped is read to its end in the background.
pub struct Lingering {
    body: Option<Incoming>,
    waits_to_be_told: bool,
    /// Ends the reading of what nobody wants.
    shutdown: CancellationToken,
    /// A request is being answered until its body has arrived.
    answering: Arc<Answering>,
}

impl Lingering {
    pub fn new(headers: &HeaderMap, body: Incoming, answering: Arc<Answering>, shutdown: CancellationToken) -> Lingering {
        Lingering { body: Some(body), waits_to_be_told: headers.contains_key(header::EXPECT), shutdown, answering }
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !body.is_end_stream() && !self.waits_to_be_told) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (shutdown, answering) = (self.shutdown.clone(), self.answering.clone());
        runtime.spawn(async move {
            let rest = async { while let Ok(Some(Ok(_))) = tokio::time::timeout(PAUSE, body.frame()).await {} };
            tokio::select! {
                () = shutdown.cancelled() => {}
                _ = tokio::time::timeout(TOTAL, rest) => {}
            }
            drop(answering);
        });
    }
}

impl Body for Lingering {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.get_mut().body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}
