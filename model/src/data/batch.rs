//! From sequences to tensors.
//!
//! The cursor of a run is a global sequence index: sequence `i` of epoch `e` is the one that
//! `permutation(seed, e)` puts at `i`. A batch is a pure function of the indices that it holds.

use tch::{Device, Tensor};

use super::{
    packing::{Packing, Piece},
    shards::Shard,
};
use crate::{device::upload, nn::AttentionPlan, random::Permutation};

/// A shard's sequences in the order of training.
#[derive(Debug)]
pub struct Order<'a> {
    pub shard: &'a Shard,
    pub packing: &'a Packing,
    pub seed: u64,
}

impl Order<'_> {
    /// The sequence that stands at a global index.
    fn sequence(&self, global: u64) -> u64 {
        let len = self.packing.len();
        Permutation::of_epoch(self.seed, global / len, len).at(global % len)
    }

    /// Supervised targets of the sequences at these global indices.
    pub fn supervised(&self, globals: std::ops::Range<u64>) -> u64 {
        globals.map(|global| self.packing.supervised(self.sequence(global))).sum()
    }

    pub fn batch(&self, globals: std::ops::Range<u64>, device: Device) -> Batch {
        let sequences: Vec<&[Piece]> = globals.clone().map(|global| self.packing.sequence(self.sequence(global))).collect();
        Batch::of(self.shard, &sequences, globals.collect(), device)
    }
}

/// One forward pass.
#[derive(Debug)]
pub struct Batch {
    pub tokens_bt: Tensor,
    /// Count from 0 in every document.
    pub positions_bt: Tensor,
    pub plan: AttentionPlan,
    /// Which places are supervised; `None`: all.
    pub chosen: Option<Chosen>,
    /// The targets of the supervised places.
    pub targets_n: Tensor,
    /// Global sequence index of every row.
    pub sequences: Vec<u64>,
    /// Inputs that are not padding.
    pub tokens: u64,
}

/// The supervised places of a batch, as [`crate::shim::move_rows`] takes them.
#[derive(Debug)]
pub struct Chosen {
    /// row × length + position of each, ascending.
    pub places: Tensor,
    /// For every place, which of `places` it is.
    pub back: Tensor,
    /// (places of the batch, 1): not supervised.
    pub unused: Tensor,
}

impl Chosen {
    fn of(places: &[i64], total: usize, device: Device) -> Chosen {
        let (mut back, mut unused) = (vec![0i64; total], vec![true; total]);
        for (index, &place) in places.iter().enumerate() {
            back[place as usize] = index as i64;
            unused[place as usize] = false;
        }
        Chosen {
            places: upload(Tensor::from_slice(places), device),
            back: upload(Tensor::from_slice(&back), device),
            unused: upload(Tensor::from_slice(&unused).unsqueeze(1), device),
        }
    }
}

impl Batch {
    /// Rows are cut to the longest one used.
    pub fn of(shard: &Shard, rows: &[&[Piece]], sequences: Vec<u64>, device: Device) -> Batch {
        let used = |row: &[Piece]| row.iter().map(|piece| piece.len as usize).sum::<usize>();
        let length = rows.iter().map(|row| used(row)).max().unwrap_or(0);
        let mut tokens = vec![0i64; rows.len() * length];
        let mut positions = vec![0i64; rows.len() * length];
        let (mut supervised, mut targets) = (Vec::new(), Vec::new());
        for (row, pieces) in rows.iter().enumerate() {
            let mut place = row * length;
            for piece in *pieces {
                for position in 0..u64::from(piece.len) {
                    let input = piece.start + position;
                    tokens[place] = shard.token(input);
                    positions[place] = position as i64;
                    if shard.is_supervised(input + 1) {
                        supervised.push(place as i64);
                        targets.push(shard.token(input + 1));
                    }
                    place += 1;
                }
            }
        }
        let documents: Vec<Vec<usize>> = rows.iter().map(|row| row.iter().map(|piece| piece.len as usize).collect()).collect();
        let shaped = |values: &[i64]| upload(Tensor::from_slice(values).view([rows.len() as i64, length as i64]), device);
        Batch {
            tokens_bt: shaped(&tokens),
            positions_bt: shaped(&positions),
            plan: AttentionPlan::of_documents(length, &documents, device),
            chosen: (supervised.len() < tokens.len()).then(|| Chosen::of(&supervised, tokens.len(), device)),
            targets_n: upload(Tensor::from_slice(&targets), device),
            sequences,
            tokens: documents.iter().flatten().sum::<usize>() as u64,
        }
    }

    /// Supervised targets.
    pub fn supervised(&self) -> i64 {
        self.targets_n.size()[0]
    }
}
