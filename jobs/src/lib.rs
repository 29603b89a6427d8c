//! Durable work: a queue in Postgres, the runners that take from it, and the artifacts they make.
//!
//! The flow, and where each step stands:
//!
//! 1. A request becomes a [`spec::Spec`] and a row, blocked or queued ([`queue::enqueue`]).
//! 2. A runner with a free slot claims it under a lease: a new row in `job_attempts` with a fresh
//!    token ([`lease::claim`]).
//! 3. The row becomes a worker's task with local folders ([`run`]).
//! 4. The worker, a child process, does the work and reports; it never sees the database
//!    ([`runner`]).
//! 5. Reports become rows, each write fenced by the token ([`metrics`], [`events`]); checkpoints are
//!    published and registered ([`checkpoints`]).
//! 6. The result is published, the resource becomes ready, the job succeeds and its dependants are
//!    queued, in one transaction ([`ending::finish`]).
//! 7. An attempt whose lease ran out is ended by whichever runner sees it first ([`reaper`]).
//! 8. Models are served by engines that a runner starts for queued replicas ([`replicas`]).
//! 9. What nothing refers to any more is swept ([`housekeeping`]).
//!
//! Nothing here speaks HTTP, and nothing here touches a tensor.

pub mod artifacts;
pub mod audit;
pub mod checkpoints;
pub mod child;
pub mod context;
pub mod devices;
pub mod ending;
pub mod events;
pub mod housekeeping;
pub mod ids;
pub mod internal_addr;
pub mod lease;
pub mod log_filter;
mod machine;
pub mod metrics;
pub mod publish;
pub mod queue;
pub mod quota;
pub mod reaper;
pub mod replicas;
pub mod run;
pub mod runner;
pub mod settle;
pub mod spec;
pub mod state;
pub mod store_id;
pub mod trace;
pub mod waiting;
