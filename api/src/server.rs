//! The HTTP server: the layers around every route, and the loop that accepts connections.
//!
//! Promises that hold whatever a route does: every answer has an `x-request-id`, which is in the
//! log too; every refusal has the shape of [`crate::problem::ErrorBody`], a panic's included; a
//! request's head and body must keep arriving, and a body that nobody wants may be sent to its end all the
//! same; at shutdown open requests get a moment to end.

use std::{
    convert::Infallible,
    io,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use lathe_jobs::ids;
use tokio::net::TcpListener;
use tower::ServiceExt;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer},
    timeout::RequestBodyTimeoutLayer,
};
use tracing::{Instrument, field::Empty};
use utoipa_swagger_ui::SwaggerUi;

use crate::{
    connection::{Activity, Answer, KEEP_ALIVE, Timed},
    idempotency::REPLAYED,
    lingering::Lingering,
    openapi,
    problem::{ApiError, SHOULD_RETRY},
    rate_limit, request_trace, routes,
    state::AppState,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Every route with every layer.
pub fn app(state: AppState) -> Router {
    let (router, document) = routes::router(&state).split_for_parts();
    let document = openapi::finish(document);
    let docs = Router::from(SwaggerUi::new("/docs").external_url_unchecked("/openapi.json", document));
    layered(router.merge(docs.layer(middleware::map_response(in_shape))), state)
}

/// The docs page's own 404 has no body.
async fn in_shape(method: Method, uri: Uri, response: Response) -> Response {
    if response.status() == StatusCode::NOT_FOUND { no_route(method, uri).await.into_response() } else { response }
}

fn layered(router: Router<AppState>, state: AppState) -> Router {
    let router = router
        .fallback(no_route)
        .method_not_allowed_fallback(method_not_allowed)
        // Routes bound their bodies themselves, with a refusal that names the bound.
        .layer(DefaultBodyLimit::disable())
        .layer(RequestBodyTimeoutLayer::new(state.config.idle_body_timeout))
        .layer(CatchPanicLayer::custom(panicked));
    let router = match state.config.cors_origins.as_slice() {
        [] => router,
        origins => router.layer(cors(origins)),
    };
    router.layer(middleware::from_fn_with_state(state.clone(), record)).with_state(state)
}

/// A wildcard would not stand for `Authorization` in a browser's eyes, so what is asked for is named.
fn cors(origins: &[HeaderValue]) -> CorsLayer {
    let origins =
        if origins.iter().any(|origin| origin == "*") { AllowOrigin::any() } else { AllowOrigin::list(origins.to_vec()) };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            REQUEST_ID,
            header::RETRY_AFTER,
            SHOULD_RETRY,
            REPLAYED,
            rate_limit::LIMIT,
            rate_limit::REMAINING,
            rate_limit::RESET,
        ])
        .max_age(Duration::from_secs(600))
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let said = panic.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    ApiError::internal(format!("a handler panicked: {}", said.unwrap_or_default())).into_response()
}

/// Gives the request its id, counts it, logs how it ended and traces it until its answer is sent.
async fn record(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let id = ids::new("req");
    let method = request.method().clone();
    let matched = request.extensions().get::<MatchedPath>().cloned();
    let route = matched.as_ref().map(MatchedPath::as_str);
    let traced = request_trace::begin(request.headers(), &method, request.uri(), route, &id);
    let route = route.unwrap_or("unmatched");
    let span = tracing::info_span!("request", request.id = %id, http.method = %method, http.route = %route, trace_id = Empty);
    if let Some(id) = traced.trace_id() {
        span.record("trace_id", id);
    }
    let began = Instant::now();
    let mut response = traced.within(next.run(request)).instrument(span.clone()).await;
    state.requests.add(&method, route, response.status());
    request_trace::answered(&traced, response.status());
    span.in_scope(|| {
        tracing::info!(
            http.status = response.status().as_u16(),
            request.duration_ms = began.elapsed().as_secs_f64() * 1e3,
            "answered"
        );
    });
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    request_trace::until_sent(traced, response)
}

/// Serves until `state.shutdown` is cancelled, then lets open requests end for as long as the
/// configuration grants.
pub async fn serve(listener: TcpListener, state: AppState) -> io::Result<()> {
    let app = app(state.clone());
    let graceful = GracefulShutdown::new();
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(KEEP_ALIVE + state.config.header_timeout);
    loop {
        let stream = tokio::select! {
            () = state.shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: existing connections go on and free some.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let (app, activity) = (app.clone(), Activity::default());
        let stream = Timed::new(stream, activity.clone(), state.config.header_timeout);
        let shutdown = state.shutdown.clone();
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let (app, answering) = (app.clone(), activity.begin());
            let (head, body) = request.into_parts();
            let body = Lingering::new(&head.headers, body, answering.clone(), shutdown.clone());
            let request = Request::from_parts(head, axum::body::Body::new(body));
            async move {
                let answer = app.oneshot(request).await?;
                Ok::<_, Infallible>(answer.map(|body| Answer::new(body, answering)))
            }
        });
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(state.config.shutdown_grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests that were still open at shutdown were dropped");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, routing::get};
    use http_body_util::BodyExt;
    use lathe_jobs::artifacts::Artifacts;
    use sqlx::postgres::PgPoolOptions;

    use super::*;
    use crate::state::ApiConfig;

    /// With a route that panics. Its database is never asked.
    async fn answer(config: ApiConfig, request: axum::http::request::Builder) -> Response {
        async fn panics() -> &'static str {
            panic!("a secret of the inside")
        }
        let folder = tempfile::tempdir().unwrap();
        let db = PgPoolOptions::new().connect_lazy("postgres://localhost/none").unwrap();
        let state = AppState::new(db, Artifacts::open(folder.path()).unwrap(), config);
        let router = Router::new().route("/panics", get(panics));
        layered(router, state).oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn a_panic_is_a_500_with_a_request_id() {
        let answer = answer(ApiConfig::default(), Request::get("/panics")).await;
        assert_eq!(answer.status(), 500);
        assert!(answer.headers()[REQUEST_ID].to_str().unwrap().starts_with("req_"));
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["error"]["type"], &body["error"]["code"]), (&"server_error".into(), &"internal_error".into()));
        assert!(!body.to_string().contains("secret"), "{body}");
    }

    #[tokio::test]
    async fn browsers_may_call_from_the_named_origins_alone() {
        let preflight = |origin: &str| {
            Request::options("/panics")
                .header("origin", origin)
                .header("access-control-request-method", "POST")
                .header("access-control-request-headers", "authorization,content-type")
        };
        let allowed = |answer: &Response| answer.headers().get("access-control-allow-origin").cloned();
        let off = answer(ApiConfig::default(), preflight("https://a.example")).await;
        assert!(off.headers().keys().all(|name| !name.as_str().starts_with("access-control")), "{off:?}");
        let with = |origins: &[&'static str]| ApiConfig {
            cors_origins: origins.iter().map(|origin| HeaderValue::from_static(origin)).collect(),
            ..ApiConfig::default()
        };
        let on = answer(with(&["https://a.example"]), preflight("https://a.example")).await;
        assert_eq!(allowed(&on).unwrap(), "https://a.example");
        assert!(on.headers()["access-control-allow-headers"].to_str().unwrap().contains("authorization"), "{on:?}");
        assert_eq!(allowed(&answer(with(&["https://a.example"]), preflight("https://b.example")).await), None);
        assert_eq!(allowed(&answer(with(&["*"]), preflight("https://b.example")).await).unwrap(), "*");
        let plain = answer(with(&["https://a.example"]), Request::get("/none").header("origin", "https://a.example")).await;
        assert_eq!(allowed(&plain).unwrap(), "https://a.example");
        assert!(plain.headers()["access-control-expose-headers"].to_str().unwrap().contains("x-request-id"));
    }
}
