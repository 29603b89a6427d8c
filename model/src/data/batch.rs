//! From sequences to tensors.
//!
//! The cursor of a run is a global sequence index: sequence `i` of epoch `e` is the one that
//! `permutation(seed, e)` puts at `i`. An example is a pure function of its index, a batch of its examples.

use tch::{Device, Tensor};

use super::{
    packing::{Packing, Piece},
    shards::Shard,
};
use crate::{device::upload, nn::AttentionPlan, objective::Posing, random::Permutation};

/// A shard's sequences in the order of training.
#[derive(Debug)]
pub struct Order<'a> {
    pub shard: &'a Shard,
    pub packing: &'a Packing,
    pub posing: Posing,
}

impl Order<'_> {
    /// The sequence that stands at a global index.
    fn sequence(&self, global: u64) -> &[Piece] {
        let len = self.packing.len();
        self.packing.sequence(Permutation::of_epoch(self.posing.seed, global / len, len).at(global % len))
    }

    /// What is at these global indices.
    pub fn examples(&self, globals: std::ops::Range<u64>) -> impl Iterator<Item = Example> {
        globals.map(|global| Example::of(self.shard, self.sequence(global), global, self.posing))
    }
}

/// A sequence as its objective poses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Global sequence index.
    pub sequence: u64,
    /// What the model reads.
    pub tokens: Vec<i64>,
    /// What it is to say at each of them; `None`: nothing is asked.
    pub targets: Vec<Option<i64>>,
    /// Lengths of the documents, which stand one after the other.
    pub documents: Vec<usize>,
}

impl Example {
    pub fn of(shard: &Shard, pieces: &[Piece], sequence: u64, posing: Posing) -> Example {
        let documents: Vec<usize> = pieces.iter().map(|piece| piece.len as usize).collect();
        let length = documents.iter().sum();
        let (mut tokens, mut targets) = (Vec::with_capacity(length), Vec::with_capacity(length));
        for input in pieces.iter().flat_map(|piece| piece.start..piece.start + u64::from(piece.len)) {
            tokens.push(shard.token(input));
            targets.push(shard.is_supervised(input + 1).then(|| shard.token(input + 1)));
        }
        let mut example = Example { sequence, tokens, targets, documents };
        posing.pose(&mut example);
        example
    }

    /// Places that have a target.
    pub fn supervised(&self) -> u64 {
        self.targets.iter().flatten().count() as u64
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
    /// One row an example, cut to the longest one or the next multiple of `multiple`.
    pub fn of(examples: &[Example], multiple: usize, device: Device) -> Batch {
        let longest = examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0);
        let length = longest.next_multiple_of(multiple);
        let mut tokens = vec![0i64; examples.len() * length];
        let mut positions = vec![0i64; examples.len() * length];
        let (mut supervised, mut targets) = (Vec::new(), Vec::new());
        for (row, example) in examples.iter().enumerate() {
            let first = row * length;
            tokens[first..first + example.tokens.len()].copy_from_slice(&example.tokens);
            let within = example.documents.iter().flat_map(|&length| 0..length as i64);
            positions[first..].iter_mut().zip(within).for_each(|(place, position)| *place = position);
            for (place, target) in example.targets.iter().enumerate() {
                if let Some(target) = target {
                    supervised.push((first + place) as i64);
                    targets.push(*target);
                }
            }
        }
        let documents: Vec<Vec<usize>> = examples.iter().map(|example| example.documents.clone()).collect();
        let shaped = |values: &[i64]| upload(Tensor::from_slice(values).view([examples.len() as i64, length as i64]), device);
        Batch {
            tokens_bt: shaped(&tokens),
            positions_bt: shaped(&positions),
            plan: AttentionPlan::of_documents(length, &documents, device),
            chosen: (supervised.len() < tokens.len()).then(|| Chosen::of(&supervised, tokens.len(), device)),
            targets_n: upload(Tensor::from_slice(&targets), device),
            sequences: examples.iter().map(|example| example.sequence).collect(),
            tokens: documents.iter().flatten().sum::<usize>() as u64,
        }
    }

    /// Supervised targets.
    pub fn supervised(&self) -> i64 {
        self.targets_n.size()[0]
    }
}
