//! Why work fails: constructors of [`Failure`] for the errors that are met everywhere.

use std::io;

use crate::{
    protocol::{Failure, FailureCode},
    shim::{TensorError, trim_backtrace},
};

/// A failure that another attempt would meet again.
pub fn new(code: FailureCode, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into(), param: None, retryable: false }
}

/// A failure that another attempt may not meet.
pub fn retryable(code: FailureCode, message: impl Into<String>) -> Failure {
    Failure { retryable: true, ..new(code, message) }
}

/// A full disk by its own name; anything else of the file system may pass.
pub fn io(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Failure {
            retryable: true,
            ..new(FailureCode::DiskFull, format!("the disk is full ({error}): free some space, then retry"))
        },
        _ => Failure { retryable: true, ..new(FailureCode::Internal, format!("reading or writing files failed: {error}")) },
    }
}

/// A failure inside libtorch; lack of memory by its own name.
pub fn tensor(error: &TensorError) -> Failure {
    from_message(&error.0)
}

/// A panic's message, such as tch's, as a sentence.
pub fn from_message(message: &str) -> Failure {
    let message = trim_backtrace(message);
    let lower = message.to_lowercase();
    if lower.contains("out of memory") || lower.contains("can't allocate memory") || lower.contains("not enough memory") {
        let advice = "the device has not enough memory: lower micro_batch_size, the context or the model's size";
        return new(FailureCode::OutOfMemory, format!("{advice} ({message})"));
    }
    Failure { retryable: true, ..new(FailureCode::Internal, format!("tensor work failed: {message}")) }
}

impl From<TensorError> for Failure {
    fn from(error: TensorError) -> Failure {
        tensor(&error)
    }
}
