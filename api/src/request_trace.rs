//! A request's span, named as OpenTelemetry's conventions for HTTP have it: from its head to the last byte of its
//! answer. A trace that the client has begun goes on in it, recorded or not as the client decided.

use std::{
    collections::HashMap,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, Method, StatusCode, Uri},
    response::Response,
};
use hyper::body::{Frame, SizeHint};
use lathe_jobs::trace::{self, KeyValue, Span, SpanKind};

/// Of a request that has just come, with the id that its answer will have. `route` is as the document writes it.
/// Probes have none: they would be most of what is recorded.
pub fn begin(headers: &HeaderMap, method: &Method, uri: &Uri, route: Option<&str>, id: &str) -> Span {
    if matches!(route, Some("/healthz" | "/readyz" | "/metrics")) {
        return Span::default();
    }
    let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
    let (named, method) = if known.contains(method) { (method.as_str(), method.as_str()) } else { ("HTTP", "_OTHER") };
    let name = route.map_or_else(|| named.to_owned(), |route| format!("{named} {route}"));
    Span::begin(SpanKind::Server, name, &parent(headers), || {
        let mut attributes = vec![
            KeyValue::new("http.request.method", method.to_owned()),
            KeyValue::new("url.scheme", "http"),
            KeyValue::new("url.path", uri.path().to_owned()),
            KeyValue::new("request.id", id.to_owned()),
        ];
        attributes.extend(route.map(|route| KeyValue::new("http.route", route.to_owned())));
        attributes
    })
}

/// What a request's headers say of where it comes from.
pub fn parent(headers: &HeaderMap) -> trace::Context {
    if !trace::is_on() {
        return trace::Context::new();
    }
    let said = ["traceparent", "tracestate"].into_iter().filter_map(|name| {
        let value = headers.get(name)?.to_str().ok()?;
        Some((name.to_owned(), value.to_owned()))
    });
    trace::received(&said.collect::<HashMap<_, _>>())
}

/// Notes what a request was answered.
pub fn answered(span: &Span, status: StatusCode) {
    span.set("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.fail(status.as_str().to_owned());
    }
}

/// The answer, with whose body the span ends.
pub fn until_sent(span: Span, answer: Response) -> Response {
    if !trace::is_on() {
        return answer;
    }
    answer.map(|body| Body::new(Sent { body, span }))
}

/// A body that is made within a span.
struct Sent {
    body: Body,
    span: Span,
}

impl hyper::body::Body for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let _within = this.span.context().attach();
        Pin::new(&mut this.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
