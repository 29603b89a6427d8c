//! Ranks that compute collectives together.
//!
//! A collective starts at once and goes on beside the computation until its [`Pending`] is waited for. Every one is written
//! into the rank's [`Record`], and what fails says which it was. Nothing waits longer than the group's timeout, which
//! is a last resort: a rank that is gone is an error within a second where its host still answers.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tch::Tensor;

use super::{Collective, Operation, Record};
use crate::shim::{
    TensorError,
    c10d::{ProcessGroup, Reduction, Store, Work},
};

/// A collective that will not end well: a member is gone, or too late.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{collective} failed: {reason}")]
pub struct Interrupted {
    pub collective: Collective,
    /// libtorch's.
    pub reason: TensorError,
}

/// Members start the same collectives in the same order, so one thread at a time has a group.
#[derive(Debug)]
pub struct Group {
    inner: Mutex<ProcessGroup>,
    name: Arc<str>,
    rank: usize,
    size: usize,
    timeout: Duration,
    record: Arc<Record>,
    /// Collectives so far, the same on every member.
    count: AtomicU64,
}

impl Group {
    /// A group on the CPU of the `size` ranks that come to `store` with this name, of which this is number `rank`. It listens on
    /// `address`, an address of this host that the others reach. Returns when all are there.
    pub fn gloo(
        store: &Store,
        name: &str,
        (rank, size): (usize, usize),
        address: &str,
        timeout: Duration,
        record: Arc<Record>,
    ) -> Result<Group, Interrupted> {
        let name: Arc<str> = name.into();
        let meeting = Collective { group: name.clone(), operation: Operation::Meet, number: 0, bytes: 0 };
        record.starts(meeting.clone());
        let inner = {
            let _waiting = record.waits(meeting.clone());
            ProcessGroup::gloo(store, &name, (rank, size), address, timeout)
        };
        let inner = inner.map_err(|reason| Interrupted { collective: meeting, reason })?;
        let (inner, count) = (Mutex::new(inner), AtomicU64::new(0));
        Ok(Group { inner, name, rank, size, timeout, record, count })
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    fn inner(&self) -> MutexGuard<'_, ProcessGroup> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `tensor` becomes the reduction of all members' tensors.
    pub fn all_reduce(&self, tensor: &Tensor, reduction: Reduction) -> Result<Pending, Interrupted> {
        self.collective(Operation::AllReduce, bytes(tensor), self.inner().all_reduce(tensor, reduction))
    }

    /// `output` becomes this member's part, of as many equal ones as there are members, of the reduction of all inputs.
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor, reduction: Reduction) -> Result<Pending, Interrupted> {
        self.collective(Operation::ReduceScatter, bytes(input), self.inner().reduce_scatter(output, input, reduction))
    }

    /// `output` becomes all members' inputs, one after the other.
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Pending, Interrupted> {
        self.collective(Operation::AllGather, bytes(input), self.inner().all_gather(output, input))
    }

    /// `tensor` becomes that of the member `root`.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Pending, Interrupted> {
        self.collective(Operation::Broadcast, bytes(tensor), self.inner().broadcast(tensor, root))
    }

    /// Waits until every member has come here.
    pub fn barrier(&self) -> Result<(), Interrupted> {
        self.collective(Operation::Barrier, 0, self.inner().barrier())?.wait()
    }

    /// Sends to the member `to`, which must receive under the same tag.
    pub fn send(&self, tensor: &Tensor, to: usize, tag: u32) -> Result<Pending, Interrupted> {
        self.pending(Operation::Send(to), tag.into(), bytes(tensor), self.inner().send(tensor, to, tag))
    }

    /// `tensor` becomes what the member `from` sends under the same tag.
    pub fn receive(&self, tensor: &Tensor, from: usize, tag: u32) -> Result<Pending, Interrupted> {
        self.pending(Operation::Receive(from), tag.into(), bytes(tensor), self.inner().receive(tensor, from, tag))
    }

    fn collective(&self, operation: Operation, bytes: u64, started: Result<Work, TensorError>) -> Result<Pending, Interrupted> {
        let number = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        self.pending(operation, number, bytes, started)
    }

    fn pending(
        &self,
        operation: Operation,
        number: u64,
        bytes: u64,
        started: Result<Work, TensorError>,
    ) -> Result<Pending, Interrupted> {
        let collective = Collective { group: self.name.clone(), operation, number, bytes };
        self.record.starts(collective.clone());
        match started {
            Ok(work) => Ok(Pending { record: self.record.clone(), timeout: self.timeout, work, collective }),
            Err(reason) => Err(Interrupted { collective, reason }),
        }
    }
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

/// A collective under way. Its tensors are to be left alone until it has been waited for.
#[derive(Debug)]
#[must_use = "what a collective gives is there once it has been waited for"]
pub struct Pending {
    record: Arc<Record>,
    timeout: Duration,
    work: Work,
    collective: Collective,
}

impl Pending {
    pub fn wait(self) -> Result<(), Interrupted> {
        let _waiting = self.record.waits(self.collective.clone());
        self.work.wait(self.timeout).map_err(|reason| Interrupted { collective: self.collective, reason })
    }
}
