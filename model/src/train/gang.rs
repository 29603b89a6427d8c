//! The ranks of a run, as far as its loop knows of them: which part of a batch is whose, what all agree on, and who speaks.
//!
//! Every rank takes the same steps. What depends on a clock or a command is agreed on before each step, since a rank that
//! stopped alone would leave the others waiting. The first rank speaks for all.

use std::{ops::Range, sync::Arc, time::Duration};

use tch::Tensor;

use super::halt::Halt;
use crate::{
    control::Control,
    failure,
    nn::Parameters,
    parallel::{Axis, Gradients, Group, Interrupted, Layout, Mesh, Record, ReduceError},
    protocol::{Command, FailureCode, Membership},
    shim::c10d::{Reduction, Store},
};

/// How long ranks wait for one another, at the start, where one may still be reading data, and in a collective. A rank that
/// ends is found at once by its runner, which ends the others.
const MEETING: Duration = Duration::from_secs(1800);

/// What all ranks do before their next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    pub save: bool,
    pub stop: bool,
}

/// Of one rank, or of many.
#[derive(Debug)]
pub struct Gang(Option<Ranks>);

#[derive(Debug)]
struct Ranks {
    mesh: Mesh,
    all: Group,
    /// `None` where one data rank has the whole batch.
    gradients: Option<Gradients>,
    _store: Store,
}

impl Gang {
    pub fn alone() -> Gang {
        Gang(None)
    }

    /// Meets the other ranks. The gradients of `parameters` are the gang's from here on.
    pub fn join(membership: &Membership, layout: Layout, parameters: &Parameters) -> Result<Gang, Halt> {
        let Membership { rank, store, address } = membership;
        if layout.size(Axis::Tensor) * layout.size(Axis::Pipeline) > 1 || layout.zero > 0 {
            return Err(failure::new(FailureCode::Internal, "this version shards over the data axis alone, and no states").into());
        }
        if parameters.device().is_cuda() {
            let message = "this version runs several ranks on CPUs alone: give the job one rank";
            return Err(failure::new(FailureCode::DeviceUnavailable, message).into());
        }
        let record = Arc::new(Record::default());
        let store = Store::join(*store, MEETING)?;
        let place = (*rank, layout.ranks());
        let all = Group::gloo(&store, "all", place, address, MEETING, record.clone())?;
        let mut mesh = Mesh::join(&store, layout, *rank, address, MEETING, &record)?;
        let gradients = mesh.data.take().map(|group| Gradients::new(parameters, group)).transpose()?;
        Ok(Gang(Some(Ranks { mesh, all, gradients, _store: store })))
    }

    pub fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    /// Whether this rank reports, saves and publishes for all.
    pub fn speaks(&self) -> bool {
        self.0.as_ref().is_none_or(|ranks| ranks.mesh.rank == 0)
    }

    /// Which sequences of a batch are this rank's, of as many for each.
    pub fn part(&self, batch: Range<u64>) -> Range<u64> {
        let Some(Ranks { mesh, .. }) = &self.0 else { return batch };
        let each = (batch.end - batch.start) / mesh.layout.size(Axis::Data) as u64;
        let first = batch.start + each * mesh.at.data as u64;
        first..first + each
    }

    /// Which of what all ranks know are this one's to compute.
    pub fn own<T>(&self, all: Vec<T>) -> Vec<T> {
        let Some(Ranks { mesh, .. }) = &self.0 else { return all };
        all.into_iter().skip(mesh.at.data).step_by(mesh.layout.size(Axis::Data)).collect()
    }

    /// Tells the others what this rank was asked for, and hears what they were: a command to one is one to all.
    pub fn agree(&self, control: &Control, save: bool) -> Result<Agreed, Halt> {
        let save = control.takes_checkpoint() || save;
        let Some(Ranks { all, .. }) = &self.0 else { return Ok(Agreed { save, stop: control.is_stopping() }) };
        let stop = match control.is_stopping() {
            false => 0,
            true if control.is_pausing() => 1,
            true => 2,
        };
        let orders = Tensor::from_slice(&[i64::from(save), stop]);
        all.all_reduce(&orders, Reduction::Max)?.wait()?;
        let stop = orders.int64_value(&[1]);
        match stop {
            0 => {}
            1 => control.command(Command::Pause),
            _ => control.command(Command::Cancel),
        }
        Ok(Agreed { save: orders.int64_value(&[0]) != 0, stop: stop != 0 })
    }

    /// Before the first micro-batch of a step.
    pub fn begin_step(&self) -> Result<(), Halt> {
        self.gradients().map_or(Ok(()), |gradients| Ok(gradients.clear()?))
    }

    /// The backward pass of a micro-batch; the `last` one's gradients are on their way to the other ranks while it goes on.
    pub fn backward(&self, loss: &Tensor, last: bool) -> Result<(), Halt> {
        let gradients = self.gradients();
        if let Some(gradients) = gradients.filter(|_| last) {
            gradients.expect_last();
        }
        Ok(loss.f_backward().map_err(crate::shim::TensorError::from)?)
    }

    /// After the last micro-batch: gradients are those of the whole batch.
    pub fn finish_step(&self) -> Result<(), Halt> {
        self.gradients().map_or(Ok(()), |gradients| Ok(gradients.finish()?))
    }

    /// `tensor` becomes its sum over the parts of a batch.
    pub fn sum(&self, tensor: &Tensor) -> Result<(), Halt> {
        self.gradients().map_or(Ok(()), |gradients| Ok(gradients.sum(tensor)?))
    }

    fn gradients(&self) -> Option<&Gradients> {
        self.0.as_ref()?.gradients.as_ref()
    }
}

impl From<Interrupted> for Halt {
    fn from(interrupted: Interrupted) -> Halt {
        let message = format!("another rank is gone, or does not come: {interrupted}");
        failure::retryable(FailureCode::WorkerCrashed, message).into()
    }
}

impl From<ReduceError> for Halt {
    fn from(error: ReduceError) -> Halt {
        match error {
            ReduceError::Interrupted(interrupted) => interrupted.into(),
            ReduceError::Tensor(error) => error.into(),
        }
    }
}
