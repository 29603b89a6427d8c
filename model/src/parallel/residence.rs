//! Parameters that are here only while they are used (ZeRO's third stage, arXiv 1910.02054, section 5.3).
//!
//! Between steps a rank has its share of every bucket alone. A unit, which is a layer or what belongs to none, is gathered
//! before it computes, while the one before it still does, and freed afterwards; so once more in the backward pass, which needs
//! the weights again. Whoever uses parameters otherwise finds no memory behind them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tch::Tensor;

use super::{Group, Interrupted, Pending};
use crate::shim::{self, TensorError};

/// What is gathered together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    /// What belongs to no layer.
    Rest,
    Layer(i64),
}

impl Unit {
    /// Of the parameter with this name.
    pub fn of(name: &str) -> Unit {
        let layer = name.strip_prefix("layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        layer.map_or(Unit::Rest, Unit::Layer)
    }
}

/// Where a model's parameters are. The default: all here.
#[derive(Clone, Debug, Default)]
pub struct Residence(Option<Arc<Mutex<Units>>>);

#[derive(Debug)]
struct Units {
    group: Arc<Group>,
    buckets: Vec<Bucket>,
    of_unit: BTreeMap<Unit, Vec<usize>>,
    failed: Option<Interrupted>,
}

#[derive(Debug)]
struct Bucket {
    /// Memory behind it is there only while it is gathered.
    whole: Tensor,
    share: Tensor,
    state: State,
}

#[derive(Debug)]
enum State {
    Away,
    Coming(Pending),
    Here,
}

impl Residence {
    /// Of buckets of parameters: each one's unit, the tensor of which its parameters are views, and this rank's share of it,
    /// which is in memory of its own.
    pub fn new(group: Arc<Group>, buckets: Vec<(Unit, Tensor, Tensor)>) -> Result<Residence, TensorError> {
        let mut of_unit: BTreeMap<Unit, Vec<usize>> = BTreeMap::new();
        buckets.iter().enumerate().for_each(|(number, (unit, ..))| of_unit.entry(*unit).or_default().push(number));
        let away = |(_, whole, share): (Unit, Tensor, Tensor)| {
            shim::resize_storage(&whole, 0)?;
            Ok(Bucket { whole, share, state: State::Away })
        };
        let buckets = buckets.into_iter().map(away).collect::<Result<_, TensorError>>()?;
        Ok(Residence(Some(Arc::new(Mutex::new(Units { group, buckets, of_unit, failed: None })))))
    }

    fn units(&self) -> Option<MutexGuard<'_, Units>> {
        self.0.as_ref().map(|units| units.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What has failed so far, once. What was computed since is worth nothing.
    pub fn check(&self) -> Result<(), Interrupted> {
        self.units().and_then(|mut units| units.failed.take()).map_or(Ok(()), Err)
    }

    /// What `compute` makes of `x` with the parameters of `unit`, which are freed afterwards, unless the backward pass begins with
    /// it. `next` is what will be wanted next.
    pub fn through(&self, unit: Unit, next: Option<Unit>, x: &Tensor, compute: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let Some(mut units) = self.units() else { return compute(x) };
        units.gather(unit);
        next.into_iter().for_each(|next| units.start(next));
        drop(units);
        let y = compute(x);
        if next.is_some() {
            self.release(unit);
        }
        self.again(unit, y)
    }

    /// The parameters of `unit` are here from now on, until they are released.
    pub fn require(&self, unit: Unit) {
        if let Some(mut units) = self.units() {
            units.gather(unit);
        }
    }

    /// `y` was computed with the parameters of `unit`: they are here once more when its gradient is, and those of the layer
    /// before are on their way.
    pub fn again(&self, unit: Unit, y: Tensor) -> Tensor {
        let Some(units) = self.0.clone() else { return y };
        let gather = move |gradient: Tensor| {
            let mut units = units.lock().unwrap_or_else(PoisonError::into_inner);
            units.gather(unit);
            if let Unit::Layer(layer) = unit {
                units.start(Unit::Layer(layer - 1));
            }
            Some(gradient)
        };
        shim::with_backward(&y, y.detach(), gather).expect("a step of the backward pass")
    }

    pub fn release(&self, unit: Unit) {
        if let Some(mut units) = self.units() {
            let members = units.of_unit.get(&unit).cloned().unwrap_or_default();
            members.into_iter().for_each(|bucket| units.free(bucket));
        }
    }

    /// All gradients of this bucket are there.
    pub fn release_bucket(&self, bucket: usize) {
        if let Some(mut units) = self.units() {
            units.free(bucket);
        }
    }

    /// Between steps nothing is here but shares.
    pub fn release_all(&self) {
        if let Some(mut units) = self.units() {
            (0..units.buckets.len()).for_each(|bucket| units.free(bucket));
        }
    }
}

impl Units {
    /// Begins to gather what is not here.
    fn start(&mut self, unit: Unit) {
        for &number in self.of_unit.get(&unit).into_iter().flatten() {
            let bucket = &mut self.buckets[number];
            if !matches!(bucket.state, State::Away) {
                continue;
            }
            let bytes = bucket.whole.numel() * bucket.whole.kind().elt_size_in_bytes();
            shim::resize_storage(&bucket.whole, bytes).expect("memory for gathered parameters");
            // After a failure there is memory, and wrong numbers in it, until somebody looks.
            bucket.state = State::Here;
            if self.failed.is_none() {
                match self.group.all_gather(&bucket.whole, &bucket.share) {
                    Ok(pending) => bucket.state = State::Coming(pending),
                    Err(interrupted) => self.failed = Some(interrupted),
                }
            }
        }
    }

    fn gather(&mut self, unit: Unit) {
        self.start(unit);
        let members = self.of_unit.get(&unit).cloned().unwrap_or_default();
        members.into_iter().for_each(|number| self.arrive(number));
    }

    fn arrive(&mut self, number: usize) {
        let state = &mut self.buckets[number].state;
        if let State::Coming(_) = state
            && let State::Coming(pending) = std::mem::replace(state, State::Here)
            && let Err(interrupted) = pending.wait()
        {
            self.failed.get_or_insert(interrupted);
        }
    }

    fn free(&mut self, number: usize) {
        self.arrive(number);
        let bucket = &mut self.buckets[number];
        bucket.state = State::Away;
        shim::resize_storage(&bucket.whole, 0).expect("memory can be freed");
    }
}
