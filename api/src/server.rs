//! The HTTP server: the layers around every route, and the loop that accepts connections.
//!
//! Promises that hold whatever a route does: every answer has an `x-request-id`, which is in the
//! log too; every refusal has the shape of [`crate::problem::ErrorBody`], a panic's included; a
//! request's head and body must keep arriving; at shutdown open requests get a moment to end.

use std::{io, time::Instant};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, Uri},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use lathe_jobs::ids;
use tokio::net::TcpListener;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{Any, CorsLayer},
    timeout::RequestBodyTimeoutLayer,
};
use tracing::Instrument;
use utoipa_swagger_ui::SwaggerUi;

use crate::{openapi, problem::ApiError, routes, state::AppState};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Every route with every layer.
pub fn app(state: AppState) -> Router {
    let (router, document) = routes::router(&state).split_for_parts();
    let document = openapi::finish(document);
    let router = router
        .merge(SwaggerUi::new("/docs").external_url_unchecked("/openapi.json", document))
        .fallback(no_route)
        .method_not_allowed_fallback(method_not_allowed)
        // Routes bound their bodies themselves, with a refusal that names the bound.
        .layer(DefaultBodyLimit::disable())
        .layer(RequestBodyTimeoutLayer::new(state.config.idle_body_timeout))
        .layer(CatchPanicLayer::custom(panicked));
    let router = match state.config.cors_origins.as_slice() {
        [] => router,
        origins => router.layer(
            CorsLayer::new().allow_origin(origins.to_vec()).allow_methods(Any).allow_headers(Any).expose_headers([REQUEST_ID]),
        ),
    };
    router.layer(middleware::from_fn_with_state(state.clone(), record)).with_state(state)
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

/// Gives the request its id, counts it and logs how it ended.
async fn record(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let id = ids::new("req");
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", request.id = %id, http.method = %method, http.route = %route);
    let began = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    state.requests.add(&method, &route, response.status());
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
    response
}

/// Serves until `state.shutdown` is cancelled, then lets open requests end for as long as the
/// configuration grants.
pub async fn serve(listener: TcpListener, state: AppState) -> io::Result<()> {
    let app = app(state.clone());
    let graceful = GracefulShutdown::new();
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(state.config.header_timeout);
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
        let service = TowerToHyperService::new(app.clone());
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
