//! Traces: spans of OpenTelemetry from a request to the steps of the job that it made.
//!
//! Off until [`on`] is called, and then nothing is recorded, no context is looked at and nothing is written
//! down. Spans are handed to whatever the process has installed as its tracer; nothing here waits for it or
//! fails with it. A context goes from process to process as the headers of W3C Trace Context, and from a
//! request to its job in the job's row.

use std::{collections::HashMap, sync::OnceLock, time::SystemTime};

pub use opentelemetry::{Context, KeyValue, Value, context::FutureExt, trace::SpanKind};
use opentelemetry::{
    global::{self, BoxedTracer},
    trace::{Span as _, SpanBuilder, Status, TraceContextExt, Tracer},
};

/// The header, and the name of the column, that carry a context.
const TRACEPARENT: &str = "traceparent";

static TRACER: OnceLock<BoxedTracer> = OnceLock::new();

/// From now on spans go to the tracer and the propagator that are installed globally.
pub fn on() {
    TRACER.get_or_init(|| global::tracer("lathe"));
}

pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// What a request to another process carries, so that its spans are below the one of `context`: header names
/// and values. Empty while traces are off.
pub fn carried(context: &Context) -> HashMap<String, String> {
    let mut headers = HashMap::new();
    if is_on() {
        global::get_text_map_propagator(|propagator| propagator.inject_context(context, &mut headers));
    }
    headers
}

/// The context that a request came with, by its headers' names in lower case; a new one where they say nothing
/// that can be read.
pub fn received(headers: &HashMap<String, String>) -> Context {
    global::get_text_map_propagator(|propagator| propagator.extract_with_context(&Context::new(), headers))
}

/// A context, for a job's row; none where nothing is traced.
pub fn written(context: &Context) -> Option<String> {
    carried(context).remove(TRACEPARENT)
}

/// The context that stands in a job's row.
pub fn read(written: Option<&str>) -> Context {
    match written {
        Some(traceparent) => received(&HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())])),
        None => Context::new(),
    }
}

/// A span from now until it is dropped; nothing while traces are off.
#[derive(Debug, Default)]
pub struct Span(Option<Context>);

impl Span {
    /// Begins a span below `parent`'s, or a trace where that has none. Whether it is recorded is the parent's
    /// decision, or for a new trace the sampler's.
    pub fn begin(
        kind: SpanKind,
        name: impl Into<std::borrow::Cow<'static, str>>,
        parent: &Context,
        attributes: impl FnOnce() -> Vec<KeyValue>,
    ) -> Span {
        Span(TRACER.get().map(|tracer| {
            let span = SpanBuilder::from_name(name).with_kind(kind).with_attributes(attributes());
            parent.with_span(tracer.build_with_context(span, parent))
        }))
    }

    /// With this as the current context, what begins is below the span.
    pub fn context(&self) -> Context {
        self.0.clone().unwrap_or_default()
    }

    /// A future in which what begins is below the span.
    pub async fn within<F: Future>(&self, future: F) -> F::Output {
        match &self.0 {
            Some(context) => future.with_context(context.clone()).await,
            None => future.await,
        }
    }

    pub fn is_recording(&self) -> bool {
        self.0.as_ref().is_some_and(|context| context.span().is_recording())
    }

    /// The trace's id in hexadecimal, as viewers of traces look it up; none where it is not recorded.
    pub fn trace_id(&self) -> Option<String> {
        let context = self.0.as_ref().filter(|_| self.is_recording())?;
        Some(context.span().span_context().trace_id().to_string())
    }

    pub fn set(&self, key: &'static str, value: impl Into<Value>) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(KeyValue::new(key, value));
        }
    }

    /// A moment within it.
    pub fn mark(&self, name: &'static str) {
        if let Some(context) = &self.0 {
            context.span().add_event(name, Vec::new());
        }
    }

    /// What it stands for has failed; `kind` is one of few.
    pub fn fail(&self, kind: impl Into<std::borrow::Cow<'static, str>>) {
        if let Some(context) = &self.0 {
            let kind = kind.into();
            context.span().set_attribute(KeyValue::new("error.type", kind.clone()));
            context.span().set_status(Status::error(kind));
        }
    }

    /// Ends it before it is dropped.
    pub fn end(&self) {
        if let Some(context) = &self.0 {
            context.span().end();
        }
    }

    /// A span below it from `since` until now.
    pub fn passed(&self, name: &'static str, since: SystemTime, attributes: impl FnOnce() -> Vec<KeyValue>) {
        let (Some(context), Some(tracer), true) = (&self.0, TRACER.get(), self.is_recording()) else { return };
        let span = SpanBuilder::from_name(name).with_start_time(since).with_attributes(attributes());
        // A clock may have been set back meanwhile.
        tracer.build_with_context(span, context).end_with_timestamp(SystemTime::now().max(since));
    }
}

impl Drop for Span {
    /// Whoever still holds its context does not prolong it.
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_begins_a_trace_of_its_own() {
        for written in [None, Some(""), Some("00-0-0-01"), Some("not a context")] {
            assert!(!read(written).has_active_span(), "{written:?}");
        }
    }

    #[test]
    fn while_traces_are_off_nothing_is_made() {
        let span = Span::begin(SpanKind::Internal, "none", &Context::new(), || unreachable!("no attributes are made"));
        span.passed("none", SystemTime::now(), || unreachable!("no attributes are made"));
        assert!(!span.is_recording() && span.trace_id().is_none());
        assert_eq!(written(&span.context()), None);
    }
}
