//! How many ranks hold a model, and how it is cut among them.

use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;

listed_enum! {
    /// The order in which a pipeline's stage computes its micro-batches; see [`super::schedule`].
    Schedule {
        Gpipe,
        #[serde(rename = "1f1b")]
        OneForwardOneBackward,
        Interleaved,
    }
}

/// The default is one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Layout {
    /// Ranks that share the batch.
    pub data: u32,
    /// Ranks that share every layer (Shoeybi et al., arXiv 1909.08053).
    pub tensor: u32,
    /// Ranks that share the layers: the stages.
    pub pipeline: u32,
    /// What is sharded over the data axis (Rajbhandari et al., arXiv 1910.02054): from 1 on the optimiser's states, from 2 on
    /// the gradients too, at 3 the parameters too.
    pub zero: u8,
    /// Shards what lies between the layers' products over the tensor axis too (Korthikanti et al., arXiv 2205.05198).
    pub sequence: bool,
    pub schedule: Schedule,
    /// Parts of the model on each stage, where the schedule is interleaved.
    pub chunks: u32,
    /// Goes on with fewer ranks where some are lost.
    pub elastic: bool,
}

impl Default for Layout {
    fn default() -> Layout {
        Layout {
            data: 1,
            tensor: 1,
            pipeline: 1,
            zero: 0,
            sequence: false,
            schedule: Schedule::OneForwardOneBackward,
            chunks: 1,
            elastic: false,
        }
    }
}

/// Why a layout cannot train a model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Misfit {
    pub kind: MisfitKind,
    pub message: String,
    /// As near to what was asked for as works.
    pub nearest: Layout,
}

listed_enum! {
    MisfitKind {
        LayoutDoesNotDivide,
        HeadsDoNotSplit,
    }
}

/// What a layout divides.
#[derive(Clone, Copy, Debug)]
pub struct Divided<'a> {
    pub model: &'a ModelConfig,
    /// Sequences of a step, over all ranks.
    pub batch_size: u64,
    /// Sequences of a forward pass; `None` where that is decided later.
    pub micro_batch_size: Option<u64>,
}

impl Divided<'_> {
    /// Sequences of the smallest part of a step that a rank computes at once.
    fn unit(&self) -> u64 {
        self.micro_batch_size.unwrap_or(1).max(1)
    }

    fn batch_splits(&self, data: u32) -> bool {
        data > 0 && self.batch_size.is_multiple_of(u64::from(data) * self.unit())
    }

    fn heads_split(&self, tensor: u32) -> bool {
        tensor > 0 && self.model.heads % i64::from(tensor) == 0 && self.model.kv_heads % i64::from(tensor) == 0
    }

    fn width_splits(&self, tensor: u32, sequence: bool) -> bool {
        tensor > 0 && self.model.mlp_width % i64::from(tensor) == 0 && (!sequence || self.model.context % i64::from(tensor) == 0)
    }

    /// Micro-batches of a step on each data rank.
    fn micro_batches(&self, data: u32) -> u64 {
        self.batch_size / (u64::from(data.max(1)) * self.unit())
    }
}

impl Layout {
    pub fn is_default(&self) -> bool {
        *self == Layout::default()
    }

    /// Whether `divided` can be cut like this.
    ///
    /// # Errors
    /// With the numbers that do not fit, and the nearest layout that does.
    pub fn check(&self, divided: Divided) -> Result<(), Misfit> {
        let Some((kind, message)) = self.misfit(divided) else { return Ok(()) };
        Err(Misfit { kind, message, nearest: self.nearest(divided) })
    }

    fn misfit(&self, divided: Divided) -> Option<(MisfitKind, String)> {
        let Layout { data, tensor, pipeline, zero, sequence, schedule, chunks, .. } = *self;
        let Divided { model, batch_size, .. } = divided;
        let micro_batches = divided.micro_batches(data);
        let divides = |message: String| Some((MisfitKind::LayoutDoesNotDivide, message));
        if [data, tensor, pipeline, chunks].contains(&0) || zero > 3 {
            divides("`data`, `tensor`, `pipeline` and `chunks` are 1 or more, `zero` is 0 to 3".to_owned())
        } else if !divided.batch_splits(data) {
            let unit = divided.unit();
            divides(format!("a batch of {batch_size} is not a multiple of {data} data ranks with micro-batches of {unit}"))
        } else if !divided.heads_split(tensor) {
            let (heads, groups) = (model.heads, model.kv_heads);
            let message = format!("{heads} heads and {groups} key/value heads do not split over {tensor} tensor ranks");
            Some((MisfitKind::HeadsDoNotSplit, message))
        } else if !divided.width_splits(tensor, false) {
            divides(format!("a feed-forward width of {} does not split over {tensor} tensor ranks", model.mlp_width))
        } else if !divided.width_splits(tensor, sequence) {
            divides(format!("`sequence` needs a context that splits over {tensor} tensor ranks, and {} does not", model.context))
        } else if (schedule == Schedule::Interleaved) != (chunks > 1) {
            divides(format!("`chunks` is {chunks}: it is more than 1 where `schedule` is `interleaved`, and 1 elsewhere"))
        } else if i64::from(pipeline) * i64::from(chunks) > model.layers {
            divides(format!("{} layers are too few for {pipeline} stages of {chunks} chunks", model.layers))
        } else if schedule == Schedule::Interleaved && !micro_batches.is_multiple_of(u64::from(pipeline)) {
            divides(format!(
                "an interleaved schedule needs a multiple of {pipeline} micro-batches, and there are {micro_batches}"
            ))
        } else {
            None
        }
    }

    /// Each axis by itself: what divides, and of that the nearest, as a ratio.
    fn nearest(&self, divided: Divided) -> Layout {
        let chunks = if self.schedule == Schedule::Interleaved { self.chunks.max(2) } else { 1 };
        let stages = u32::try_from(divided.model.layers / i64::from(chunks)).unwrap_or(1);
        let schedule = if stages < 1 { Schedule::OneForwardOneBackward } else { self.schedule };
        let interleaved = schedule == Schedule::Interleaved;
        let largest = u32::try_from(divided.batch_size).unwrap_or(u32::MAX);
        let data = nearest(self.data, largest, |data| divided.batch_splits(data));
        let heads = u32::try_from(divided.model.heads).unwrap_or(u32::MAX);
        let tensor =
            nearest(self.tensor, heads, |tensor| divided.heads_split(tensor) && divided.width_splits(tensor, self.sequence));
        let micro_batches = divided.micro_batches(data);
        let pipeline =
            nearest(self.pipeline, stages.max(1), |stages| !interleaved || micro_batches.is_multiple_of(u64::from(stages)));
        Layout { data, tensor, pipeline, zero: self.zero.min(3), schedule, chunks: if interleaved { chunks } else { 1 }, ..*self }
    }
}

/// The number from 1 to `largest` that `fits` and whose ratio to `wanted` is nearest to one; 1 where none does.
fn nearest(wanted: u32, largest: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let wanted = wanted.clamp(1, largest.max(1));
    let below = (1..=wanted).rev().find(|&size| fits(size));
    // Twice as far up is no nearer than 1 below.
    let above = (wanted..=largest.min(wanted.saturating_mul(wanted))).find(|&size| fits(size));
    match (below, above) {
        (Some(below), Some(above)) if u64::from(above) * u64::from(below) < u64::from(wanted) * u64::from(wanted) => above,
        (Some(below), _) => below,
        (None, Some(above)) => above,
        (None, None) => 1,
    }
}
