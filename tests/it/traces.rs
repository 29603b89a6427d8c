//! Traces over OTLP: one from a request to the steps of its job's worker, one from a completion to its engine; and
//! what a collector that is away costs.

use std::{
    collections::{BTreeSet, HashMap},
    net::TcpListener,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, routing::post};
use lathe_tests::{Kind, PATIENCE, TestApp, within};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value as Any},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::training::{ingredients, path, pretraining, text};

/// A span as it came, and the service that sent it.
#[derive(Clone, Debug)]
struct Seen {
    service: String,
    attributes: HashMap<String, Value>,
    span: Span,
}

impl Seen {
    fn id(&self) -> String {
        hex::encode(&self.span.span_id)
    }

    fn parent(&self) -> String {
        hex::encode(&self.span.parent_span_id)
    }

    fn number(&self, name: &str) -> i64 {
        self.attributes[name].as_i64().unwrap_or_else(|| panic!("no number {name}: {self:?}"))
    }

    fn holds(&self, other: &Seen) -> bool {
        let (outer, inner) = (&self.span, &other.span);
        outer.start_time_unix_nano <= inner.start_time_unix_nano && inner.end_time_unix_nano <= outer.end_time_unix_nano
    }
}

/// A collector on a thread of its own, since a test blocks while its stack stops.
struct Collector {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Collector {
    fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("it is ours");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kept = seen.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let take = move |body: Bytes| async move { kept.lock().expect("no test fails in it").extend(spans(&body)) };
                let listener = tokio::net::TcpListener::from_std(listener).expect("it is a listener");
                axum::serve(listener, Router::new().route("/v1/traces", post(take))).await.expect("it serves");
            });
        });
        Collector { url, seen }
    }

    /// The spans of one trace.
    fn trace(&self, id: &str) -> Trace {
        let seen = self.seen.lock().expect("no test fails in it");
        Trace(seen.iter().filter(|seen| hex::encode(&seen.span.trace_id) == id).cloned().collect())
    }
}

struct Trace(Vec<Seen>);

impl Trace {
    fn all(&self, name: &str) -> Vec<&Seen> {
        self.0.iter().filter(|seen| seen.span.name == name).collect()
    }

    #[track_caller]
    fn one(&self, name: &str) -> &Seen {
        match self.all(name)[..] {
            [one] => one,
            ref other => panic!("{} of {name} in {:#?}", other.len(), self.0),
        }
    }

    /// Every span is below another one of the trace, or below `root`.
    #[track_caller]
    fn hangs_together(&self, root: &str) {
        let mut ids: BTreeSet<String> = self.0.iter().map(Seen::id).collect();
        assert_eq!(ids.len(), self.0.len(), "ids are unique");
        ids.insert(root.to_owned());
        assert!(self.0.iter().all(|seen| ids.contains(&seen.parent())), "{:#?}", self.0);
    }
}

fn spans(body: &[u8]) -> Vec<Seen> {
    let request = ExportTraceServiceRequest::decode(body).expect("it is OTLP");
    let mut seen = Vec::new();
    for resource in request.resource_spans {
        let service = attributes(&resource.resource.unwrap_or_default().attributes)["service.name"].clone();
        for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            seen.push(Seen { service: text(&service).to_owned(), attributes: attributes(&span.attributes), span });
        }
    }
    seen
}

fn attributes(pairs: &[KeyValue]) -> HashMap<String, Value> {
    let value = |pair: &KeyValue| match pair.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Any::StringValue(text)) => json!(text),
        Some(Any::IntValue(number)) => json!(number),
        Some(Any::DoubleValue(number)) => json!(number),
        Some(Any::BoolValue(yes)) => json!(yes),
        other => panic!("not a simple value: {other:?}"),
    };
    pairs.iter().map(|pair| (pair.key.clone(), value(pair))).collect()
}

/// A client's trace and its span in it.
const CLIENT: &str = "b7ad6b7169203331";

fn trace_id(n: u32) -> String {
    format!("0af7651916cd43dd8448eb21{n:08x}")
}

/// The request as a part of a client's trace; `flags` say whether it is recorded.
fn traced(request: RequestBuilder, n: u32, flags: &str) -> RequestBuilder {
    request.header("traceparent", format!("00-{}-{CLIENT}-{flags}", trace_id(n)))
}

async fn written(app: &TestApp, job: &Value) -> Option<String> {
    let mut conn = PgConnection::connect(&app.database_url()).await.expect("the stack's database");
    let row = sqlx::query_scalar("SELECT traceparent FROM jobs WHERE id = $1").bind(text(&job["id"]));
    row.fetch_one(&mut conn).await.expect("the job is there")
}

#[tokio::test]
async fn a_trace_goes_from_the_request_to_the_workers_steps_and_to_the_engine() {
    let collector = Collector::start();
    let mut app = TestApp::builder().argument("--otlp-endpoint").argument(&collector.url).start().await;
    let ingredients = ingredients(&app).await;
    let create = |n, flags, steps| {
        let request = app.request(Method::POST, "/v1/training/jobs").json(&pretraining(&ingredients, steps));
        // With a key, a creation goes on in a task of its own.
        app.send(traced(request, n, flags).header("idempotency-key", n.to_string()))
    };
    let answer = create(1, "01", 40).await;
    let request_id = answer.headers["x-request-id"].to_str().expect("an id").to_owned();
    let job = answer.ok();
    let silent = create(2, "00", 2).await.ok();
    assert_eq!(written(&app, &silent).await.map(|written| written.ends_with("-00")), Some(true));
    let done = app.wait_for(&path(&job), &["succeeded"]).await;
    app.wait_for(&path(&silent), &["succeeded"]).await;
    let asked = json!({"model": done["model"], "prompt": "What is", "max_tokens": 5, "temperature": 0});
    let ask = |n, body: Value| app.send(traced(app.request(Method::POST, "/v1/completions").json(&body), n, "01"));
    let said = ask(3, asked.clone()).await.ok();
    let streamed = ask(4, json!({"model": done["model"], "prompt": "What is", "max_tokens": 5, "stream": true})).await;
    assert!(streamed.text.contains("[DONE]"), "{}", streamed.text);
    let file = app.upload("bad.jsonl", "user_data", "{\"text\": \"a row\"}\nnot a row\n").await;
    let bad = json!({"name": "bad", "source": {"type": "files", "files": [file["id"]]}});
    let bad = app.send(traced(app.request(Method::POST, "/v1/datasets").json(&bad), 5, "01")).await.ok();
    let failed = format!("/v1/datasets/{}", text(&bad["id"]));
    let began = std::time::Instant::now();
    while app.get(&failed).await.ok()["state"] != "failed" {
        assert!(began.elapsed() < PATIENCE, "it fails");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let logged = format!("trace_id={:?}", trace_id(1));
    assert!(app.log_text().contains(&logged), "the log names the trace");
    // The last spans are sent now.
    app.stop();

    let trace = collector.trace(&trace_id(1));
    trace.hangs_together(CLIENT);
    let request = trace.one("POST /v1/training/jobs");
    assert_eq!((request.span.kind(), &*request.service, request.parent()), (SpanKind::Server, "lathe-api", CLIENT.into()));
    assert_eq!((request.number("http.response.status_code"), &request.attributes["request.id"]), (201, &json!(request_id)));
    let enqueued = trace.one("enqueue train");
    assert_eq!((enqueued.span.kind(), enqueued.parent()), (SpanKind::Producer, request.id()));
    assert_eq!(enqueued.attributes["messaging.message.id"], job["id"]);
    let run = trace.one("run train");
    assert_eq!((run.span.kind(), &*run.service, run.parent()), (SpanKind::Consumer, "lathe-runner", enqueued.id()));
    assert_eq!((run.number("lathe.job.attempt"), &run.attributes["lathe.job.state"]), (1, &json!("succeeded")));
    for phase in ["prepare task", "preparing", "publishing"] {
        let phase = trace.one(phase);
        assert!(phase.parent() == run.id() && run.holds(phase), "{phase:?}");
    }
    let training = trace.all("training");
    assert!(!training.is_empty());
    let (mut next, mut tokens) = (1, 0);
    let mut steps = trace.all("steps");
    steps.sort_by_key(|steps| steps.number("lathe.step.first"));
    for steps in &steps {
        assert!(training.iter().any(|training| training.id() == steps.parent() && training.holds(steps)), "{steps:?}");
        assert_eq!(steps.number("lathe.step.first"), next);
        (next, tokens) = (steps.number("lathe.step.last") + 1, tokens + steps.number("lathe.tokens"));
        assert!(steps.attributes["lathe.loss"].as_f64().is_some_and(|loss| loss > 0.0));
    }
    assert_eq!(next, 41, "all 40 steps are told, each once");
    assert!(tokens > 0);
    let steps_of = |name| trace.all(name).iter().map(|saved| saved.number("lathe.step")).collect::<BTreeSet<_>>();
    assert!(steps_of("save checkpoint").contains(&40));
    assert_eq!(steps_of("save checkpoint"), steps_of("publish checkpoint"));

    assert!(collector.trace(&trace_id(2)).0.is_empty(), "the client did not want it recorded");

    for n in [3, 4] {
        let trace = collector.trace(&trace_id(n));
        trace.hangs_together(CLIENT);
        let (request, engine) = (trace.one("POST /v1/completions"), trace.one("POST /generate"));
        assert_eq!((&*engine.service, engine.parent()), ("lathe-engine", request.id()));
        assert_eq!(engine.number("gen_ai.usage.input_tokens"), said["usage"]["prompt_tokens"].as_i64().expect("a number"));
        assert!(request.span.end_time_unix_nano >= engine.span.events[0].time_unix_nano, "it lasts until its answer is sent");
    }
    let engine = collector.trace(&trace_id(3)).one("POST /generate").clone();
    assert_eq!(engine.number("gen_ai.usage.output_tokens"), said["usage"]["completion_tokens"].as_i64().expect("a number"));

    let run = collector.trace(&trace_id(5)).one("run ingest").clone();
    assert_eq!((&run.attributes["error.type"], &run.attributes["lathe.job.state"]), (&json!("bad_rows"), &json!("failed")));
    assert_eq!(run.span.status.map(|status| status.code()), Some(StatusCode::Error));

    let seen = collector.seen.lock().expect("no test fails in it");
    assert!(seen.iter().all(|seen| !["/healthz", "/readyz"].iter().any(|probe| seen.span.name.contains(probe))));
}

/// The attempts of a job stand together, each with how it ended.
#[tokio::test]
async fn every_attempt_of_a_job_is_in_its_trace() {
    let collector = Collector::start();
    let mut app = TestApp::builder().argument("--otlp-endpoint").argument(&collector.url).start().await;
    let ingredients = ingredients(&app).await;
    let request = app.request(Method::POST, "/v1/training/jobs").json(&pretraining(&ingredients, 1_000_000));
    let job = app.send(traced(request, 1, "01")).await.ok();
    let attempt = async |n: u64| {
        let began = std::time::Instant::now();
        loop {
            let now = app.wait_for(&path(&job), &["blocked", "queued", "running"]).await;
            if now["attempts"] == n && now["step"].as_u64() > Some(0) && now["phase"] == "training" {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "attempt {n} takes steps: {now}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    attempt(1).await;
    app.kill(Kind::Worker);
    attempt(2).await;
    app.post(&format!("{}/cancel", path(&job))).await.ok();
    app.wait_for(&path(&job), &["cancelled"]).await;
    app.stop();
    let trace = collector.trace(&trace_id(1));
    trace.hangs_together(CLIENT);
    let mut runs = trace.all("run train");
    runs.sort_by_key(|run| run.number("lathe.job.attempt"));
    let ends: Vec<_> = runs.iter().map(|run| (&run.attributes["lathe.job.state"], run.attributes.get("error.type"))).collect();
    assert_eq!(ends, [(&json!("queued"), Some(&json!("worker_crashed"))), (&json!("cancelled"), None)]);
    let told = |run: &Seen| trace.all("training").iter().any(|training| training.parent() == run.id());
    assert!(runs.iter().all(|run| told(run)), "{:#?}", trace.0);
}

/// Nobody listens, or somebody never answers.
#[tokio::test]
async fn a_collector_that_is_away_costs_spans_alone() {
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    for address in [closed, silent.local_addr().expect("it is bound")] {
        let mut app = TestApp::builder()
            .argument("--otlp-endpoint")
            .argument(&format!("http://{address}"))
            .variable("OTEL_BSP_SCHEDULE_DELAY", "100")
            .variable("OTEL_EXPORTER_OTLP_TIMEOUT", "500")
            .start()
            .await;
        let ingredients = ingredients(&app).await;
        let job = app.post_json("/v1/training/jobs", &pretraining(&ingredients, 40)).await.ok();
        app.wait_for(&path(&job), &["succeeded"]).await;
        let complaints = || app.log_text().matches("spans are lost").count();
        within(PATIENCE, "api and runner complain", || (complaints() >= 2).then_some(()));
        app.get("/v1/projects").await.ok();
        let stopped = app.stop();
        assert!(stopped < Duration::from_secs(5), "{stopped:?}");
        assert_eq!(app.log_text().matches("spans are lost").count(), 2, "each once in a minute");
    }
}

#[tokio::test]
async fn without_a_collector_nothing_is_traced() {
    let app = TestApp::start().await;
    let source = json!({"type": "template", "rows": 1, "seed": 1, "templates": [{"instruction": "a", "output": "b"}]});
    let body = json!({"name": "one", "source": source});
    let dataset = app.send(traced(app.request(Method::POST, "/v1/datasets").json(&body), 1, "01")).await.ok();
    app.wait_for(&format!("/v1/datasets/{}", text(&dataset["id"])), &["ready"]).await;
    let mut conn = PgConnection::connect(&app.database_url()).await.expect("the stack's database");
    let traced = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM jobs WHERE traceparent IS NOT NULL");
    assert_eq!(traced.fetch_one(&mut conn).await.expect("a number"), 0);
    assert!(!app.log_text().contains("trace_id"));
}
