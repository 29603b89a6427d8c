//! Keys and values of sequences in progress, and where the tokens of a pass stand in them.
//!
//! One slot a sequence. The layout of each layer is `(slots, kv heads, capacity, d)`, keys after position
//! encoding. Slots and capacity grow as [`KvCache::resize`] is told, so memory follows use.
//! A position that was never written, or belongs to an earlier sequence, is finite and never attended to.

use tch::{Device, IndexOp, Kind, Tensor};

/// What a cache's tensors have in common.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    pub layers: i64,
    /// Of queries.
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    pub kind: Kind,
    pub device: Device,
}

#[derive(Debug)]
pub struct KvCache {
    pub(super) shape: CacheShape,
    slots: i64,
    capacity: i64,
    /// Keys and values by layer.
    layers: Vec<[Tensor; 2]>,
}

impl KvCache {
    /// An empty cache: [`KvCache::resize`] comes before use.
    pub fn new(shape: CacheShape) -> KvCache {
        let empty = || Tensor::zeros([0, shape.kv_heads, 0, shape.head_dim], (shape.kind, shape.device));
        KvCache { shape, slots: 0, capacity: 0, layers: (0..shape.layers).map(|_| [empty(), empty()]).collect() }
    }

    pub fn device(&self) -> Device {
        self.shape.device
    }

    /// Keys and values by layer, in the cache's own memory: it must not be resized while they are used.
    pub(super) fn layers(&self) -> Vec<[Tensor; 2]> {
        self.layers.iter().map(|layer| layer.each_ref().map(Tensor::shallow_clone)).collect()
    }

    pub fn bytes(&self) -> u64 {
        let elements = 2 * self.shape.layers * self.slots * self.shape.kv_heads * self.capacity * self.shape.head_dim;
        elements as u64 * self.shape.kind.elt_size_in_bytes() as u64
    }

    /// Makes the cache `slots × capacity`, keeping what fits; layer by layer, so that at most one
    /// layer is there twice. New positions are zero.
    pub fn resize(&mut self, slots: i64, capacity: i64) {
        if (slots, capacity) == (self.slots, self.capacity) {
            return;
        }
        let (keep_slots, keep) = (slots.min(self.slots), capacity.min(self.capacity));
        for tensor in self.layers.iter_mut().flatten() {
            let fresh =
                Tensor::zeros([slots, self.shape.kv_heads, capacity, self.shape.head_dim], (self.shape.kind, self.shape.device));
            fresh.i((..keep_slots, .., ..keep)).copy_(&tensor.i((..keep_slots, .., ..keep)));
            *tensor = fresh;
        }
        (self.slots, self.capacity) = (slots, capacity);
    }

    /// Gives the contents of slot `from` to slot `to`.
    pub fn move_slot(&mut self, from: i64, to: i64) {
        for tensor in self.layers.iter().flatten() {
            tensor.get(to).copy_(&tensor.get(from));
        }
    }

    /// Forgets a slot whose contents must not stay, such as NaN.
    pub fn clear_slot(&mut self, slot: i64) {
        for tensor in self.layers.iter().flatten() {
            let _ = tensor.get(slot).zero_();
        }
    }
}

/// Where the tokens of one pass stand, which are one row `(1, tokens)`: chunks of single sequences one after
/// the other, then one token of each slot from 0 on, then padding, of which nothing is used.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    pub chunks: Vec<Span>,
    pub rows: Vec<Row>,
    /// Positions that every row looks at where all look at as many; more than any row's that is used.
    pub keys: i64,
    pub padding: i64,
}

/// Positions `start ..` of the sequence in a slot.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub slot: i64,
    pub start: i64,
    pub length: i64,
}

/// The newest token of a slot.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub position: i64,
    /// Nothing is in the slot, or something that is not at its newest token: what is computed is not used, and
    /// may be written at this position.
    pub idle: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_keeps_its_contents_as_the_cache_grows_and_it_moves() {
        let shape = CacheShape { layers: 2, heads: 2, kv_heads: 2, head_dim: 8, kind: Kind::Float, device: Device::Cpu };
        let mut cache = KvCache::new(shape);
        cache.resize(2, 16);
        let written = Tensor::randn([2, 16, 8], (Kind::Float, Device::Cpu));
        cache.layers[1][0].get(1).copy_(&written);
        cache.resize(4, 32);
        cache.move_slot(1, 3);
        let moved = cache.layers[1][0].get(3);
        assert!(moved.narrow(1, 0, 16).equal(&written));
        assert_eq!(moved.narrow(1, 16, 16).abs().sum(Kind::Float).double_value(&[]), 0.0);
        cache.clear_slot(3);
        assert_eq!(cache.layers[1][0].get(3).abs().sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(cache.bytes(), 2 * 2 * 4 * 2 * 32 * 8 * 4);
    }
}
