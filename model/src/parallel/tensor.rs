//! Layers that several ranks share, each with a part of every product (Shoeybi et al., arXiv 1909.08053).
//!
//! A product is cut by its outputs, the next one by its inputs. Before the first, what all ranks have *enters*: its gradient
//! is the sum of theirs. After the second, what each has of the result *leaves*: the result is the sum. Between a block's
//! products each rank holds other channels; between blocks all hold the same, or, where the sequence is shared too
//! (Korthikanti et al., arXiv 2205.05198), each has other positions: what enters is then gathered and what leaves is
//! scattered.
//!
//! A collective that fails leaves wrong numbers behind and is kept: [`TensorAxis::check`] gives it, and until then no
//! other one is started. Layers stay free of errors that no layer can handle.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use tch::{Kind, Tensor};

use super::{Group, Interrupted};
use crate::{
    config::VOCABULARY_MULTIPLE,
    shim::{self, c10d::Reduction},
};

/// This rank's place among those that share every layer.
#[derive(Clone, Debug)]
pub struct TensorAxis(Option<Arc<Members>>);

#[derive(Debug)]
struct Members {
    group: Arc<Group>,
    /// Whether each has other positions between the blocks.
    sequence: bool,
    failed: Mutex<Option<Interrupted>>,
}

impl TensorAxis {
    /// Of a rank that has every layer for itself.
    pub fn alone() -> TensorAxis {
        TensorAxis(None)
    }

    pub fn of(group: Arc<Group>, sequence: bool) -> TensorAxis {
        TensorAxis(Some(Arc::new(Members { group, sequence, failed: Mutex::new(None) })))
    }

    pub fn rank(&self) -> i64 {
        self.0.as_ref().map_or(0, |members| members.group.rank() as i64)
    }

    pub fn size(&self) -> i64 {
        self.0.as_ref().map_or(1, |members| members.group.size() as i64)
    }

    pub fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    /// Whether each rank has other positions between the blocks. Gradients of what all ranks have are partial sums then.
    pub fn shares_sequence(&self) -> bool {
        self.0.as_ref().is_some_and(|members| members.sequence)
    }

    /// What has failed so far, once.
    pub fn check(&self) -> Result<(), Interrupted> {
        self.0.as_ref().and_then(|members| members.failed().take()).map_or(Ok(()), Err)
    }

    /// Which rows of a vocabulary are this rank's, and how many each has in memory.
    pub fn vocabulary(&self, rows: i64) -> (Range<i64>, i64) {
        let multiple = VOCABULARY_MULTIPLE * self.size();
        let each = (rows + multiple - 1) / multiple * VOCABULARY_MULTIPLE;
        let first = (self.rank() * each).min(rows);
        (first..(first + each).min(rows), each)
    }

    /// Before a product that is cut by its outputs: `(b, t, width)` of all positions, whose gradient is the sum of the ranks'.
    pub fn enter(&self, x_btc: &Tensor) -> Tensor {
        let Some(members) = self.0.clone() else { return x_btc.shallow_clone() };
        let entered = match members.sequence {
            true => shim::with_backward(x_btc, members.gather(&x_btc.detach()), move |gradient| Some(members.scatter(&gradient))),
            false => shim::with_backward(x_btc, x_btc.detach(), move |gradient| {
                let gradient = gradient.contiguous();
                members.sum(&gradient);
                Some(gradient)
            }),
        };
        entered.expect("a step of the backward pass")
    }

    /// After a product that is cut by its inputs: the sum of what the ranks have of it.
    pub fn leave(&self, part_btc: Tensor) -> Tensor {
        let Some(members) = self.0.clone() else { return part_btc };
        if !members.sequence {
            return self.sum(part_btc);
        }
        let left = members.scatter(&part_btc.detach());
        shim::with_backward(&part_btc, left, move |gradient| Some(members.gather(&gradient)))
            .expect("a step of the backward pass")
    }

    /// The sum of all ranks' tensors, whose gradient is each one's. In place: whoever made `part` must not have saved it for its
    /// own gradient.
    pub fn sum(&self, part: Tensor) -> Tensor {
        let Some(members) = &self.0 else { return part };
        let part = part.contiguous();
        members.sum(&part.detach());
        part
    }

    /// The largest of the ranks' numbers, element by element. Has no gradient.
    pub fn max(&self, x: &Tensor) -> Tensor {
        let largest = x.detach().copy();
        if let Some(members) = &self.0 {
            members.attempt(|group| group.all_reduce(&largest, Reduction::Max)?.wait());
        }
        largest
    }

    /// Of `(b, t)`, the positions that this rank has between the blocks.
    pub fn own_positions(&self, x_bt: &Tensor) -> Tensor {
        if !self.shares_sequence() {
            return x_bt.shallow_clone();
        }
        let each = x_bt.size()[1] / self.size();
        x_bt.narrow(1, self.rank() * each, each)
    }
}

impl Members {
    fn failed(&self) -> std::sync::MutexGuard<'_, Option<Interrupted>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attempt(&self, collective: impl FnOnce(&Group) -> Result<(), Interrupted>) {
        let mut failed = self.failed();
        if failed.is_none() {
            *failed = collective(&self.group).err();
        }
    }

    fn sum(&self, x: &Tensor) {
        self.attempt(|group| group.all_reduce(x, Reduction::Sum)?.wait());
    }

    /// `(b, t/n, c)` of each rank as `(b, t, c)`.
    fn gather(&self, own_btc: &Tensor) -> Tensor {
        let (b, t, c) = own_btc.size3().expect("sequences are (b, t, width)");
        let n = self.group.size() as i64;
        let all_nbtc = Tensor::empty([n, b, t, c], (own_btc.kind(), own_btc.device()));
        self.attempt(|group| group.all_gather(&all_nbtc.view([-1]), &own_btc.contiguous().view([-1]))?.wait());
        all_nbtc.transpose(0, 1).reshape([b, n * t, c])
    }

    /// This rank's positions `(b, t/n, c)` of the sum of all ranks' `(b, t, c)`.
    fn scatter(&self, whole_btc: &Tensor) -> Tensor {
        let (b, t, c) = whole_btc.size3().expect("sequences are (b, t, width)");
        let n = self.group.size() as i64;
        let parts_nbtc = whole_btc.view([b, n, t / n, c]).transpose(0, 1).contiguous();
        let own_btc = Tensor::empty([b, t / n, c], (whole_btc.kind(), whole_btc.device()));
        self.attempt(|group| group.reduce_scatter(&own_btc.view([-1]), &parts_nbtc.view([-1]), Reduction::Sum)?.wait());
        own_btc
    }
}

/// The summed fp32 cross-entropy of targets under logits of a vocabulary of which each rank has its rows.
pub fn cross_entropy_sum(axis: &TensorAxis, logits_nv: &Tensor, targets_n: &Tensor, vocabulary: i64) -> Tensor {
    if axis.is_alone() {
        return logits_nv.cross_entropy_loss(targets_n, None::<Tensor>, tch::Reduction::Sum, -100, 0.0);
    }
    let (own, _) = axis.vocabulary(vocabulary);
    let rows = own.end - own.start;
    let largest_n = match rows {
        0 => Tensor::full(targets_n.size(), f64::NEG_INFINITY, (Kind::Float, logits_nv.device())),
        _ => logits_nv.detach().amax([1], false),
    };
    let shifted_nv = logits_nv - axis.max(&largest_n).unsqueeze(1);
    let total_n = axis.sum(shifted_nv.exp().sum_dim_intlist([1i64].as_slice(), false, Kind::Float));
    let places_n = targets_n - own.start;
    let elsewhere_n = places_n.lt(0).logical_or(&places_n.ge(rows));
    let here_n = match rows {
        // No number, but the same steps of the backward pass as on other ranks.
        0 => shifted_nv.sum_dim_intlist([1i64].as_slice(), false, Kind::Float),
        _ => shifted_nv.gather(1, &places_n.masked_fill(&elsewhere_n, 0).unsqueeze(1), false).squeeze_dim(1),
    };
    let target_n = axis.sum(here_n.masked_fill(&elsewhere_n, 0.0));
    (total_n.log() - target_n).sum(Kind::Float)
}

/// The index of the largest of the logits `(vocabulary)`, the first where there are several.
pub fn argmax(axis: &TensorAxis, logits_v: &Tensor, vocabulary: i64) -> i64 {
    if axis.is_alone() {
        return logits_v.argmax(-1, false).int64_value(&[]);
    }
    let (own, _) = axis.vocabulary(vocabulary);
    let largest = if own.is_empty() { f64::NEG_INFINITY } else { logits_v.max().double_value(&[]) };
    let of_all = axis.max(&Tensor::from(largest)).double_value(&[]);
    // The smallest index of those that have it.
    let index = if largest == of_all { own.start + logits_v.argmax(-1, false).int64_value(&[]) } else { i64::MAX };
    let first = -axis.max(&Tensor::from(-index)).int64_value(&[]);
    // Nobody has a largest one that is not a number.
    first.min(vocabulary - 1)
}
