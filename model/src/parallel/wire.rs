//! What the stages of a pipeline hand to one another: results to the next part of the model, gradients to the one before.
//!
//! A stage does not wait until what it sends is taken, so the order in which others take it cannot stop it. A result is held
//! until its gradient comes back, a gradient until the step's end.

use std::{cell::RefCell, sync::Arc};

use tch::{Device, Kind, Tensor};

use super::{
    Group, Interrupted, Pending,
    schedule::{Action, Direction, Pipeline},
};

/// A rank's connection to the other stages.
#[derive(Debug)]
pub struct Wire {
    group: Arc<Group>,
    /// What was sent, which must not change until it was taken.
    sent: RefCell<Vec<Sent>>,
}

#[derive(Debug)]
struct Sent {
    made_by: Action,
    pending: Pending,
    _tensor: Tensor,
}

impl Wire {
    /// The group of the pipeline's axis.
    pub fn new(group: Arc<Group>) -> Wire {
        Wire { group, sent: RefCell::default() }
    }

    pub fn stage(&self) -> usize {
        self.group.rank()
    }

    /// What `action` on this stage needs of another one; `None` at the ends of the model.
    pub fn receive(
        &self,
        pipeline: &Pipeline,
        action: Action,
        shape: &[i64],
        device: Device,
    ) -> Result<Option<Tensor>, Interrupted> {
        let Some((from, made)) = pipeline.needs(self.stage(), action) else { return Ok(None) };
        let tensor = Tensor::empty(shape, (Kind::Float, device));
        self.group.receive(&tensor, from, tag(pipeline, from, made))?.wait()?;
        if action.pass == Direction::Backward {
            // Whoever sends the gradient has taken the result.
            self.taken(|made_by| *made_by == Action { pass: Direction::Forward, ..action })?;
        }
        Ok(Some(tensor))
    }

    /// Sends what `action` on this stage has made to the one that needs it, if there is one.
    pub fn send(&self, pipeline: &Pipeline, action: Action, made: &Tensor) -> Result<(), Interrupted> {
        let Some(to) = pipeline.goes_to(self.stage(), action) else { return Ok(()) };
        let made = made.detach().to_kind(Kind::Float).contiguous();
        let pending = self.group.send(&made, to, tag(pipeline, self.stage(), action))?;
        self.sent.borrow_mut().push(Sent { made_by: action, pending, _tensor: made });
        Ok(())
    }

    /// Waits until everything that was sent was taken.
    pub fn finish(&self) -> Result<(), Interrupted> {
        self.taken(|_| true)
    }

    /// Waits until what these actions made was taken, and holds it no longer.
    fn taken(&self, of: impl Fn(&Action) -> bool) -> Result<(), Interrupted> {
        let taken: Vec<Sent> = self.sent.borrow_mut().extract_if(.., |sent| of(&sent.made_by)).collect();
        taken.into_iter().try_for_each(|sent| sent.pending.wait())
    }
}

/// A number of its own for everything that is sent in a step.
fn tag(pipeline: &Pipeline, stage: usize, action: Action) -> u32 {
    let part = action.chunk * pipeline.stages + stage;
    let direction = usize::from(action.pass == Direction::Backward);
    ((part * pipeline.micros + action.micro) * 2 + direction) as u32
}
