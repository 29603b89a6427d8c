//! One module per kind of job: what happens between the claim and the result.

pub mod ingest;
