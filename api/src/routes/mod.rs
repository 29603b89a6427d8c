//! One resource per file: shapes, handlers and their own SQL. Paths are written in full.

pub mod audit;
pub mod chat;
pub mod completions;
pub mod datasets;
pub mod files;
pub mod fine_tuning;
mod generation_common;
pub mod health;
pub mod log_filter;
pub mod models;
pub mod projects;
pub mod prometheus;
pub mod runners;
pub mod tokenizers;
pub mod training;
pub mod uploads;

use std::sync::Arc;

use axum::middleware;
use utoipa_axum::router::OpenApiRouter;

use crate::{
    auth, idempotency, patience, rate_limit,
    state::AppState,
    unqueried::{self, queried},
};

/// Every route, without layers: what the document is made from.
pub fn routes() -> OpenApiRouter<AppState> {
    public().merge(keyed())
}

/// Every route; those that need a key cannot be reached without one, whatever their handlers do.
pub fn router(state: &AppState) -> OpenApiRouter<AppState> {
    let keyed = keyed();
    let queried = Arc::new(queried(keyed.get_openapi()));
    let bounded = || middleware::from_fn_with_state(state.clone(), patience::bound);
    let keyed = keyed
        // Once more inside of what goes on in a task of its own.
        .route_layer(bounded())
        .route_layer(middleware::from_fn_with_state(state.clone(), idempotency::replay))
        .route_layer(middleware::from_fn_with_state(queried, unqueried::refuse))
        .route_layer(middleware::from_fn_with_state(state.clone(), rate_limit::limit))
        .route_layer(middleware::from_fn_with_state(state.clone(), auth::require_key));
    public().merge(keyed).route_layer(bounded())
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
        .merge(datasets::contents::router())
        .merge(tokenizers::router())
        .merge(runners::router())
        .merge(audit::router())
        .merge(log_filter::router())
        .merge(training::router())
        .merge(fine_tuning::router())
        .merge(models::router())
        .merge(completions::router())
        .merge(chat::router())
}
