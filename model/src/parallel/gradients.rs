//! Gradients summed over the data axis while the backward pass goes on, and what of a model's states is shared over it.
//!
//! The gradients of a model lie one after the other in a few buckets, in the reverse of the order in which the model was
//! built, which is about the order in which a backward pass has them. Each bucket is reduced as soon as its last gradient is
//! there and the buckets before it have been started: the order is the model's and not that of arrival, so that all ranks
//! agree on it and equal runs add equal numbers in an equal order (Li et al., arXiv 2006.15704, section 3.2).
//!
//! With ZeRO (Rajbhandari et al., arXiv 1910.02054) each rank updates an equal share of every bucket, and has the
//! optimiser's states of that alone; the shares are gathered after each update. From the second stage on it has the gradients
//! of its share alone too: a bucket's are there while a backward pass has them, and are scattered after every micro-batch. In the
//! third the parameters are no more than shares either ([`Residence`]), and a bucket is of one layer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Kind, Tensor};

use super::{Group, Interrupted, Pending, Residence, Unit};
use crate::{
    nn::{Parameter, Parameters, Piece, Twin},
    optim::Slice,
    shim::{self, TensorError, c10d::Reduction},
};

/// The first bucket is small, so that the network has something to do early.
const FIRST_BUCKET_BYTES: i64 = 1 << 20;
const BUCKET_BYTES: i64 = 25 << 20;

/// Numbers at whose multiples a parameter and a share begin: vector instructions want them so.
const ALIGNMENT: i64 = 16;

/// Buckets that are scattered at once. The memory of others is free.
const IN_FLIGHT: usize = 2;

/// A model's gradients and the group over which they are summed.
#[derive(Debug)]
pub struct Gradients {
    zero: u8,
    members: Vec<Member>,
    /// Of each bucket, where its parameters are shared.
    flats: Vec<Flat>,
    residence: Residence,
    reducer: Arc<Mutex<Reducer>>,
}

/// A parameter and where its numbers lie.
#[derive(Debug)]
struct Member {
    parameter: Tensor,
    bucket: usize,
    offset: i64,
}

/// The parameters of a bucket, and this rank's share of them.
#[derive(Debug)]
struct Flat {
    whole: Tensor,
    share: Tensor,
}

#[derive(Debug)]
struct Reducer {
    zero: u8,
    group: Arc<Group>,
    buckets: Vec<Bucket>,
    residence: Residence,
    /// Whether what comes now is reduced.
    is_reducing: bool,
    /// Buckets whose reduction has begun in this backward pass.
    begun: usize,
    started: Vec<Started>,
    failed: Option<Interrupted>,
}

#[derive(Debug)]
struct Bucket {
    length: i64,
    /// The gradients of all its parameters; where they are scattered, only while they are waited for.
    whole: Option<Tensor>,
    /// Where they are scattered, the sum so far of this rank's share.
    share: Option<Tensor>,
    like: Tensor,
    members: usize,
    missing: usize,
}

#[derive(Debug)]
struct Started {
    pending: Pending,
    bucket: usize,
    /// What is scattered to this rank. The input must outlive the collective.
    scattered: Option<(Tensor, Tensor)>,
}

impl Gradients {
    /// Of every parameter, and what of it this rank updates. The gradients are from now on where this says; nobody else may
    /// replace them.
    pub fn new(parameters: &Parameters, group: Arc<Group>, zero: u8) -> Result<(Gradients, Vec<Slice>), TensorError> {
        let (ranks, rank) = (group.size() as i64, group.rank() as i64);
        let (mut members, mut buckets, mut flats, mut slices) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut residents = Vec::new();
        for (number, entries) in filled(parameters, zero).into_iter().enumerate() {
            let (mut length, first) = (0, members.len());
            for entry in &entries {
                members.push(Member { parameter: entry.tensor.shallow_clone(), bucket: number, offset: length });
                length = next_multiple(length + entry.tensor.numel() as i64, ALIGNMENT);
            }
            let length = next_multiple(length, ALIGNMENT * ranks);
            let zeros = |length: i64| Tensor::zeros([length], (Kind::Float, parameters.device()));
            if zero > 0 {
                let each = length / ranks;
                let mut flat = Flat::of(&members[first..], zeros(length), rank * each..(rank + 1) * each);
                if zero >= 3 {
                    flat.share = flat.share.copy();
                    residents.push((unit(entries[0]), flat.whole.shallow_clone(), flat.share.shallow_clone()));
                }
                slices.push(flat.slice(&entries, &members[first..], rank * each..(rank + 1) * each));
                flats.push(flat);
            }
            buckets.push(Bucket {
                length,
                whole: (zero < 2).then(|| zeros(length)),
                share: (zero >= 2).then(|| zeros(length / ranks)),
                like: zeros(0),
                members: entries.len(),
                missing: 0,
            });
        }
        if zero == 0 {
            slices = Slice::of(parameters);
        }
        let residence = if zero < 3 { Residence::default() } else { Residence::new(group.clone(), residents)? };
        let (started, failed) = (Vec::new(), None);
        let reducer =
            Reducer { zero, group, buckets, residence: residence.clone(), is_reducing: false, begun: 0, started, failed };
        let gradients = Gradients { zero, members, flats, residence, reducer: Arc::new(Mutex::new(reducer)) };
        for member in &gradients.members {
            let (reducer, bucket, offset) = (gradients.reducer.clone(), member.bucket, member.offset);
            shim::on_gradient(&member.parameter, move |parameter| locked(&reducer).came(parameter, bucket, offset))?;
        }
        Ok((gradients, slices))
    }

    /// Where the parameters are from now on.
    pub fn residence(&self) -> Residence {
        self.residence.clone()
    }

    /// Before the first micro-batch of a step: all gradients are zero.
    pub fn clear(&self) -> Result<(), TensorError> {
        let mut reducer = locked(&self.reducer);
        reducer.is_reducing = false;
        for bucket in &mut reducer.buckets {
            bucket.whole.as_mut().into_iter().chain(&mut bucket.share).for_each(|tensor| _ = tensor.zero_());
        }
        if self.zero >= 2 {
            let parameters: Vec<Tensor> = self.members.iter().map(|member| member.parameter.shallow_clone()).collect();
            return shim::zero_gradients(&parameters);
        }
        self.members.iter().try_for_each(|Member { parameter, bucket, offset }| {
            let whole = reducer.buckets[*bucket].whole.as_ref().expect("these are not scattered");
            shim::set_gradient(parameter, &whole.narrow(0, *offset, parameter.numel() as i64).view_as(parameter))
        })
    }

    /// Before the backward pass of a micro-batch. In the `last` one of a step every bucket is reduced once it is whole; where
    /// gradients are scattered, in each.
    pub fn begin_backward(&self, last: bool) {
        let mut reducer = locked(&self.reducer);
        (reducer.is_reducing, reducer.begun) = (last || self.zero >= 2, 0);
        reducer.buckets.iter_mut().for_each(|bucket| bucket.missing = bucket.members);
    }

    /// After it: waits for what was started.
    pub fn end_backward(&self) -> Result<(), Interrupted> {
        let mut reducer = locked(&self.reducer);
        if reducer.is_reducing {
            // A parameter that no loss reached has no gradient to wait for.
            reducer.start_whole(true)?;
            reducer.wait_for_all_but(0)?;
        }
        reducer.is_reducing = false;
        Ok(())
    }

    /// After the last micro-batch: what this rank updates has its gradients.
    pub fn hand_over(&self) -> Result<(), TensorError> {
        self.residence.release_all();
        let reducer = locked(&self.reducer);
        self.flats.iter().zip(&reducer.buckets).try_for_each(|(flat, bucket)| {
            let each = flat.share.size()[0];
            let own = |whole: &Tensor| whole.narrow(0, reducer.group.rank() as i64 * each, each);
            let share = bucket.share.as_ref().map(Tensor::shallow_clone).or(bucket.whole.as_ref().map(own));
            shim::set_gradient(&flat.share, &share.expect("one or the other is there"))
        })
    }

    /// After an update: all ranks have every parameter, or will when they use it.
    pub fn gather(&self) -> Result<(), Interrupted> {
        if self.zero >= 3 {
            return Ok(());
        }
        let reducer = locked(&self.reducer);
        let start = |flat: &Flat| {
            let share = flat.share.copy();
            Ok((reducer.group.all_gather(&flat.whole, &share)?, share))
        };
        let started: Vec<(Pending, Tensor)> = self.flats.iter().map(start).collect::<Result<_, Interrupted>>()?;
        started.into_iter().try_for_each(|(pending, _)| pending.wait())
    }

    /// `tensor` becomes the sum over all ranks.
    pub fn sum(&self, tensor: &Tensor) -> Result<(), Interrupted> {
        locked(&self.reducer).group.all_reduce(tensor, Reduction::Sum)?.wait()
    }

    /// Bytes of all buckets.
    pub fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        locked(&self.reducer).buckets.iter().flat_map(|bucket| bucket.whole.iter().chain(&bucket.share)).map(bytes).sum()
    }
}

impl Flat {
    /// Moves parameters into one tensor, of which they are views from now on.
    fn of(members: &[Member], whole: Tensor, own: std::ops::Range<i64>) -> Flat {
        let _no_grad = tch::no_grad_guard();
        for Member { parameter, offset, .. } in members {
            let mut place = whole.narrow(0, *offset, parameter.numel() as i64).view_as(parameter);
            place.copy_(parameter);
            parameter.shallow_clone().set_data(&place);
        }
        Flat { share: whole.narrow(0, own.start, own.end - own.start), whole }
    }

    fn slice(&self, entries: &[&Parameter], members: &[Member], own: std::ops::Range<i64>) -> Slice {
        let placed = |entry: &&Parameter, offset: i64| {
            let pieces = entry.pieces.iter().map(move |piece| Piece { start: piece.start + offset, ..piece.clone() });
            pieces.collect::<Vec<_>>()
        };
        let all = entries.iter().zip(members).flat_map(|(entry, member)| placed(entry, member.offset));
        let pieces = all.flat_map(|piece| piece.within(&own)).collect();
        let (decays, cut, twin) = class(entries[0]);
        Slice { tensor: self.share.shallow_clone(), pieces, decays, cut, twin }
    }
}

fn locked(reducer: &Mutex<Reducer>) -> MutexGuard<'_, Reducer> {
    reducer.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next_multiple(number: i64, of: i64) -> i64 {
    (number + of - 1) / of * of
}

/// What decides how a parameter is updated, and who else has it.
fn class(entry: &Parameter) -> (bool, bool, Option<Twin>) {
    (entry.is_matrix(), entry.is_cut(), entry.twin)
}

fn unit(entry: &Parameter) -> Unit {
    Unit::of(&entry.pieces[0].name)
}

/// Parameters in buckets of about the sizes above; one that is larger has one of its own. Where they are shared, those of a bucket
/// are updated alike, and where they are gathered, they are so together.
fn filled(parameters: &Parameters, zero: u8) -> Vec<Vec<&Parameter>> {
    let goes_with =
        |one: &Parameter, other: &Parameter| (zero == 0 || class(one) == class(other)) && (zero < 3 || unit(one) == unit(other));
    let mut buckets: Vec<(Vec<&Parameter>, i64)> = Vec::new();
    for entry in parameters.entries().iter().rev() {
        let bytes = entry.tensor.numel() as i64 * Kind::Float.elt_size_in_bytes() as i64;
        let newest = buckets.iter_mut().rev().find(|(members, _)| goes_with(members[0], entry));
        match newest {
            Some((members, room)) if bytes <= *room => {
                members.push(entry);
                *room -= bytes;
            }
            _ => {
                let room = if buckets.is_empty() { FIRST_BUCKET_BYTES } else { BUCKET_BYTES };
                buckets.push((vec![entry], room - bytes));
            }
        }
    }
    buckets.into_iter().map(|(members, _)| members).collect()
}

impl Reducer {
    /// A gradient of this bucket is there. False where its reduction cannot begin, which fails the backward pass.
    fn came(&mut self, parameter: &Tensor, bucket: usize, offset: i64) -> bool {
        if !self.is_reducing {
            return true;
        }
        if self.zero >= 2 {
            let gradient = parameter.grad();
            let whole = self.buckets[bucket].whole();
            whole.narrow(0, offset, gradient.numel() as i64).copy_(&gradient.view([-1]));
            if shim::zero_gradients(std::slice::from_ref(parameter)).is_err() {
                return false;
            }
        }
        self.buckets[bucket].missing -= 1;
        if self.buckets[bucket].missing == 0 {
            self.residence.release_bucket(bucket);
        }
        self.start_whole(false).map_err(|interrupted| self.failed = Some(interrupted)).is_ok()
    }

    /// Starts the reduction of the buckets whose turn it is, as far as they are whole.
    fn start_whole(&mut self, as_they_are: bool) -> Result<(), Interrupted> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        while let Some(bucket) = self.buckets.get_mut(self.begun).filter(|bucket| as_they_are || bucket.missing == 0) {
            let number = self.begun;
            self.begun += 1;
            if self.zero >= 2 && bucket.whole.is_none() {
                // Of a part of the model that this pass did not go through.
                continue;
            }
            let whole = bucket.whole();
            if self.zero < 2 {
                let pending = self.group.all_reduce(&whole, Reduction::Sum)?;
                self.started.push(Started { pending, bucket: number, scattered: None });
                continue;
            }
            bucket.whole = None;
            let share = Tensor::empty([bucket.length / self.group.size() as i64], (Kind::Float, whole.device()));
            let pending = self.group.reduce_scatter(&share, &whole, Reduction::Sum)?;
            self.started.push(Started { pending, bucket: number, scattered: Some((whole, share)) });
            self.wait_for_all_but(IN_FLIGHT)?;
        }
        Ok(())
    }

    fn wait_for_all_but(&mut self, newest: usize) -> Result<(), Interrupted> {
        let done = self.started.len().saturating_sub(newest);
        for Started { pending, bucket, scattered } in self.started.drain(..done) {
            pending.wait()?;
            if let (Some((_, part)), Some(share)) = (scattered, &self.buckets[bucket].share) {
                let _ = share.shallow_clone().g_add_(&part);
            }
        }
        Ok(())
    }
}

impl Bucket {
    /// Its gradients, zero as far as they have not come.
    fn whole(&mut self) -> Tensor {
        let zeros = || Tensor::zeros([self.length], (Kind::Float, self.like.device()));
        self.whole.get_or_insert_with(zeros).shallow_clone()
    }
}
