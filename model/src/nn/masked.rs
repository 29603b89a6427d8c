//! Attention over a cache through libtorch's own kernels, for devices other than the CPU.

use tch::{Kind, Tensor};

use super::cache::{KvCache, Placement};

/// Attention of new tokens over their slots' keys, into which the new keys and values are put first. Chunks
/// attend one by one, rows all at once, as many keys each; a mask hides what is not theirs.
#[derive(Debug)]
pub struct MaskedAttention {
    /// The cache's keys and values by layer, `(slots, kv heads, capacity, d)`.
    layers: Vec<[Tensor; 2]>,
    pieces: Vec<Piece>,
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
    Chunk {
        slot: i64,
        start: i64,
    },
    /// One in each slot from the first on: its position as `(b, kv heads, 1, d)`.
    Rows {
        index_bgtd: Tensor,
    },
    Padding,
}

impl MaskedAttention {
    /// See [`super::AttentionPlan::over_cache`].
    pub fn new(cache: &KvCache, placement: &Placement) -> MaskedAttention {
        let (device, groups, d) = (cache.shape.device, cache.shape.kv_heads, cache.shape.head_dim);
        let mut pieces = Vec::new();
        for chunk in &placement.chunks {
            let keys = chunk.start + chunk.length;
            let mask_b1qk = (chunk.start > 0 || cache.shape.heads > groups).then(|| {
                let position_t = Tensor::arange_start(chunk.start, keys, (Kind::Int64, device));
                mask(cache, &position_t.view([1, 1, chunk.length, 1]), keys)
            });
            let new = New::Chunk { slot: chunk.slot, start: chunk.start };
            pieces.push(Piece { new, tokens: chunk.length, keys, mask_b1qk });
        }
        if !placement.rows.is_empty() {
            let positions: Vec<i64> = placement.rows.iter().map(|row| row.position).collect();
            let rows = positions.len() as i64;
            let position_b111 = Tensor::from_slice(&positions).to_device(device).view([rows, 1, 1, 1]);
            let mask_b1qk = Some(mask(cache, &position_b111, placement.keys));
            let index_bgtd = position_b111.expand([rows, groups, 1, d], false);
            pieces.push(Piece { new: New::Rows { index_bgtd }, tokens: rows, keys: placement.keys, mask_b1qk });
        }
        if placement.padding > 0 {
            pieces.push(Piece { new: New::Padding, tokens: placement.padding, keys: 0, mask_b1qk: None });
        }
        MaskedAttention { layers: cache.layers(), pieces }
    }

    /// Shapes as in [`super::AttentionPlan::attend`], with one row.
    pub fn attend(&self, layer: usize, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        let [keys, values] = &self.layers[layer];
        let mut first = 0;
        let attend = |piece: &Piece| {
            let [q, k, v] = [q_bhtd, k_bgtd, v_bgtd].map(|x| x.narrow(2, first, piece.tokens));
            first += piece.tokens;
            piece.attend([keys, values], [&q, &k, &v])
        };
        let outputs: Vec<Tensor> = self.pieces.iter().map(attend).collect();
        match outputs.as_slice() {
            [whole] => whole.shallow_clone(),
            parts => Tensor::cat(parts, 2),
        }
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

/// 0 where a key's position is at most the query's, −∞ elsewhere, once for each of the query heads of a
/// key head. `position` is `(b, 1, t, 1)`, the result `(b, 1, query heads a key head × t, keys)`.
fn mask(cache: &KvCache, position_b1t1: &Tensor, keys: i64) -> Tensor {
    let key_k = Tensor::arange(keys, (Kind::Int64, cache.shape.device));
    let hidden_b1tk = key_k.view([1, 1, 1, keys]).gt_tensor(position_b1t1);
    let visible_b1tk = Tensor::zeros(hidden_b1tk.size(), (cache.shape.kind, cache.shape.device));
    let mask_b1tk = visible_b1tk.masked_fill(&hidden_b1tk, f64::NEG_INFINITY);
    mask_b1tk.repeat([1, 1, cache.shape.heads / cache.shape.kv_heads, 1])
}
