//! Where spans go: over OTLP, as protobuf over HTTP, to the collector of `--otlp-endpoint`.
//!
//! A thread of its own sends them in batches. Nothing waits for it: while the collector is away spans are
//! dropped, which is logged once a minute at most, and a process that ends gives it [`LAST_WORDS`]. What the
//! OpenTelemetry SDK reads from the environment itself (`OTEL_…`) is in `docs/operations.md`.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use lathe_jobs::trace;
use opentelemetry::{Key, KeyValue, global};
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};

/// How long the last spans may take at the end of a process.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How often the log says that spans are lost.
const COMPLAINTS: Duration = Duration::from_secs(60);

/// What sends this process's spans; without an endpoint, nothing.
#[must_use = "the last spans are sent by `flush`"]
#[derive(Debug)]
pub struct Traces(Option<SdkTracerProvider>);

/// Begins to trace this process, `part` of the stack. Call it outside of a runtime.
///
/// # Errors
/// A sentence, where the environment asks for what this binary cannot do.
pub fn install(endpoint: Option<&str>, part: &str) -> Result<Traces, String> {
    let Some(endpoint) = endpoint else { return Ok(Traces(None)) };
    let address = format!("{endpoint}/v1/traces");
    let exporter = OtlpExporter::builder().with_http().with_endpoint(&address).build();
    let exporter = exporter.map_err(|error| format!("traces cannot be sent to {endpoint}: {error}"))?;
    let exporter = Complaining { exporter, address, lost: Mutex::default() };
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource(part)).build();
    global::set_text_map_propagator(TraceContextPropagator::new());
    global::set_tracer_provider(provider.clone());
    trace::on();
    Ok(Traces(Some(provider)))
}

impl Traces {
    /// Sends what is left, as far as that goes in a moment. Nothing is traced afterwards.
    pub fn flush(self) {
        if let Some(provider) = self.0
            && let Err(error) = provider.shutdown_with_timeout(LAST_WORDS)
        {
            tracing::debug!(%error, "the last spans may be lost");
        }
    }
}

/// Who speaks. What the environment says of that wins.
fn resource(part: &str) -> Resource {
    let service = Key::from_static_str("service.name");
    let named = Resource::builder().build();
    let unnamed = named.get(&service).is_none_or(|name| name.as_str().starts_with("unknown_service"));
    let resource = Resource::builder()
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())));
    match unnamed {
        true => resource.with_service_name(format!("lathe-{part}")).build(),
        false => resource.build(),
    }
}

/// An exporter that says now and then what it could not send.
#[derive(Debug)]
struct Complaining<E> {
    exporter: E,
    address: String,
    lost: Mutex<Lost>,
}

#[derive(Debug, Default)]
struct Lost {
    spans: usize,
    said: Option<Instant>,
}

impl Lost {
    /// Counts lost spans; how many to complain of, if it is time.
    fn count(&mut self, spans: usize, now: Instant) -> Option<usize> {
        self.spans += spans;
        if self.said.is_some_and(|said| now.duration_since(said) < COMPLAINTS) {
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.spans))
    }
}

impl<E: SpanExporter> SpanExporter for Complaining<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let sent = self.exporter.export(batch).await;
        if let Err(error) = &sent {
            let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner).count(spans, Instant::now());
            if let Some(spans) = lost {
                tracing::warn!(address = self.address, spans, %error, "spans are lost: the collector did not take them");
            }
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_spans_are_complained_of_once_a_minute() {
        let (mut lost, begun) = (Lost::default(), Instant::now());
        assert_eq!(lost.count(3, begun), Some(3));
        assert_eq!(lost.count(4, begun + Duration::from_secs(5)), None);
        assert_eq!(lost.count(5, begun + Duration::from_secs(59)), None);
        assert_eq!(lost.count(1, begun + COMPLAINTS), Some(10));
    }

    #[test]
    fn a_part_has_a_name_of_its_own() {
        let name = resource("runner").get(&Key::from_static_str("service.name"));
        assert_eq!(name.map(|name| name.to_string()).as_deref(), Some("lathe-runner"));
    }
}
