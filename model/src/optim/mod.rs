//! Optimisers and learning-rate schedules.

mod adamw;
pub mod schedule;

pub use adamw::Adamw;
