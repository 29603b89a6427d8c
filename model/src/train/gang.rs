//! The ranks of a run, as far as its loop knows of them: which part of a batch is whose, what all agree on, and who speaks.
//!
//! Every rank takes the same steps. What depends on a clock or a command is agreed on before each step, since a rank that
//! stopped alone would leave the others waiting. The first rank speaks for all.

use std::{ops::Range, sync::Arc, time::Duration};

use tch::{Device, Tensor};

use super::halt::Halt;
use crate::{
    arch::Model,
    checkpoint::Held,
    config::ModelConfig,
    control::Control,
    failure,
    nn::{Parameters, Piece, Twin},
    optim::{Optimizer, Slice},
    parallel::{
        Axis, Gradients, Group, Interrupted, Layout, Mesh, Record, Residence, Stage, TensorAxis, Wire, schedule::Pipeline, stages,
    },
    protocol::{Command, Failure, FailureCode, Membership},
    shim::{
        self, TensorError,
        c10d::{Reduction, Store},
    },
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
    axis: TensorAxis,
    /// `None` where one data rank has the whole batch.
    gradients: Option<Gradients>,
    /// `None` where one stage has all layers.
    wire: Option<Wire>,
    _store: Store,
}

impl Gang {
    pub fn alone() -> Gang {
        Gang(None)
    }

    /// Meets the other ranks.
    pub fn join(membership: &Membership, layout: Layout, device: Device) -> Result<Gang, Halt> {
        let Membership { rank, store, address } = membership;
        if device.is_cuda() {
            let message = "this version runs several ranks on CPUs alone: give the job one rank";
            return Err(failure::new(FailureCode::DeviceUnavailable, message).into());
        }
        let record = Arc::new(Record::default());
        let store = Store::join(*store, MEETING)?;
        let place = (*rank, layout.ranks());
        let all = Group::gloo(&store, "all", place, address, MEETING, record.clone())?;
        let mesh = Mesh::join(&store, layout, *rank, address, MEETING, &record)?;
        let axis = mesh.tensor.clone().map_or_else(TensorAxis::alone, |group| TensorAxis::of(group, layout.sequence));
        let wire = mesh.pipeline.clone().map(Wire::new);
        Ok(Gang(Some(Ranks { mesh, all, axis, gradients: None, wire, _store: store })))
    }

    /// The parts of the model that are this rank's.
    pub fn stages(&self, model: &ModelConfig) -> Vec<Stage> {
        let Layout { pipeline, chunks, .. } = self.layout();
        let parts = stages::split(model.layers, (pipeline * chunks) as usize, Model::costs(model));
        parts.into_iter().skip(self.stage()).step_by(pipeline as usize).collect()
    }

    /// This rank's place along the pipeline.
    pub fn stage(&self) -> usize {
        self.0.as_ref().map_or(0, |ranks| ranks.mesh.at.pipeline)
    }

    /// How so many micro-batches go through the stages.
    pub fn pipeline(&self, micros: usize) -> Pipeline {
        let Layout { schedule, pipeline, chunks, .. } = self.layout();
        Pipeline { schedule, stages: pipeline as usize, chunks: chunks as usize, micros }
    }

    pub fn wire(&self) -> Option<&Wire> {
        self.0.as_ref()?.wire.as_ref()
    }

    /// The ranks that share every layer with this one.
    pub fn axis(&self) -> TensorAxis {
        self.0.as_ref().map_or_else(TensorAxis::alone, |ranks| ranks.axis.clone())
    }

    /// What of the parameters this rank updates. Their gradients are the gang's from here on, and they are where
    /// [`Gang::residence`] says.
    pub fn share(&mut self, parameters: &Parameters) -> Result<Vec<Slice>, Halt> {
        let Some(ranks) = &mut self.0 else { return Ok(Slice::of(parameters)) };
        let Some(group) = ranks.mesh.data.clone() else { return Ok(Slice::of(parameters)) };
        let (gradients, slices) = Gradients::new(parameters, group, ranks.mesh.layout.zero)?;
        ranks.gradients = Some(gradients);
        Ok(slices)
    }

    /// Where the parameters are.
    pub fn residence(&self) -> Residence {
        self.gradients().map_or_else(Residence::default, Gradients::residence)
    }

    /// What this rank holds of the weights.
    pub fn weights(&self, parameters: &Parameters, optimizer: &Optimizer) -> Vec<Held> {
        if self.layout().zero < 3 || self.gradients().is_none() {
            return Held::all(parameters);
        }
        let held = |slice: &Slice, piece: &Piece| Held::new(piece.clone(), &slice.tensor, slice.cut, slice.twin);
        optimizer.slices().iter().flat_map(|slice| slice.pieces.iter().map(move |piece| held(slice, piece))).collect()
    }

    pub fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |ranks| ranks.mesh.rank)
    }

    pub fn ranks(&self) -> usize {
        self.0.as_ref().map_or(1, |ranks| ranks.mesh.layout.ranks())
    }

    fn layout(&self) -> Layout {
        self.0.as_ref().map_or_else(Layout::default, |ranks| ranks.mesh.layout)
    }

    /// The first rank does it for all, who wait and hear whether it went well.
    ///
    /// # Errors
    /// The first rank's own; that it failed, on others.
    pub fn lead<T>(&self, body: impl FnOnce() -> Result<T, Failure>) -> Result<Option<T>, Halt> {
        let done = (self.rank() == 0).then(body).transpose();
        self.all_well(done)
    }

    /// Each rank does its part.
    ///
    /// # Errors
    /// This rank's own; that another one failed.
    pub fn each<T>(&self, body: impl FnOnce() -> Result<T, Failure>) -> Result<T, Halt> {
        self.all_well(body())
    }

    fn all_well<T>(&self, done: Result<T, Failure>) -> Result<T, Halt> {
        let Some(Ranks { all, .. }) = &self.0 else { return Ok(done?) };
        let failed = Tensor::from_slice(&[i64::from(done.is_err())]);
        all.all_reduce(&failed, Reduction::Max)?.wait()?;
        let done = done?;
        match failed.int64_value(&[0]) {
            0 => Ok(done),
            _ => Err(failure::retryable(FailureCode::WorkerCrashed, "another rank could not do its part").into()),
        }
    }

    /// The number that this rank's files of weights, or of the optimiser's states, bear where several ranks write some.
    pub fn writer(&self, states: bool) -> Option<usize> {
        let layout = self.layout();
        let is_shared = layout.tensor > 1 || layout.pipeline > 1 || layout.zero > if states { 0 } else { 2 };
        is_shared.then(|| self.rank())
    }

    /// What this rank writes of the weights that it holds: what several hold is one's to write.
    pub fn weights_to_write(&self, held: Vec<Held>) -> Vec<Held> {
        self.to_write(held, self.layout().zero > 2)
    }

    /// The same of the optimiser's states.
    pub fn states_to_write(&self, held: Vec<Held>) -> Vec<Held> {
        self.to_write(held, self.layout().zero > 0)
    }

    fn to_write(&self, held: Vec<Held>, data_ranks_differ: bool) -> Vec<Held> {
        let Some(Ranks { mesh, .. }) = &self.0 else { return held };
        let is_own = |held: &Held| {
            (data_ranks_differ || mesh.at.data == 0) && (held.cut || mesh.at.tensor == 0) && held.twin != Some(Twin::Copy)
        };
        held.into_iter().filter(is_own).collect()
    }

    /// Of how many positions a batch's length is a multiple.
    pub fn sequence_multiple(&self) -> usize {
        let layout = self.layout();
        if layout.sequence { layout.size(Axis::Tensor) } else { 1 }
    }

    /// Which part of the positions this rank has between the blocks.
    pub fn sequence_part(&self) -> i64 {
        self.0.as_ref().filter(|ranks| ranks.axis.shares_sequence()).map_or(0, |ranks| ranks.axis.rank())
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

    /// How many of so many are the rank's that has most.
    pub fn most(&self, all: usize) -> usize {
        all.div_ceil(self.layout().size(Axis::Data))
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

    /// The backward pass of a micro-batch from `loss`; the `last` one's gradients are on their way to the other ranks while it
    /// goes on.
    pub fn backward(&self, loss: &Tensor, last: bool) -> Result<(), Halt> {
        let gradients = self.gradients();
        gradients.inspect(|gradients| gradients.begin_backward(last));
        let passed = loss.f_backward();
        // What broke the pass off says more than the pass.
        gradients.map_or(Ok(()), Gradients::end_backward)?;
        self.check()?;
        Ok(passed.map_err(TensorError::from)?)
    }

    /// What has failed in the layers since it was last asked.
    pub fn check(&self) -> Result<(), Halt> {
        self.axis().check()?;
        Ok(self.residence().check()?)
    }

    /// After the last micro-batch: gradients are those of the whole batch.
    pub fn finish_step(&self, optimizer: &Optimizer) -> Result<(), Halt> {
        self.gradients().map_or(Ok(()), Gradients::hand_over)?;
        let axis = self.axis();
        if axis.shares_sequence() {
            // Each rank has seen its own positions.
            let whole = optimizer.tensors_of(|slice| !slice.cut);
            whole.iter().try_for_each(|tensor| shim::set_gradient(tensor, &axis.sum(tensor.grad())))?;
            axis.check()?;
        }
        if let Some(ends) = self.0.as_ref().and_then(|ranks| ranks.mesh.ends.as_ref()) {
            for tensor in optimizer.tensors_of(|slice| slice.twin.is_some()) {
                ends.all_reduce(&tensor.grad(), Reduction::Sum)?.wait()?;
            }
        }
        Ok(())
    }

    /// The norm over all gradients.
    pub fn gradient_norm(&self, optimizer: &Optimizer) -> Result<Tensor, Halt> {
        let layout = self.layout();
        if layout.tensor == 1 && layout.pipeline == 1 && layout.zero == 0 {
            return Ok(optimizer.gradient_norm()?);
        }
        let axis = self.axis();
        let square = |cut: bool| Ok::<_, TensorError>(optimizer.gradient_norm_of(cut)?.square());
        let total = axis.sum(square(true)?) + square(false)?;
        axis.check()?;
        if layout.zero > 0 {
            self.gradients().map_or(Ok(()), |gradients| gradients.sum(&total))?;
        }
        self.sum_over_stages(&total)?;
        Ok(total.sqrt())
    }

    /// After an update: every rank has all of its parameters.
    pub fn finish_update(&self) -> Result<(), Halt> {
        self.gradients().map_or(Ok(()), |gradients| Ok(gradients.gather()?))
    }

    /// `tensor` becomes its sum over the parts of a batch, and over the stages of a pipeline.
    pub fn sum(&self, tensor: &Tensor) -> Result<(), Halt> {
        self.gradients().map_or(Ok(()), |gradients| gradients.sum(tensor))?;
        self.sum_over_stages(tensor)
    }

    /// `tensor` becomes its sum over the stages of a pipeline.
    pub fn sum_over_stages(&self, tensor: &Tensor) -> Result<(), Halt> {
        let group = self.0.as_ref().and_then(|ranks| ranks.mesh.pipeline.as_ref());
        group.map_or(Ok(()), |group| Ok(group.all_reduce(tensor, Reduction::Sum)?.wait()?))
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
