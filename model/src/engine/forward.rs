//! The model with its cache: chunks of prompts and the newest token of every slot, in one pass.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::scheduler::{Chunk, Step};
use crate::{
    arch::Model,
    config::ModelConfig,
    nn::{AttentionPlan, CacheShape, KvCache, Pass, Placement, Row, Span},
};

/// Rows of logits on the host, one value an id.
pub(super) struct Logits {
    values: Vec<f32>,
    vocabulary: usize,
}

impl Logits {
    /// `(rows, vocabulary)` of any type on any device.
    fn new(logits: &Tensor) -> Logits {
        let (rows, vocabulary) = logits.size2().expect("logits are (rows, vocabulary)");
        let logits = logits.to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
        let mut values = vec![0.0; (rows * vocabulary) as usize];
        logits.copy_data(&mut values, (rows * vocabulary) as usize);
        Logits { values, vocabulary: vocabulary as usize }
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.vocabulary..(row + 1) * self.vocabulary]
    }
}

/// A pass that computes chunks of prompts has a multiple of this many tokens.
const PREFILL_MULTIPLE: usize = 16;

/// What one pass through the model computes: chunks of prompts, then the newest token of every slot.
#[derive(Debug, Default)]
pub(super) struct Computation {
    placement: Placement,
    /// Of the chunks, then of the rows; and where each stands in its sequence.
    tokens: Vec<i64>,
    positions: Vec<i64>,
    /// Indices of the tokens whose logits are wanted, rising.
    wanted: Vec<i64>,
}

impl Computation {
    /// Adds a chunk; where its logits will be.
    pub(super) fn add_chunk(&mut self, chunk: &Chunk, tokens: &[u32], every_position: bool) -> Range<usize> {
        self.tokens.extend(tokens.iter().map(|&id| i64::from(id)));
        self.positions.extend((chunk.start..chunk.start + chunk.length).map(|position| position as i64));
        let (slot, start, length) = (chunk.slot as i64, chunk.start as i64, chunk.length as i64);
        self.placement.chunks.push(Span { slot, start, length });
        let from = if every_position { chunk.length } else { usize::from(chunk.last) };
        self.want(from)
    }

    /// Adds the newest tokens of the slots from 0 on, which look at `keys` positions; where their logits
    /// will be.
    pub(super) fn add_rows(&mut self, tokens: &[u32], rows: Vec<Row>, keys: usize) -> Range<usize> {
        self.tokens.extend(tokens.iter().map(|&id| i64::from(id)));
        self.positions.extend(rows.iter().map(|row| row.position));
        (self.placement.rows, self.placement.keys) = (rows, keys as i64);
        self.want(tokens.len())
    }

    /// Rounds the number of tokens up, where there are chunks: the kernels of products are made for a number of
    /// tokens when it first comes, so there are few of them.
    fn pad(&mut self) {
        if !self.placement.chunks.is_empty() {
            let padded = self.tokens.len().next_multiple_of(PREFILL_MULTIPLE);
            self.placement.padding = (padded - self.tokens.len()) as i64;
            self.tokens.resize(padded, 0);
            self.positions.resize(padded, 0);
        }
    }

    /// Asks for the logits of the last `count` tokens.
    fn want(&mut self, count: usize) -> Range<usize> {
        let (end, first) = (self.tokens.len() as i64, self.wanted.len());
        self.wanted.extend(end - count as i64..end);
        first..first + count
    }
}

pub(super) struct Forward {
    model: Model,
    cache: KvCache,
    device: Device,
}

impl Forward {
    pub(super) fn new(mut model: Model, config: &ModelConfig, kind: Kind, device: Device) -> Forward {
        let &ModelConfig { layers, heads, kv_heads, head_dim, .. } = config;
        model.pack();
        Forward { model, cache: KvCache::new(CacheShape { layers, heads, kv_heads, head_dim, kind, device }), device }
    }

    /// Moves slots and sizes the cache as the step wants it.
    pub(super) fn prepare(&mut self, step: &Step) {
        for &(from, to) in &step.moves {
            self.cache.move_slot(from as i64, to as i64);
        }
        self.cache.resize(step.cache.0 as i64, step.cache.1 as i64);
    }

    /// Computes what a pass holds, and the logits of the tokens that it asks for.
    pub(super) fn pass(&self, mut pass: Computation) -> Logits {
        let _no_grad = tch::no_grad_guard();
        pass.pad();
        let mut plan = AttentionPlan::over_cache(&self.cache, &pass.placement);
        let [tokens_bt, positions_bt] =
            [&pass.tokens, &pass.positions].map(|ids| Tensor::from_slice(ids).to_device(self.device).unsqueeze(0));
        let hidden_tc = self.model.hidden(&tokens_bt, &positions_bt, &mut Pass::plain(&mut plan)).squeeze_dim(0);
        if pass.wanted.is_empty() {
            return Logits { values: Vec::new(), vocabulary: 0 };
        }
        let wanted = Tensor::from_slice(&pass.wanted).to_device(self.device);
        let hidden_tc =
            if pass.wanted.len() as i64 == hidden_tc.size()[0] { hidden_tc } else { hidden_tc.index_select(0, &wanted) };
        Logits::new(&self.model.logits(&hidden_tc))
    }

    /// Forgets what a slot holds.
    pub(super) fn clear(&mut self, slot: usize) {
        self.cache.clear_slot(slot as i64);
    }
}
