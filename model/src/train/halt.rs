//! How a run ends early.

use crate::{protocol::Failure, shim::TensorError};

/// Why a run ended before its last step.
#[derive(Clone, Debug, PartialEq)]
pub enum Halt {
    /// Asked to stop, or the runner is gone.
    Stopped,
    Failed(Failure),
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Halt {
        Halt::Failed(failure)
    }
}

impl From<TensorError> for Halt {
    fn from(error: TensorError) -> Halt {
        Halt::Failed(error.into())
    }
}
