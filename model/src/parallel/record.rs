//! What a rank is at: every collective that it starts and waits for.
//!
//! A rank that stands still cannot say so itself, so its heartbeat reads this from a thread of its own. Where the ranks of a
//! group wait in different collectives, they will wait for ever; where one does not wait at all, it computes.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// Collectives that are remembered after they were started.
const REMEMBERED: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// The members find each other.
    Meet,
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
    /// To the member of this rank in the group.
    Send(usize),
    /// From the member of this rank in the group.
    Receive(usize),
}

impl fmt::Display for Operation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operation::Meet => formatter.write_str("meeting"),
            Operation::AllReduce => formatter.write_str("all_reduce"),
            Operation::ReduceScatter => formatter.write_str("reduce_scatter"),
            Operation::AllGather => formatter.write_str("all_gather"),
            Operation::Broadcast => formatter.write_str("broadcast"),
            Operation::Barrier => formatter.write_str("barrier"),
            Operation::Send(to) => write!(formatter, "send to {to}"),
            Operation::Receive(from) => write!(formatter, "receive from {from}"),
        }
    }
}

/// One collective of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collective {
    pub group: Arc<str>,
    pub operation: Operation,
    /// Counted from 1 in each group, the same on all its members; the tag of what is sent and received.
    pub number: u64,
    /// Of this rank's tensor.
    pub bytes: u64,
}

impl fmt::Display for Collective {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Collective { group, operation, number, bytes } = self;
        write!(formatter, "{operation} {number} of group {group} ({bytes} bytes)")
    }
}

/// Shared by a rank's groups and its heartbeat.
#[derive(Debug, Default)]
pub struct Record(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    /// Oldest first.
    started: VecDeque<Collective>,
    waiting: Option<(Collective, Instant)>,
}

impl Record {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn starts(&self, collective: Collective) {
        let mut entries = self.entries();
        if entries.started.len() == REMEMBERED {
            entries.started.pop_front();
        }
        entries.started.push_back(collective);
    }

    /// Until the result is dropped, the rank waits for `collective`.
    pub(super) fn waits(&self, collective: Collective) -> impl Drop + '_ {
        struct Waiting<'a>(&'a Record);

        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.entries().waiting = None;
            }
        }

        self.entries().waiting = Some((collective, Instant::now()));
        Waiting(self)
    }

    /// What the rank waits for, and since when; `None` while it computes.
    pub fn waiting(&self) -> Option<(Collective, Duration)> {
        self.entries().waiting.as_ref().map(|(collective, since)| (collective.clone(), since.elapsed()))
    }

    /// What was started last, the oldest first.
    pub fn newest(&self) -> Vec<Collective> {
        self.entries().started.iter().cloned().collect()
    }
}
