
mod api;
mod auth;
mod contract;
mod files;
