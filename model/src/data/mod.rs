//! From a dataset's rows to batches.

pub mod batch;
pub mod packing;
pub mod rows;
pub mod shards;
