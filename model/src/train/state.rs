//! What a resumed run must know to equal an uninterrupted one, as data.
//!
//! Weights and optimiser state are tensors and lie beside it in the checkpoint. Nothing random is
//! here: every stream is a pure function of the seed and the place (see [`crate::random`]), and the
//! data cursor is `step × batch_size`.

use serde::{Deserialize, Serialize};

use super::divergence::Window;
use crate::protocol::MetricRow;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Finished steps.
    pub step: u64,
    /// Global index of the next sequence.
    pub cursor: u64,
    /// Supervised tokens trained on.
    pub tokens: u64,
    /// Of the last finished step; `None` if it was not finite. Single precision, as it was computed,
    /// so that JSON keeps every bit.
    pub loss: Option<f32>,
    pub validation_loss: Option<f32>,
    /// The newest row of metrics that was reported, for a validation that a stop broke off.
    #[serde(default)]
    pub newest: Option<MetricRow>,
    /// The newest step that was validated, and the newest one that was sampled from.
    #[serde(default)]
    pub evaluated: u64,
    #[serde(default)]
    pub sampled: u64,
    /// The lowest validation loss and its step.
    pub best: Option<(u64, f32)>,
    pub divergence: Window,
}
