//! The HTTP API: requests in, rows and artifacts out. Knows no tensors; work that takes time is a
//! job's.
//!
//! A request passes [`server`]'s layers, then [`auth`], then the handler of its resource in
//! [`routes`], which reads it through [`parse`], works in its own SQL and answers in the shapes that
//! the OpenAPI document ([`openapi`]) shows. Refusals are [`problem::ApiError`]s.

pub mod auth;
pub mod caller;
pub mod children;
mod commit;
pub mod config;
pub mod connection;
pub mod datadir;
pub mod demo;
pub mod engine_server;
pub mod event_hub;
pub mod generation;
pub mod health_check;
pub mod idempotency;
pub mod keys;
mod lingering;
pub mod logging;
mod made;
pub mod metadata;
pub mod migrate;
pub mod multipart;
mod names;
pub mod openapi;
pub mod otlp;
pub mod page;
pub mod parse;
pub mod patience;
pub mod postgres;
pub mod problem;
mod rate_limit;
mod request_trace;
pub mod resource;
pub mod routes;
pub mod schema;
pub mod server;
pub mod state;
pub mod supervisor;
pub mod tokenizer_cache;
pub mod train_request;
mod unqueried;

/// The schema, embedded in the binary.
pub static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("../migrations");
