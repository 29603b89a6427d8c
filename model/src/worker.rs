//! `lathe worker`: one task, read from standard input, reported on descriptor 3.

/// Runs the task and says how the process should end (see [`crate::protocol::Exit`]).
pub fn run() -> i32 {
    crate::protocol::Exit::BadSpec as i32
}
