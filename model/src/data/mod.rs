//! From a dataset's rows to batches.

pub mod rows;
