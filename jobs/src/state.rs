//! The states of jobs and of what they make, and which changes of state exist.
//!
//! [`TRANSITIONS`] is the whole machine. It stands in three more places that a test compares with
//! it: the CHECK of `jobs.state`, `docs/job-states.md`, and the guard `WHERE state = …` of every
//! update. No code sets a state without such a guard.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A closed set of names that is stored as text, written in JSON as text, and read back strictly.
macro_rules! text_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type)]
        #[serde(rename_all = "snake_case")]
        #[sqlx(type_name = "text", rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_meta])* $variant),+ }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownName;

            fn from_str(text: &str) -> Result<$name, UnknownName> {
                match text { $($text => Ok($name::$variant),)+ _ => Err(UnknownName(text.to_owned())) }
            }
        }
    };
}

/// A text that is none of an enum's names.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown name {0:?}")]
pub struct UnknownName(pub String);

text_enum! {
    /// Where a job stands. One waiting to be tried again is `Queued` with `run_after` in the future.
    JobState {
        /// Waits for the jobs that it needs.
        Blocked = "blocked",
        Queued = "queued",
        Running = "running",
        /// Asked to save and stop.
        Pausing = "pausing",
        Paused = "paused",
        /// Asked to stop.
        Cancelling = "cancelling",
        Cancelled = "cancelled",
        Succeeded = "succeeded",
        Failed = "failed",
    }
}

text_enum! {
    /// Where a rank of an attempt stands.
    RankState {
        Starting = "starting",
        Running = "running",
        Ended = "ended",
    }
}

/// Every change of state that exists.
pub const TRANSITIONS: &[(JobState, JobState)] = {
    use JobState::*;
    &[
        (Blocked, Queued),
        (Blocked, Paused),
        (Blocked, Cancelled),
        (Blocked, Failed),
        (Queued, Running),
        (Queued, Paused),
        (Queued, Cancelled),
        (Running, Queued),
        (Running, Pausing),
        (Running, Paused),
        (Running, Cancelling),
        (Running, Succeeded),
        (Running, Failed),
        (Pausing, Paused),
        (Pausing, Cancelling),
        (Pausing, Succeeded),
        (Pausing, Failed),
        (Paused, Queued),
        (Paused, Blocked),
        (Paused, Cancelled),
        (Paused, Failed),
        (Cancelling, Cancelled),
    ]
};

impl JobState {
    /// No further change of state exists.
    pub fn is_finished(self) -> bool {
        matches!(self, JobState::Cancelled | JobState::Succeeded | JobState::Failed)
    }

    /// An attempt holds a lease on the job.
    pub fn is_leased(self) -> bool {
        matches!(self, JobState::Running | JobState::Pausing | JobState::Cancelling)
    }

    pub fn can_become(self, next: JobState) -> bool {
        TRANSITIONS.contains(&(self, next))
    }
}

text_enum! {
    /// What a job does; the column `jobs.kind`, and the tag of [`crate::spec::Spec`] but for imports.
    Kind {
        Ingest = "ingest",
        Tokenizer = "tokenizer",
        Statistics = "statistics",
        Train = "train",
    }
}

impl Kind {
    pub fn pool(self) -> Pool {
        match self {
            Kind::Ingest | Kind::Tokenizer | Kind::Statistics => Pool::Light,
            Kind::Train => Pool::Device,
        }
    }

    /// Whether its work is saved on the way, so that it can stop and go on later. Others begin anew.
    pub fn saves(self) -> bool {
        match self {
            Kind::Ingest | Kind::Tokenizer | Kind::Statistics => false,
            Kind::Train => true,
        }
    }
}

text_enum! {
    /// Which slots of a runner a job takes.
    Pool {
        /// Short work on one or two threads.
        Light = "light",
        /// Work that owns a device (all cores count as one device).
        Device = "device",
    }
}

text_enum! {
    /// Where a dataset, tokenizer or model stands.
    ResourceState {
        Queued = "queued",
        Running = "running",
        Ready = "ready",
        Failed = "failed",
    }
}

text_enum! {
    /// How an attempt ended; the column `job_attempts.outcome`.
    Outcome {
        Succeeded = "succeeded",
        /// Counts against `max_attempts`.
        Failed = "failed",
        Paused = "paused",
        Cancelled = "cancelled",
        /// The runner was asked to stop; does not count.
        Interrupted = "interrupted",
        /// The lease ran out.
        Lost = "lost",
    }
}

text_enum! {
    /// Where a replica of a model stands.
    ReplicaState {
        Queued = "queued",
        Starting = "starting",
        Ready = "ready",
        Stopping = "stopping",
        Stopped = "stopped",
        Failed = "failed",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn quoted_after<'a>(text: &'a str, column: &str) -> BTreeSet<&'a str> {
        let start = text.find(column).expect("the column is in the migration");
        let list = &text[start..start + text[start..].find(')').expect("the CHECK ends")];
        list.split('\'').skip(1).step_by(2).collect()
    }

    fn names<T: Copy>(all: &[T], as_str: fn(T) -> &'static str) -> BTreeSet<&'static str> {
        all.iter().map(|one| as_str(*one)).collect()
    }

    #[test]
    fn the_checks_of_the_schema_name_the_same_sets() {
        let jobs = include_str!("../../migrations/0003_jobs.sql");
        assert_eq!(quoted_after(jobs, "CHECK (state IN"), names(JobState::ALL, JobState::as_str));
        assert_eq!(quoted_after(jobs, "CHECK (kind IN"), names(Kind::ALL, Kind::as_str));
        assert_eq!(quoted_after(jobs, "CHECK (pool IN"), names(Pool::ALL, Pool::as_str));
        let finished = quoted_after(jobs, "(state IN ('cancelled'");
        assert_eq!(finished, JobState::ALL.iter().filter(|s| s.is_finished()).map(|s| s.as_str()).collect());
        let attempts = include_str!("../../migrations/0004_attempts.sql");
        assert_eq!(quoted_after(attempts, "CHECK (outcome IN"), names(Outcome::ALL, Outcome::as_str));
        let datasets = include_str!("../../migrations/0005_datasets.sql");
        assert_eq!(quoted_after(datasets, "CHECK (state IN"), names(ResourceState::ALL, ResourceState::as_str));
        let models = include_str!("../../migrations/0007_models.sql");
        let replicas = &models[models.find("CREATE TABLE replicas").expect("replicas are in the migration")..];
        assert_eq!(quoted_after(replicas, "CHECK (state IN"), names(ReplicaState::ALL, ReplicaState::as_str));
    }

    /// The table of `docs/job-states.md` has a line `| from | to | when |` for each transition.
    #[test]
    fn the_page_lists_the_same_transitions() {
        let page = include_str!("../../docs/job-states.md");
        let listed: BTreeSet<(JobState, JobState)> = page
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `")?.split('|').map(|cell| cell.trim().trim_matches('`'));
                Some((cells.next()?.parse().ok()?, cells.next()?.parse().ok()?))
            })
            .collect();
        assert_eq!(listed, TRANSITIONS.iter().copied().collect());
    }

    #[test]
    fn finished_states_are_ends_and_every_other_state_can_end() {
        for state in JobState::ALL {
            let next: Vec<_> = TRANSITIONS.iter().filter(|(from, _)| from == state).map(|(_, to)| to).collect();
            assert_eq!(next.is_empty(), state.is_finished(), "{state}");
        }
    }

    #[test]
    fn names_are_read_back() {
        for state in JobState::ALL {
            assert_eq!(state.as_str().parse(), Ok(*state));
            assert_eq!(serde_json::to_value(state).ok(), Some(state.as_str().into()));
        }
        assert!("done".parse::<JobState>().is_err());
    }
}
