//! The model with its cache: one chunk of one prompt, or the newest token of every slot.

use tch::{Device, Kind, Tensor};

use super::scheduler::{Chunk, Step};
use crate::{
    arch::gpt::{Gpt, Pass},
    config::ModelConfig,
    nn::{AttentionPlan, CacheShape, CachedAttention, KvCache},
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

    pub(super) fn last(&self) -> &[f32] {
        &self.values[self.values.len() - self.vocabulary..]
    }
}

pub(super) struct Forward {
    model: Gpt,
    cache: KvCache,
    heads: i64,
    device: Device,
}

impl Forward {
    pub(super) fn new(model: Gpt, config: &ModelConfig, kind: Kind, device: Device) -> Forward {
        let shape = CacheShape { layers: config.layers, kv_heads: config.kv_heads, head_dim: config.head_dim, kind, device };
        Forward { model, cache: KvCache::new(shape), heads: config.heads, device }
    }

    /// Moves slots and sizes the cache as the step wants it.
    pub(super) fn prepare(&mut self, step: &Step) {
        for &(from, to) in &step.moves {
            self.cache.move_slot(from as i64, to as i64);
        }
        self.cache.resize(step.cache.0 as i64, step.cache.1 as i64);
    }

    /// Computes a piece of a prompt. Logits of every position, or of the last alone.
    pub(super) fn prefill(&self, chunk: &Chunk, tokens: &[u32], every_position: bool) -> Logits {
        let _no_grad = tch::no_grad_guard();
        let (start, length) = (chunk.start as i64, chunk.length as i64);
        let tokens_bt = self.ids(tokens).view([1, length]);
        let positions_bt = Tensor::arange_start(start, start + length, (Kind::Int64, self.device)).view([1, length]);
        let mut plan = AttentionPlan::Cached(CachedAttention::chunk(&self.cache, chunk.slot as i64, start, length, self.heads));
        let hidden_tc = self.model.hidden(&tokens_bt, &positions_bt, &mut Pass { plan: &mut plan, dropout: None }).squeeze_dim(0);
        let rows = if every_position { length } else { 1 };
        Logits::new(&self.model.logits(&hidden_tc.narrow(0, length - rows, rows)))
    }

    /// Computes one token of each slot from 0 on: `tokens[slot]` at `positions[slot]`.
    pub(super) fn decode(&self, tokens: &[u32], positions: &[usize], keys: usize) -> Logits {
        let _no_grad = tch::no_grad_guard();
        let rows = tokens.len() as i64;
        let positions: Vec<i64> = positions.iter().map(|&position| position as i64).collect();
        let positions_bt = Tensor::from_slice(&positions).to_device(self.device).view([rows, 1]);
        let mut plan = AttentionPlan::Cached(CachedAttention::rows(&self.cache, &positions, keys as i64, self.heads));
        let hidden_bc = self
            .model
            .hidden(&self.ids(tokens).view([rows, 1]), &positions_bt, &mut Pass { plan: &mut plan, dropout: None })
            .squeeze_dim(1);
        Logits::new(&self.model.logits(&hidden_bc))
    }

    /// Forgets what a slot holds.
    pub(super) fn clear(&mut self, slot: usize) {
        self.cache.clear_slot(slot as i64);
    }

    fn ids(&self, tokens: &[u32]) -> Tensor {
        let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        Tensor::from_slice(&ids).to_device(self.device)
    }
}
