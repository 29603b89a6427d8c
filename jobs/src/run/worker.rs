//! `lathe worker`: the child's side of one task.
//!
//! Ingestion is done here; everything that touches tensors or tokenizers is
//! [`lathe_model::worker`]'s. Standard input that ends means that the runner is gone: the process
//! ends at once, and writes nothing more.

/// Runs the task on standard input and says how the process should end.
pub fn run() -> i32 {
    lathe_model::worker::run()
}
