//! `parallelism` of a training request: how many ranks train the model, and who does what.

use lathe_model::{
    config::Layout,
    parallel::{Coordinates, Misfit, layout::MisfitKind},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::problem::ApiError;

/// How a training is shared among ranks, each of which takes a device of a runner. One runner has them all. Absent: one rank.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"data": 2}))]
pub struct ParallelismBody {
    /// Ranks that share each batch, which they divide with `micro_batch_size`. Default: 1.
    #[schema(minimum = 1, maximum = 1024)]
    pub data: Option<u32>,
}

impl ParallelismBody {
    pub fn resolve(self) -> Layout {
        Layout { data: self.data.unwrap_or(1), ..Layout::default() }
    }
}

impl From<Layout> for ParallelismBody {
    fn from(layout: Layout) -> ParallelismBody {
        ParallelismBody { data: Some(layout.data) }
    }
}

/// A rank's place along each axis.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct CoordinatesObject {
    data: usize,
}

impl From<Coordinates> for CoordinatesObject {
    fn from(at: Coordinates) -> CoordinatesObject {
        CoordinatesObject { data: at.data }
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
