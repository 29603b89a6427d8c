//! `lathe worker`: the child's side of one task.
//!
//! Ingestion is done here; everything that touches tensors or tokenizers is
//! [`lathe_model::worker`]'s. Standard input that ends means that the runner is gone: the process
//! ends at once, and writes nothing more.

use lathe_model::{
    control::{Control, Reporter},
    failure,
    protocol::{Failure, FailureCode, Level, TaskResult},
};

use super::ingest::{self, IngestProgress, IngestSpec};

/// Runs the task on standard input and says how the process should end.
pub fn run() -> i32 {
    lathe_model::worker::run(&mut ingest_task)
}

fn ingest_task(task: serde_json::Value, control: &Control, reporter: &mut Reporter) -> Result<TaskResult, Failure> {
    let spec: IngestSpec = serde_json::from_value(task).map_err(|error| {
        failure::new(FailureCode::Internal, format!("The worker does not read the ingestion's specification: {error}"))
    })?;
    let folder = spec.output.clone();
    let mut progress = |at: IngestProgress| {
        let data = serde_json::json!({ "done": at.done, "total": at.total, "rows": at.rows, "bad_rows": at.bad_rows });
        reporter.event(Level::Info, "ingest.progress", &format!("{} rows", at.rows), data);
    };
    let made = ingest::run(spec, &mut progress, control.stop_flag())?;
    Ok(TaskResult::Dataset { folder, sha256: made.manifest.sha256.clone(), statistics: made.statistics() })
}
