//! One resource per file: shapes, handlers and their own SQL. Paths are written in full.

pub mod chat;
pub mod completions;
pub mod datasets;
pub mod files;
pub mod fine_tuning;
mod generation_common;
pub mod health;
pub mod models;
pub mod projects;
pub mod prometheus;
pub mod runners;
pub mod tokenizers;
pub mod training;
pub mod uploads;

use std::{collections::HashSet, sync::Arc};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{Method, Uri},
    middleware::{self, Next},
    response::Response,
};
use utoipa_axum::router::OpenApiRouter;

use crate::{auth, idempotency, openapi, parse, patience, problem::ApiError, state::AppState};

/// Every route, without layers: what the document is made from.
pub fn routes() -> OpenApiRouter<AppState> {
    public().merge(keyed())
}

/// Every route; those that need a key cannot be reached without one, whatever their handlers do.
pub fn router(state: &AppState) -> OpenApiRouter<AppState> {
    let keyed = keyed();
    let queried = Arc::new(openapi::queried(keyed.get_openapi()));
    let bounded = || middleware::from_fn_with_state(state.clone(), patience::bound);
    let keyed = keyed
        // Once more inside of what goes on in a task of its own.
        .route_layer(bounded())
        .route_layer(middleware::from_fn_with_state(state.clone(), idempotency::replay))
        .route_layer(middleware::from_fn_with_state(queried, known_query))
        .route_layer(middleware::from_fn_with_state(state.clone(), auth::require_key));
    public().merge(keyed).route_layer(bounded())
}

/// Middleware: 400 for a query where the document has none. Those in `queried` read theirs with
/// [`parse::Query`].
async fn known_query(
    State(queried): State<Arc<HashSet<(Method, String)>>>,
    route: MatchedPath,
    method: Method,
    uri: Uri,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let method = if method == Method::HEAD { Method::GET } else { method };
    if !queried.contains(&(method, route.as_str().to_owned())) {
        parse::refuse_query(&uri)?;
    }
    Ok(next.run(request).await)
}

/// Routes that check for themselves who asks, or that anyone may ask.
fn public() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().merge(health::router()).merge(prometheus::router())
}

/// One line per resource.
fn keyed() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .merge(projects::router())
        .merge(files::router())
        .merge(uploads::router())
        .merge(datasets::router())
        .merge(tokenizers::router())
        .merge(runners::router())
        .merge(training::router())
        .merge(fine_tuning::router())
        .merge(models::router())
        .merge(completions::router())
        .merge(chat::router())
}
