//! Keys and values of sequences in progress, and attention over them.
//!
//! One slot a sequence. The layout of each layer is `(slots, kv heads, capacity, d)`, keys after position
//! encoding. Slots and capacity grow as [`KvCache::resize`] is told, so memory follows use.
//! A position that was never written, or belongs to an earlier sequence, is finite and is hidden by
//! the plan's mask, so it has weight zero.

use tch::{Device, IndexOp, Kind, Tensor};

/// What a cache's tensors have in common.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    pub layers: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    pub kind: Kind,
    pub device: Device,
}

#[derive(Debug)]
pub struct KvCache {
    shape: CacheShape,
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

/// Attention of new tokens over their slots' keys: the new keys and values are written first.
///
/// The tokens of one pass stand in one row `(1, tokens)`, piece after piece as they were added: chunks
/// of single sequences, one token each of many. It shares the cache's memory, so the cache must not be
/// resized while it is used.
#[derive(Debug)]
pub struct CachedAttention {
    /// The cache's keys and values by layer, `(slots, kv heads, capacity, d)`.
    layers: Vec<[Tensor; 2]>,
    pieces: Vec<Piece>,
    tokens: i64,
}

#[derive(Debug)]
struct Piece {
    new: New,
    tokens: i64,
    /// Keys from here on are not looked at.
    keys: i64,
    /// Added to the scores: `(b, 1, query heads a key head × t, keys)`. None where causal order says it all.
    mask_b1qk: Option<Tensor>,
}

/// Where a piece's tokens stand.
#[derive(Debug)]
enum New {
    /// In one slot, positions from `start` on.
    Chunk { slot: i64, start: i64 },
    /// One in each slot from the first on: its position as `(b, kv heads, 1, d)`.
    Rows { index_bgtd: Tensor },
    /// Nowhere: they round up the number of tokens, and what comes of them is ignored.
    Padding,
}

impl CachedAttention {
    pub fn new(cache: &KvCache) -> CachedAttention {
        let layers = cache.layers.iter().map(|layer| layer.each_ref().map(Tensor::shallow_clone)).collect();
        CachedAttention { layers, pieces: Vec::new(), tokens: 0 }
    }

    /// Adds a piece of one sequence: `tokens` tokens at positions `start ..`. `heads` is the number of
    /// query heads.
    pub fn add_chunk(&mut self, cache: &KvCache, slot: i64, start: i64, tokens: i64, heads: i64) {
        let keys = start + tokens;
        let repeat = heads / cache.shape.kv_heads;
        let mask_b1qk = (start > 0 || repeat > 1).then(|| {
            let position_t = Tensor::arange_start(start, keys, (Kind::Int64, cache.shape.device));
            cache.mask(&position_t.view([1, 1, tokens, 1]), keys, repeat)
        });
        self.add(Piece { new: New::Chunk { slot, start }, tokens, keys, mask_b1qk });
    }

    /// Adds one token each of the slots `0 .. positions.len()`, row r at `positions[r]`. Keys from `keys` on
    /// are not looked at; a row whose position lies there is computed in vain.
    pub fn add_rows(&mut self, cache: &KvCache, positions: &[i64], keys: i64, heads: i64) {
        let rows = positions.len() as i64;
        let (groups, d) = (cache.shape.kv_heads, cache.shape.head_dim);
        let position_b111 = Tensor::from_slice(positions).to_device(cache.shape.device).view([rows, 1, 1, 1]);
        let mask_b1qk = Some(cache.mask(&position_b111, keys, heads / groups));
        let index_bgtd = position_b111.expand([rows, groups, 1, d], false);
        self.add(Piece { new: New::Rows { index_bgtd }, tokens: rows, keys, mask_b1qk });
    }

    /// Adds tokens of no sequence.
    pub fn add_padding(&mut self, tokens: i64) {
        if tokens > 0 {
            self.add(Piece { new: New::Padding, tokens, keys: 0, mask_b1qk: None });
        }
    }

    /// Tokens of all pieces.
    pub fn tokens(&self) -> i64 {
        self.tokens
    }

    fn add(&mut self, piece: Piece) {
        self.tokens += piece.tokens;
        self.pieces.push(piece);
    }

    /// Shapes as in [`super::AttentionPlan::attend`], with one row.
    pub fn attend(&self, layer: usize, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        let [keys, values] = &self.layers[layer];
        if let [piece] = self.pieces.as_slice() {
            return piece.attend([keys, values], [q_bhtd, k_bgtd, v_bgtd]);
        }
        let mut first = 0;
        let outputs: Vec<Tensor> = self
            .pieces
            .iter()
            .map(|piece| {
                let [q, k, v] = [q_bhtd, k_bgtd, v_bgtd].map(|x| x.narrow(2, first, piece.tokens));
                first += piece.tokens;
                piece.attend([keys, values], [&q, &k, &v])
            })
            .collect();
        Tensor::cat(&outputs, 2)
    }
}

impl Piece {
    /// `cached`: keys and values of all slots. Queries, keys and values of this piece, `(1, heads, tokens, d)`.
    fn attend(&self, cached: [&Tensor; 2], [q, k, v]: [&Tensor; 3]) -> Tensor {
        match &self.new {
            New::Padding => q.zeros_like(),
            New::Chunk { slot, start } => {
                let cached = cached.map(|cached| cached.narrow(0, *slot, 1));
                for (cached_1gkd, new_1gtd) in cached.iter().zip([k, v]) {
                    cached_1gkd.narrow(2, *start, self.tokens).copy_(new_1gtd);
                }
                self.scores(cached, q)
            }
            New::Rows { index_bgtd } => {
                // A token of each slot is a row of its own.
                let [q_bh1d, k_bg1d, v_bg1d] = [q, k, v].map(|x| x.transpose(0, 2));
                let cached = cached.map(|cached| cached.narrow(0, 0, self.tokens));
                for (cached_bgkd, new_bg1d) in cached.iter().zip([k_bg1d, v_bg1d]) {
                    let _ = cached_bgkd.shallow_clone().scatter_(2, index_bgtd, &new_bg1d);
                }
                self.scores(cached, &q_bh1d).transpose(0, 2)
            }
        }
    }

    fn scores(&self, cached_bgkd: [Tensor; 2], q_bhtd: &Tensor) -> Tensor {
        let (b, heads, t, d) = q_bhtd.size4().expect("queries are (b, heads, t, d)");
        let groups = cached_bgkd[0].size()[1];
        // The heads that share keys stand side by side: as rows of one head they need no copy of them.
        let q_bgqd = q_bhtd.reshape([b, groups, heads / groups * t, d]);
        let [k_bgkd, v_bgkd] = cached_bgkd.map(|cached| cached.narrow(2, 0, self.keys));
        let causal = self.mask_b1qk.is_none();
        Tensor::scaled_dot_product_attention(&q_bgqd, &k_bgkd, &v_bgkd, self.mask_b1qk.as_ref(), 0.0, causal, None, false)
            .view([b, heads, t, d])
    }
}

impl KvCache {
    /// 0 where a key's position is at most the query's, −∞ elsewhere, once for each of the `repeat`
    /// query heads of a key head. `position` is `(b, 1, t, 1)`, the result `(b, 1, repeat × t, keys)`.
    fn mask(&self, position_b1t1: &Tensor, keys: i64, repeat: i64) -> Tensor {
        let key_k = Tensor::arange(keys, (Kind::Int64, self.shape.device));
        let hidden_b1tk = key_k.view([1, 1, 1, keys]).gt_tensor(position_b1t1);
        let visible_b1tk = Tensor::zeros(hidden_b1tk.size(), (self.shape.kind, self.shape.device));
        let mask_b1tk = visible_b1tk.masked_fill(&hidden_b1tk, f64::NEG_INFINITY);
        if repeat == 1 { mask_b1tk } else { mask_b1tk.repeat([1, 1, repeat, 1]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> CacheShape {
        CacheShape { layers: 1, kv_heads: 2, head_dim: 8, kind: Kind::Float, device: Device::Cpu }
    }

    /// Attention by its definition: every head with its own copy of the keys.
    fn plain(q_bhtd: &Tensor, k_bhtd: &Tensor, v_bhtd: &Tensor) -> Tensor {
        let group = q_bhtd.size()[1] / k_bhtd.size()[1];
        let [k_bhtd, v_bhtd] = [k_bhtd, v_bhtd].map(|t| t.repeat_interleave_self_int(group, 1, None));
        let tokens = q_bhtd.size()[2];
        let hidden = Tensor::ones([tokens, tokens], (Kind::Bool, Device::Cpu)).triu(1);
        let scores = q_bhtd.matmul(&k_bhtd.transpose(-2, -1)) / (q_bhtd.size()[3] as f64).sqrt();
        scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float).matmul(&v_bhtd)
    }

    fn close(a: &Tensor, b: &Tensor) -> bool {
        a.allclose(b, 1e-5, 1e-5, false)
    }

    #[test]
    fn chunks_and_rows_equal_attention_over_the_whole() {
        let (_guard, heads, tokens) = (tch::no_grad_guard(), 4, 13);
        let random = |heads: i64| Tensor::randn([2, heads, tokens, 8], (Kind::Float, Device::Cpu));
        let (q, k, v) = (random(heads), random(2), random(2));
        let expected = plain(&q, &k, &v);
        let mut cache = KvCache::new(shape());
        cache.resize(2, 16);
        let part = |t: &Tensor, slot: i64, start: i64, count: i64| t.narrow(0, slot, 1).narrow(2, start, count);
        let attend = |plan: &CachedAttention, part: &dyn Fn(&Tensor) -> Tensor| plan.attend(0, &part(&q), &part(&k), &part(&v));
        // The first sequence has two chunks of prompt, the second one of another length; the last two
        // chunks are computed in one pass, with padding behind them.
        let mut plan = CachedAttention::new(&cache);
        plan.add_chunk(&cache, 0, 0, 4, heads);
        assert!(close(&attend(&plan, &|t| part(t, 0, 0, 4)), &part(&expected, 0, 0, 4)));
        let mut plan = CachedAttention::new(&cache);
        plan.add_chunk(&cache, 1, 0, 7, heads);
        plan.add_chunk(&cache, 0, 4, 5, heads);
        plan.add_padding(2);
        assert_eq!(plan.tokens(), 14);
        let two = |t: &Tensor| Tensor::cat(&[part(t, 1, 0, 7), part(t, 0, 4, 5)], 2);
        let padded = |t: &Tensor| Tensor::cat(&[two(t), part(t, 0, 0, 2)], 2);
        assert!(close(&attend(&plan, &padded).narrow(2, 0, 12), &two(&expected)));
        // Then both go on together, from positions 9 and 7, with a cache that grows in between; once
        // beside a chunk of a third sequence.
        for step in 0..4 {
            if step == 2 {
                cache.resize(4, 32);
            }
            let positions = [9 + step, 7 + step];
            let row = |t: &Tensor| Tensor::cat(&[part(t, 0, positions[0], 1), part(t, 1, positions[1], 1)], 2);
            let mut plan = CachedAttention::new(&cache);
            if step == 3 {
                plan.add_chunk(&cache, 2, 0, 3, heads);
            }
            plan.add_rows(&cache, &positions, positions[0] + 1, heads);
            let rows = |t: &Tensor| if step == 3 { Tensor::cat(&[part(t, 1, 0, 3), row(t)], 2) } else { row(t) };
            assert!(close(&attend(&plan, &rows), &rows(&expected)));
        }
        cache.move_slot(1, 3);
        assert!(cache.layers[0][0].get(3).equal(&cache.layers[0][0].get(1)));
        cache.clear_slot(3);
        assert_eq!(cache.layers[0][0].get(3).abs().sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(cache.bytes(), 2 * 4 * 2 * 32 * 8 * 4);
    }
}
