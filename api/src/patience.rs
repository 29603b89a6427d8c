//! No request waits for ever for a database that answers nothing.
//!
//! A handler that nothing has woken for long is given up, and its request answered 503 (see
//! [`lathe_jobs::waiting`]). A client that is slow to send its body is none of that: how long it may pause
//! is decided elsewhere.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use hyper::body::{Frame, SizeHint};
use lathe_jobs::waiting::unless_stuck;
use tokio::time::Interval;

use crate::{problem::ApiError, state::AppState};

/// While a body pauses, its handler is woken this often.
const SIGN: Duration = Duration::from_secs(1);

/// Middleware: 503 for a request whose handler is stuck.
pub async fn bound(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let request = request.map(|body| Body::new(Expected { body, sign: None }));
    match unless_stuck(state.config.stuck_after, next.run(request)).await {
        Ok(answer) => answer,
        Err(stuck) => ApiError::from(sqlx::Error::from(stuck)).into_response(),
    }
}

/// A body whose reader is woken now and then while it waits for the client.
struct Expected {
    body: Body,
    sign: Option<Interval>,
}

impl hyper::body::Body for Expected {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        if frame.is_pending() {
            let sign = this.sign.get_or_insert_with(|| tokio::time::interval(SIGN));
            while sign.poll_tick(cx).is_ready() {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
