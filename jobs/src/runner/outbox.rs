//! What waits to be written about one attempt, in order, while its worker goes on.
//!
//! Reports go in without waiting for the database; one task takes them out and writes them under the
//! lease, trying again while the database is away. What is in memory stays bounded: a batch that has
//! grown large is put on the attempt's disk until its turn comes, and of the checkpoints that wait
//! only the best and the newest are kept.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lathe_model::{config::JobSpec, protocol::Numerics};
use tokio::sync::Notify;

use crate::{checkpoints::Staged, metrics::Batch};

/// Rows and events in memory before a batch goes to the disk.
const BATCH_IN_MEMORY: usize = 20_000;

/// Checkpoints that wait besides the best one.
const CHECKPOINTS_WAITING: usize = 2;

/// How long rows gather before they are written, and news (events, phases, the first step).
const GATHER: Duration = Duration::from_secs(1);
const GATHER_NEWS: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub enum Write {
    Batch(Batch),
    /// A batch that lies in this file.
    Stored(PathBuf),
    Started(Numerics),
    Resolved(Box<JobSpec>),
    Checkpoint(Staged),
}

#[derive(Debug)]
pub struct Outbox {
    folder: PathBuf,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Write>,
    /// One is being written.
    busy: bool,
    stored: usize,
    /// Numbered so far.
    events: u64,
    /// Something that a client waits for has come in.
    news: bool,
    last_write: Option<Instant>,
    closing: bool,
}

impl Outbox {
    /// Large batches are put into `folder`.
    pub fn new(folder: &Path) -> Outbox {
        Outbox { folder: folder.to_owned(), state: Mutex::default(), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to the batch that is gathering; `news` is written without waiting a second.
    pub fn gather(&self, news: bool, change: impl FnOnce(&mut Batch)) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if !matches!(state.waiting.back(), Some(Write::Batch(_))) {
            state.waiting.push_back(Write::Batch(Batch::default()));
        }
        let size = match state.waiting.back_mut() {
            Some(Write::Batch(batch)) => {
                let numbered = batch.events.len();
                change(batch);
                for event in &mut batch.events[numbered..] {
                    state.events += 1;
                    event.n = state.events;
                }
                batch.rows.len() + batch.events.len()
            }
            _ => 0,
        };
        if size >= BATCH_IN_MEMORY {
            self.store(state);
        }
        state.news |= news;
        drop(guard);
        self.changed.notify_waiters();
    }

    /// Puts the gathering batch on the disk. One that cannot be written stays in memory.
    fn store(&self, state: &mut State) {
        let Some(Write::Batch(batch)) = state.waiting.pop_back() else { return };
        let path = self.folder.join(format!("outbox-{}.json", state.stored));
        let written = serde_json::to_vec(&batch).map_err(io::Error::from).and_then(|bytes| fs::write(&path, bytes));
        state.stored += 1;
        match written {
            Ok(()) => state.waiting.push_back(Write::Stored(path)),
            Err(error) => {
                tracing::warn!(%error, "reports that wait for the database could not be put on the disk");
                state.waiting.push_back(Write::Batch(batch));
            }
        }
        // Later reports begin a batch of their own.
        state.waiting.push_back(Write::Batch(Batch::default()));
    }

    pub fn push(&self, write: Write) {
        let mut state = self.lock();
        state.waiting.push_back(write);
        state.news = true;
        drop_superseded(&mut state.waiting);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Nothing more is coming: what is left is written at once.
    pub fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_waiters();
    }

    /// The next write, after it has gathered; `None` once closed and empty. [`Outbox::done`] or
    /// [`Outbox::put_back`] follows.
    pub async fn next(&self) -> Option<Write> {
        loop {
            let changed = self.changed.notified();
            let wait = {
                let mut state = self.lock();
                match state.due() {
                    Due::Now => match state.waiting.pop_front() {
                        Some(write) => {
                            state.busy = true;
                            state.news &= !state.waiting.is_empty();
                            return Some(write);
                        }
                        None if state.closing => return None,
                        None => None,
                    },
                    Due::In(wait) => Some(wait),
                }
            };
            match wait {
                Some(wait) => tokio::select! { () = changed => {}, () = tokio::time::sleep(wait) => {} },
                None => changed.await,
            }
        }
    }

    pub fn done(&self) {
        let mut state = self.lock();
        state.busy = false;
        state.last_write = Some(Instant::now());
        drop(state);
        self.changed.notify_waiters();
    }

    /// The write did not reach the database.
    pub fn put_back(&self, write: Write) {
        let mut state = self.lock();
        state.busy = false;
        match (write, state.waiting.front_mut()) {
            (Write::Batch(mut earlier), Some(Write::Batch(later))) => {
                earlier.append(std::mem::take(later));
                *later = earlier;
            }
            (write, _) => state.waiting.push_front(write),
        }
        drop_superseded(&mut state.waiting);
    }
}

enum Due {
    Now,
    In(Duration),
}

impl State {
    fn due(&self) -> Due {
        let Some(first) = self.waiting.front() else { return Due::Now };
        let more = self.waiting.len() > 1;
        if self.closing || more || !matches!(first, Write::Batch(_)) {
            return Due::Now;
        }
        let gather = if self.news { GATHER_NEWS } else { GATHER };
        let since = self.last_write.map_or(GATHER, |at| at.elapsed());
        if since >= gather { Due::Now } else { Due::In(gather - since) }
    }
}

/// Of the checkpoints that wait, keeps the newest ones and the newest best one.
fn drop_superseded(waiting: &mut VecDeque<Write>) {
    let (mut kept, mut best_seen) = (0, false);
    let mut dropped = Vec::new();
    for (position, write) in waiting.iter().enumerate().rev() {
        let Write::Checkpoint(staged) = write else { continue };
        let is_best = staged.best && !best_seen;
        best_seen |= staged.best;
        if kept < CHECKPOINTS_WAITING {
            kept += 1;
        } else if !is_best {
            dropped.push(position);
        }
    }
    for position in dropped {
        if let Some(Write::Checkpoint(staged)) = waiting.remove(position) {
            tracing::info!(step = staged.step, "dropped a checkpoint that waited too long to be registered");
            let _ = fs::remove_dir_all(staged.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use lathe_model::protocol::{Level, MetricRow};
    use serde_json::json;

    use super::*;
    use crate::metrics::Event;

    fn row(step: u64) -> MetricRow {
        MetricRow {
            step,
            loss: 1.0,
            learning_rate: 1.0,
            grad_norm: 1.0,
            tokens: 1,
            tokens_per_second: 1.0,
            validation_loss: None,
        }
    }

    fn staged(step: i64, best: bool, root: &Path) -> Write {
        let folder = root.join(step.to_string());
        fs::create_dir_all(&folder).expect("it is writable");
        Write::Checkpoint(Staged { step, folder, loss: None, validation_loss: None, best })
    }

    #[tokio::test]
    async fn a_batch_that_was_put_back_comes_before_what_came_meanwhile() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let outbox = Outbox::new(folder.path());
        outbox.gather(true, |batch| {
            batch.metric(row(1));
            batch.events.push(Event::new(Level::Info, "first", "", json!({})));
        });
        let Some(first) = outbox.next().await else { panic!("a batch waits") };
        outbox.gather(false, |batch| {
            batch.metric(row(2));
            batch.events.push(Event::new(Level::Info, "second", "", json!({})));
        });
        outbox.put_back(first);
        outbox.close();
        match outbox.next().await {
            Some(Write::Batch(batch)) => {
                assert_eq!(batch.rows.keys().copied().collect::<Vec<_>>(), [1, 2]);
                let numbered: Vec<_> = batch.events.iter().map(|event| (event.n, event.code.as_str())).collect();
                assert_eq!(numbered, [(1, "first"), (2, "second")]);
            }
            other => panic!("{other:?}"),
        }
        outbox.done();
        assert!(outbox.next().await.is_none());
    }

    #[tokio::test]
    async fn a_long_outage_goes_to_the_disk_in_order() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let outbox = Outbox::new(folder.path());
        let total = BATCH_IN_MEMORY as u64 * 2 + 5;
        (1..=total).for_each(|step| outbox.gather(false, |batch| batch.metric(row(step))));
        outbox.close();
        let mut steps = Vec::new();
        while let Some(write) = outbox.next().await {
            let batch = match write {
                Write::Batch(batch) => batch,
                Write::Stored(path) => serde_json::from_slice(&fs::read(path).expect("it is there")).expect("it is a batch"),
                other => panic!("{other:?}"),
            };
            steps.extend(batch.rows.into_keys());
            outbox.done();
        }
        assert_eq!(steps, (1..=total).collect::<Vec<_>>());
    }

    #[test]
    fn waiting_checkpoints_are_the_newest_and_the_best() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let outbox = Outbox::new(root.path());
        for step in 1..=6 {
            outbox.push(staged(step, step == 2, root.path()));
        }
        let left: Vec<i64> = outbox
            .lock()
            .waiting
            .iter()
            .filter_map(|write| match write {
                Write::Checkpoint(staged) => Some(staged.step),
                _ => None,
            })
            .collect();
        assert_eq!(left, [2, 5, 6]);
        assert!(root.path().join("2").exists() && !root.path().join("3").exists());
    }
}
