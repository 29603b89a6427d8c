//! `parallelism` of a training request: how many ranks train the model, and who does what.

use lathe_model::{
    config::Layout,
    parallel::{
        Coordinates, Misfit,
        layout::{MisfitKind, Schedule},
    },
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{names::names, problem::ApiError};

/// How a training is shared among ranks, each of which takes a device of a runner: as many as `data` × `tensor` × `pipeline`. One
/// runner has them all. Absent: one rank.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"data": 2, "tensor": 2, "pipeline": 1, "zero": 1, "sequence": false, "schedule": "1f1b", "chunks": 1}))]
pub struct ParallelismBody {
    /// Ranks that share each batch, which they divide with `micro_batch_size`. Default: 1.
    #[schema(minimum = 1, maximum = 1024)]
    pub data: Option<u32>,
    /// Ranks that share every layer, whose heads and feed-forward width they divide. Default: 1.
    #[schema(minimum = 1, maximum = 1024)]
    pub tensor: Option<u32>,
    /// Ranks that have some of the layers each: the stages, through which micro-batches go one after the other. Default: 1.
    #[schema(minimum = 1, maximum = 1024)]
    pub pipeline: Option<u32>,
    /// What each data rank has a share of alone (ZeRO): 0 nothing, 1 the optimiser's states, 2 the gradients too, 3 the parameters
    /// too. Default: 0.
    #[schema(minimum = 0, maximum = 3)]
    pub zero: Option<u8>,
    /// Whether the tensor ranks share what lies between the layers' products too, by positions, whose number they divide.
    /// Default: false.
    pub sequence: Option<bool>,
    /// In which order a stage takes its micro-batches: forward all and then back (`gpipe`), back as soon as it can be (`1f1b`), or
    /// that with several parts of the model on each stage (`interleaved`). Default: `1f1b`.
    pub schedule: Option<PipelineScheduleName>,
    /// Parts of the model on each stage: more than 1 where the schedule is interleaved. Default: 1.
    #[schema(minimum = 1, maximum = 1024)]
    pub chunks: Option<u32>,
}

names! {
    /// The order in which a pipeline's stage takes its micro-batches.
    PipelineScheduleName(Schedule),
}

impl ParallelismBody {
    pub fn resolve(self) -> Layout {
        let one = Layout::default();
        Layout {
            data: self.data.unwrap_or(one.data),
            tensor: self.tensor.unwrap_or(one.tensor),
            pipeline: self.pipeline.unwrap_or(one.pipeline),
            zero: self.zero.unwrap_or(one.zero),
            sequence: self.sequence.unwrap_or(one.sequence),
            schedule: self.schedule.map_or(one.schedule, |name| name.0),
            chunks: self.chunks.unwrap_or(one.chunks),
            ..one
        }
    }
}

impl From<Layout> for ParallelismBody {
    fn from(layout: Layout) -> ParallelismBody {
        let Layout { data, tensor, pipeline, zero, sequence, schedule, chunks, .. } = layout;
        ParallelismBody {
            data: Some(data),
            tensor: Some(tensor),
            pipeline: Some(pipeline),
            zero: Some(zero),
            sequence: Some(sequence),
            schedule: Some(PipelineScheduleName(schedule)),
            chunks: Some(chunks),
        }
    }
}

/// A rank's place along each axis.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct CoordinatesObject {
    data: usize,
    tensor: usize,
    pipeline: usize,
}

impl From<Coordinates> for CoordinatesObject {
    fn from(at: Coordinates) -> CoordinatesObject {
        CoordinatesObject { data: at.data, tensor: at.tensor, pipeline: at.pipeline }
    }
}

impl From<Misfit> for ApiError {
    fn from(misfit: Misfit) -> ApiError {
        let code = match misfit.kind {
            MisfitKind::LayoutDoesNotDivide => "layout_does_not_divide",
            MisfitKind::HeadsDoNotSplit => "heads_do_not_split",
        };
        let nearest = serde_json::to_string(&ParallelismBody::from(misfit.nearest)).unwrap_or_default();
        let mut message = misfit.message;
        message[..1].make_ascii_uppercase();
        ApiError::unprocessable(code, "parallelism", format!("{message}. The nearest that works: {nearest}."))
    }
}
