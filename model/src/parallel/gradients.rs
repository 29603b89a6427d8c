//! Gradients summed over the data axis while the backward pass goes on.
//!
//! The gradients of a model lie one after the other in a few buckets, in the reverse of the order in which the model was
//! built, which is about the order in which a backward pass has them. Each bucket is reduced as soon as its last gradient is
//! there and the buckets before it have been started: the order is the model's and not that of arrival, so that all ranks
//! agree on it and equal runs add equal numbers in an equal order (Li et al., arXiv 2006.15704, section 3.2).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Kind, Tensor};

use super::{Group, Interrupted, Pending};
use crate::{
    nn::Parameters,
    shim::{self, TensorError, c10d::Reduction},
};

/// The first bucket is small, so that the network has something to do early.
const FIRST_BUCKET_BYTES: usize = 1 << 20;
const BUCKET_BYTES: usize = 25 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ReduceError {
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// A model's gradients and the group over which they are summed.
#[derive(Debug)]
pub struct Gradients {
    /// A parameter and its gradient, a view of a bucket.
    views: Vec<(Tensor, Tensor)>,
    reduction: Arc<Mutex<Reducer>>,
}

#[derive(Debug)]
struct Reducer {
    group: Group,
    buckets: Vec<Bucket>,
    /// Whether gradients that come are the last of their step.
    is_last: bool,
    /// Of the buckets in order, those whose reduction has begun.
    started: Vec<Pending>,
    failed: Option<Interrupted>,
}

#[derive(Debug)]
struct Bucket {
    flat: Tensor,
    members: usize,
    missing: usize,
}

impl Gradients {
    /// Of every parameter. Its gradient is from now on where this says; nobody else may replace it.
    pub fn new(parameters: &Parameters, group: Group) -> Result<Gradients, TensorError> {
        let entries: Vec<&Tensor> = parameters.entries().iter().rev().map(|entry| &entry.tensor).collect();
        let (mut views, mut buckets, mut members_of) = (Vec::new(), Vec::new(), Vec::new());
        for (bucket, members) in filled(&entries).into_iter().enumerate() {
            let numbers = members.iter().map(|tensor| tensor.numel() as i64).sum::<i64>();
            let flat = Tensor::zeros([numbers], (Kind::Float, members[0].device()));
            let mut offset = 0;
            for parameter in &members {
                let length = parameter.numel() as i64;
                views.push((parameter.shallow_clone(), flat.narrow(0, offset, length).view_as(parameter)));
                members_of.push(bucket);
                offset += length;
            }
            buckets.push(Bucket { flat, members: members.len(), missing: 0 });
        }
        let reducer = Reducer { group, buckets, is_last: false, started: Vec::new(), failed: None };
        let gradients = Gradients { views, reduction: Arc::new(Mutex::new(reducer)) };
        for ((parameter, _), bucket) in gradients.views.iter().zip(members_of) {
            let reduction = gradients.reduction.clone();
            shim::on_gradient(parameter, move || locked(&reduction).came(bucket))?;
        }
        Ok(gradients)
    }

    /// Before the first micro-batch of a step: all gradients are zero.
    pub fn clear(&self) -> Result<(), TensorError> {
        let mut reducer = locked(&self.reduction);
        reducer.is_last = false;
        reducer.buckets.iter_mut().for_each(|bucket| _ = bucket.flat.zero_());
        self.views.iter().try_for_each(|(parameter, gradient)| shim::set_gradient(parameter, gradient))
    }

    /// Before the backward pass of a step's last micro-batch, in which every bucket is reduced once it is whole.
    pub fn expect_last(&self) {
        let mut reducer = locked(&self.reduction);
        reducer.is_last = true;
        reducer.buckets.iter_mut().for_each(|bucket| bucket.missing = bucket.members);
    }

    /// After it: waits until every gradient is the sum over all ranks.
    pub fn finish(&self) -> Result<(), Interrupted> {
        let mut reducer = locked(&self.reduction);
        // A parameter that no loss reached has no gradient to wait for.
        reducer.start_whole(true)?;
        reducer.is_last = false;
        reducer.started.drain(..).try_for_each(Pending::wait)
    }

    /// `tensor` becomes the sum over all ranks.
    pub fn sum(&self, tensor: &Tensor) -> Result<(), Interrupted> {
        locked(&self.reduction).group.all_reduce(tensor, Reduction::Sum)?.wait()
    }

    /// Bytes of all buckets.
    pub fn bytes(&self) -> usize {
        locked(&self.reduction).buckets.iter().map(|bucket| bucket.flat.numel() * bucket.flat.kind().elt_size_in_bytes()).sum()
    }
}

fn locked(reduction: &Mutex<Reducer>) -> MutexGuard<'_, Reducer> {
    reduction.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Parameters in buckets of about the sizes above; one that is larger has one of its own.
fn filled<'a>(parameters: &[&'a Tensor]) -> Vec<Vec<&'a Tensor>> {
    let mut buckets: Vec<Vec<&Tensor>> = Vec::new();
    let mut room = 0;
    for &parameter in parameters {
        let bytes = parameter.numel() * Kind::Float.elt_size_in_bytes();
        match buckets.last_mut() {
            Some(bucket) if bytes <= room => bucket.push(parameter),
            _ => {
                room = if buckets.is_empty() { FIRST_BUCKET_BYTES } else { BUCKET_BYTES };
                buckets.push(vec![parameter]);
            }
        }
        room = room.saturating_sub(bytes);
    }
    buckets
}

impl Reducer {
    /// A gradient of this bucket is there. False where its reduction cannot begin, which fails the backward pass.
    fn came(&mut self, bucket: usize) -> bool {
        if !self.is_last {
            return true;
        }
        self.buckets[bucket].missing -= 1;
        self.start_whole(false).map_err(|interrupted| self.failed = Some(interrupted)).is_ok()
    }

    /// Starts the reduction of the buckets whose turn it is, as far as they are whole.
    fn start_whole(&mut self, as_they_are: bool) -> Result<(), Interrupted> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        while let Some(bucket) = self.buckets.get(self.started.len()).filter(|bucket| as_they_are || bucket.missing == 0) {
            self.started.push(self.group.all_reduce(&bucket.flat, Reduction::Sum)?);
        }
        Ok(())
    }
}
