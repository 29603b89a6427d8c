//! Dropout (Srivastava et al., JMLR 2014) whose every bit is a pure function of where it falls.
//!
//! A bit depends on (seed, step, global sequence index, layer, site, element) and on nothing that was
//! drawn before, so a batch in one piece and in micro-batches, a resumed run and an uninterrupted
//! one, drop the same elements. Attention probabilities are not dropped: the fused kernels would have
//! to draw bits that nothing else can repeat.

use tch::Tensor;

use crate::{
    device::upload,
    shim::{self, DropoutPlace},
};

/// Where in a layer a mask stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// After the embeddings; its layer is 0.
    Embedding = 0,
    /// What attention adds to the residual stream.
    Attention = 1,
    /// What the feed-forward block adds to it.
    Mlp = 2,
}

/// The dropout of one forward pass in training.
#[derive(Clone, Debug)]
pub struct Dropout {
    pub probability: f64,
    /// The key of the dropout stream.
    pub seed: u64,
    pub step: u64,
    /// The global index of every row of the batch.
    pub sequences: Vec<u64>,
    /// Which part of the positions a rank has, of as many in each.
    pub part: i64,
}

impl Dropout {
    pub fn apply(&self, x_btc: &Tensor, layer: usize, site: Site) -> Tensor {
        let (_, positions, width) = x_btc.size3().expect("dropout acts on (batch, time, channels)");
        let place = DropoutPlace {
            seed: self.seed,
            step: self.step,
            layer: layer as u32,
            site: site as u32,
            probability: self.probability,
        };
        let first = self.part * positions;
        let mask = shim::dropout_mask(&self.sequences, first..first + positions, width, place).expect("a dropout mask");
        x_btc * upload(mask, x_btc.device()).to_kind(x_btc.kind())
    }
}
