//! Which tokens go into which sequence: the split into training and validation, and the packing.
//!
//! A document of n tokens gives n − 1 pairs of an input and its target. In pretraining it is cut
//! where it exceeds the context; a conversation never is. Pieces are packed first-fit over a bounded
//! window of open sequences, so no piece is cut to fill a gap. The plan is a pure function of the
//! shard, the context and the split.

use std::ops::Range;

use super::shards::Shard;
use crate::random::{self, Stream};

/// Below this many documents, validation is the tail of the tokens instead of a choice of documents.
const SPLIT_BY_DOCUMENT_FROM: u64 = 100;

/// Sequences that may still take a piece while packing.
const OPEN_SEQUENCES: usize = 64;

/// Consecutive pairs of one document: inputs `start .. start + len`, targets one further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub start: u64,
    pub len: u32,
}

/// The sequences of a shard, or of a part of it.
#[derive(Clone, Debug, Default)]
pub struct Packing {
    pieces: Vec<Piece>,
    /// Where in `pieces` each sequence ends.
    ends: Vec<usize>,
    /// Supervised targets in all.
    supervised: u64,
}

impl Packing {
    /// Packs documents, given as token ranges. Pieces without any supervised target are left out.
    pub fn of(shard: &Shard, documents: impl IntoIterator<Item = Range<u64>>, context: u64) -> Packing {
        let mut packer = Packer { context: context as u32, open: Vec::new(), done: Packing::default() };
        for document in documents {
            let last = document.end.saturating_sub(1);
            let mut start = document.start;
            while start < last {
                let len = (last - start).min(context);
                let supervised = (start..start + len).filter(|&input| shard.is_supervised(input + 1)).count() as u64;
                if supervised > 0 {
                    packer.done.supervised += supervised;
                    packer.place(Piece { start, len: len as u32 });
                }
                start += len;
            }
        }
        packer.finish()
    }

    pub fn len(&self) -> u64 {
        self.ends.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn sequence(&self, index: u64) -> &[Piece] {
        let index = index as usize;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.pieces[start..self.ends[index]]
    }

    pub fn total_supervised(&self) -> u64 {
        self.supervised
    }
}

struct Open {
    pieces: Vec<Piece>,
    used: u32,
}

struct Packer {
    context: u32,
    /// Oldest first.
    open: Vec<Open>,
    done: Packing,
}

impl Packer {
    fn place(&mut self, piece: Piece) {
        let room = self.open.iter().position(|open| open.used + piece.len <= self.context);
        let index = room.unwrap_or_else(|| {
            if self.open.len() == OPEN_SEQUENCES {
                let oldest = self.open.remove(0);
                self.close(oldest);
            }
            self.open.push(Open { pieces: Vec::new(), used: 0 });
            self.open.len() - 1
        });
        let open = &mut self.open[index];
        open.pieces.push(piece);
        open.used += piece.len;
        if open.used == self.context {
            let full = self.open.remove(index);
            self.close(full);
        }
    }

    fn close(&mut self, open: Open) {
        self.done.pieces.extend(open.pieces);
        self.done.ends.push(self.done.pieces.len());
    }

    fn finish(mut self) -> Packing {
        for open in std::mem::take(&mut self.open) {
            self.close(open);
        }
        self.done
    }
}

/// Documents to train on and documents to validate on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    pub train: Vec<Range<u64>>,
    pub validation: Vec<Range<u64>>,
}

/// Splits a shard by a seeded hash of each document's content, so duplicates stay on one side. Under
/// 100 documents the tail of the tokens is kept for validation; `whole` keeps documents in one piece.
pub fn split(shard: &Shard, fraction: f64, seed: u64, whole: bool) -> Split {
    let documents = shard.manifest.documents;
    let mut split = Split::default();
    let border = ((shard.manifest.tokens as f64) * (1.0 - fraction)) as u64;
    for index in 0..documents {
        let document = shard.document(index);
        if documents >= SPLIT_BY_DOCUMENT_FROM {
            let key = random::key(seed, Stream::Split, &shard.content_hash(index).to_le_bytes());
            let side = if random::uniform(key, 0) < fraction { &mut split.validation } else { &mut split.train };
            side.push(document);
        } else if document.end <= border {
            split.train.push(document);
        } else if document.start >= border || whole {
            split.validation.push(document);
        } else {
            split.train.push(document.start..border);
            split.validation.push(border..document.end);
        }
    }
    split
}

/// Every document of the shard.
pub fn all(shard: &Shard) -> impl Iterator<Item = Range<u64>> + '_ {
    (0..shard.manifest.documents).map(|index| shard.document(index))
}
