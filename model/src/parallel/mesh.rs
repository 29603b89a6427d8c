//! Where a rank stands, and whom it talks to.
//!
//! Ranks are numbered along the tensor axis first, then data, then pipeline, so that those who exchange most are neighbours
//! on one host (Narayanan et al., arXiv 2104.04473, section 4).

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Group, Interrupted, Layout, Record};
use crate::shim::c10d::Store;

listed_enum! {
    Axis {
        /// Each rank has the whole model (or, with ZeRO, a shard of its states) and a part of the batch.
        Data,
        /// Each rank has a part of every layer.
        Tensor,
        /// Each rank has some of the layers.
        Pipeline,
    }
}

/// A rank's place along each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coordinates {
    pub data: usize,
    pub tensor: usize,
    pub pipeline: usize,
}

impl Coordinates {
    pub fn along(&self, axis: Axis) -> usize {
        match axis {
            Axis::Data => self.data,
            Axis::Tensor => self.tensor,
            Axis::Pipeline => self.pipeline,
        }
    }
}

impl Layout {
    pub fn ranks(&self) -> usize {
        Axis::ALL.iter().map(|&axis| self.size(axis)).product()
    }

    /// Ranks along an axis.
    pub fn size(&self, axis: Axis) -> usize {
        let size = match axis {
            Axis::Data => self.data,
            Axis::Tensor => self.tensor,
            Axis::Pipeline => self.pipeline,
        };
        size as usize
    }

    pub fn coordinates(&self, rank: usize) -> Coordinates {
        let (tensor, data) = (self.size(Axis::Tensor), self.size(Axis::Data));
        Coordinates { data: rank / tensor % data, tensor: rank % tensor, pipeline: rank / tensor / data }
    }

    pub fn rank(&self, at: Coordinates) -> usize {
        (at.pipeline * self.size(Axis::Data) + at.data) * self.size(Axis::Tensor) + at.tensor
    }

    /// The name of the group along `axis` that a rank belongs to: the same for those who differ on this axis alone.
    fn group_name(&self, axis: Axis, at: Coordinates) -> String {
        let Coordinates { data, tensor, pipeline } = at;
        match axis {
            Axis::Data => format!("data (tensor {tensor}, pipeline {pipeline})"),
            Axis::Tensor => format!("tensor (data {data}, pipeline {pipeline})"),
            Axis::Pipeline => format!("pipeline (data {data}, tensor {tensor})"),
        }
    }
}

/// A rank's groups, one for each axis that has more than one rank.
#[derive(Debug)]
pub struct Mesh {
    pub layout: Layout,
    pub rank: usize,
    pub at: Coordinates,
    pub data: Option<Arc<Group>>,
    pub tensor: Option<Arc<Group>>,
    pub pipeline: Option<Arc<Group>>,
    /// The first stage and the last, which share tied weights.
    pub ends: Option<Arc<Group>>,
}

impl Mesh {
    /// Meets the others in `store`. `address` is one of this host's that they reach. Returns when all groups stand.
    pub fn join(
        store: &Store,
        layout: Layout,
        rank: usize,
        address: &str,
        timeout: Duration,
        record: &Arc<Record>,
    ) -> Result<Mesh, Interrupted> {
        let at = layout.coordinates(rank);
        let group = |axis: Axis| {
            let place = (at.along(axis), layout.size(axis));
            let met = || Group::gloo(store, &layout.group_name(axis, at), place, address, timeout, record.clone());
            Ok((layout.size(axis) > 1).then(met).transpose()?.map(Arc::new))
        };
        let (data, tensor, pipeline) = (group(Axis::Data)?, group(Axis::Tensor)?, group(Axis::Pipeline)?);
        let last = layout.size(Axis::Pipeline) - 1;
        let mut ends = None;
        if last > 0 && [0, last].contains(&at.pipeline) {
            let (name, place) = (format!("ends (data {}, tensor {})", at.data, at.tensor), (usize::from(at.pipeline > 0), 2));
            ends = Some(Arc::new(Group::gloo(store, &name, place, address, timeout, record.clone())?));
        }
        Ok(Mesh { layout, rank, at, data, tensor, pipeline, ends })
    }

    /// `None` where this rank is alone on the axis.
    pub fn group(&self, axis: Axis) -> Option<&Group> {
        match axis {
            Axis::Data => self.data.as_deref(),
            Axis::Tensor => self.tensor.as_deref(),
            Axis::Pipeline => self.pipeline.as_deref(),
        }
    }
}
