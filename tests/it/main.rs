//! End-to-end tests: a real server, real processes, a real database.

mod api;
mod audit;
mod auth;
mod backup;
mod chaos;
mod checkpoints;
mod contract;
mod database;
mod demo;
mod disk;
mod edge;
mod engine_faults;
mod faults;
mod files;
mod generation;
mod growth;
mod handmade;
mod ingestion;
mod lists;
mod once;
mod openai_sdk;
mod processes;
mod quotas;
mod refusals;
mod training;
mod worker;
