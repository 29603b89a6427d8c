//! Attention over a cache on the CPU, through the kernel in `cpp/attention.cpp`.

use tch::Tensor;

use super::cache::{KvCache, Placement};
use crate::shim::{self, CachedSpan};

/// Attention of new tokens over their slots' keys, into which the new keys and values are put first. Every
/// token looks at its own positions alone, so nothing of it depends on its neighbours.
#[derive(Debug)]
pub struct CachedAttention {
    /// The cache's keys and values by layer, `(slots, kv heads, capacity, d)`.
    layers: Vec<[Tensor; 2]>,
    spans: Vec<CachedSpan>,
}

impl CachedAttention {
    /// See [`super::AttentionPlan::over_cache`].
    pub fn new(cache: &KvCache, placement: &Placement) -> CachedAttention {
        let mut token = 0;
        let mut spans = Vec::with_capacity(placement.chunks.len() + placement.rows.len());
        for chunk in &placement.chunks {
            spans.push(CachedSpan { token, length: chunk.length, slot: chunk.slot, start: chunk.start });
            token += chunk.length;
        }
        let rows = placement.rows.iter().enumerate().filter(|(_, row)| !row.idle);
        spans.extend(rows.map(|(slot, row)| {
            let slot = slot as i64;
            CachedSpan { token: token + slot, length: 1, slot, start: row.position }
        }));
        CachedAttention { layers: cache.layers(), spans }
    }

    /// Shapes as in [`super::AttentionPlan::attend`], with one row.
    pub fn attend(&self, layer: usize, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        let new = [q_bhtd, k_bgtd, v_bgtd].map(|x| x.squeeze_dim(0).transpose(0, 1));
        let out_thd = shim::attend_cached(new.each_ref(), self.layers[layer].each_ref(), &self.spans);
        out_thd.expect("attention over a cache").transpose(0, 1).unsqueeze(0)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::nn::{AttentionPlan, CacheShape, MaskedAttention, Row, Span, documents::with_fewer_instructions};

    const HEADS: i64 = 4;
    const KV_HEADS: i64 = 2;

    fn cache(head_dim: i64, kind: Kind) -> KvCache {
        let mut cache =
            KvCache::new(CacheShape { layers: 1, heads: HEADS, kv_heads: KV_HEADS, head_dim, kind, device: Device::Cpu });
        cache.resize(2, 64);
        cache
    }

    /// Attention by its definition, in double precision: every head with its own copy of the keys.
    fn plain(q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        let [q_bhtd, k_bgtd, v_bgtd] = [q_bhtd, k_bgtd, v_bgtd].map(|x| x.to_kind(Kind::Double));
        let [k_bhtd, v_bhtd] = [k_bgtd, v_bgtd].map(|x| x.repeat_interleave_self_int(HEADS / KV_HEADS, 1, None));
        let tokens = q_bhtd.size()[2];
        let hidden = Tensor::ones([tokens, tokens], (Kind::Bool, Device::Cpu)).triu(1);
        let scores_bhqk = q_bhtd.matmul(&k_bhtd.transpose(-2, -1)) / (q_bhtd.size()[3] as f64).sqrt();
        scores_bhqk.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&v_bhtd)
    }

    /// Two sequences by chunks and by rows, with a cache that grows, and how far each pass was from the whole.
    fn differences(head_dim: i64, kind: Kind, plan: impl Fn(&KvCache, &Placement) -> AttentionPlan) -> Vec<f64> {
        const TOKENS: i64 = 45;
        let _no_grad = tch::no_grad_guard();
        tch::manual_seed(5);
        let random = |heads: i64| Tensor::randn([2, heads, TOKENS, head_dim], (Kind::Float, Device::Cpu)).to_kind(kind);
        let (q, k, v) = (random(HEADS), random(KV_HEADS), random(KV_HEADS));
        let expected = plain(&q, &k, &v);
        let mut cache = cache(head_dim, kind);
        // Positions of sequences as tokens of a pass.
        let tokens = |x: &Tensor, spans: &[Span], padding: i64| {
            let mut parts: Vec<Tensor> =
                spans.iter().map(|span| x.narrow(0, span.slot, 1).narrow(2, span.start, span.length)).collect();
            parts.push(Tensor::zeros([1, x.size()[1], padding, head_dim], (x.kind(), Device::Cpu)));
            Tensor::cat(&parts, 2)
        };
        let difference = |cache: &KvCache, spans: &[Span], placement: &Placement| {
            let [q, k, v] = [&q, &k, &v].map(|x| tokens(x, spans, placement.padding));
            let found = plan(cache, placement).attend(0, &q, &k, &v);
            let expected = tokens(&expected, spans, 0);
            let found = found.narrow(2, 0, expected.size()[2]).to_kind(Kind::Double);
            (found - expected).abs().max().double_value(&[])
        };
        let mut found = Vec::new();
        // Prompts in chunks, of one pass or of several, of one token or of more than a block of queries.
        let chunk = |slot, start, length| Span { slot, start, length };
        for (chunks, padding) in [
            (vec![chunk(0, 0, 30)], 0),
            (vec![chunk(1, 0, 1)], 0),
            (vec![chunk(1, 1, 6), chunk(0, 30, 7)], 3),
            (vec![chunk(0, 37, 1)], 15),
        ] {
            found.push(difference(&cache, &chunks, &Placement { chunks: chunks.clone(), padding, ..Placement::default() }));
        }
        // Both go on together; once beside a chunk, while the second slot is idle.
        for step in 0..4 {
            if step == 2 {
                cache.resize(4, 128);
            }
            let positions = [38 + step, 7 + step];
            let rows: Vec<Row> = positions.map(|position| Row { position, idle: false }).into();
            let spans = [chunk(0, positions[0], 1), chunk(1, positions[1], 1)];
            found.push(difference(&cache, &spans, &Placement { rows, keys: positions[0] + 1, ..Placement::default() }));
        }
        let placement = Placement {
            chunks: vec![chunk(1, 11, 3)],
            rows: vec![Row { position: 42, idle: false }, Row { position: 14, idle: true }],
            keys: 43,
            padding: 0,
        };
        let spans = [chunk(1, 11, 3), chunk(0, 42, 1)];
        let [q, k, v] = [&q, &k, &v].map(|x| tokens(x, &[spans[0], spans[1], chunk(1, 14, 1)], 0));
        let all = plan(&cache, &placement).attend(0, &q, &k, &v);
        let whole = tokens(&expected, &spans, 0);
        found.push((all.narrow(2, 0, 4).to_kind(Kind::Double) - whole).abs().max().double_value(&[]));
        found
    }

    #[test]
    fn chunks_and_rows_equal_attention_over_the_whole() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            // Whole vectors, parts of one, and both.
            for head_dim in [64, 16, 8, 20, 112] {
                let by_kernel = differences(head_dim, kind, AttentionPlan::over_cache);
                let masked =
                    |cache: &KvCache, placement: &Placement| AttentionPlan::Masked(MaskedAttention::new(cache, placement));
                let by_mask = differences(head_dim, kind, masked);
                assert!(by_kernel.iter().all(|&far| far < tolerance), "{kind:?} {head_dim}: {by_kernel:?}");
                assert!(by_mask.iter().all(|&far| far < tolerance), "{kind:?} {head_dim}, masked: {by_mask:?}");
            }
        }
    }

    #[test]
    fn it_is_the_same_with_fewer_instructions() {
        with_fewer_instructions("nn::cached::tests::chunks_and_rows_equal_attention_over_the_whole");
    }

    #[test]
    fn what_does_not_lie_in_the_cache_is_refused() {
        let cache = cache(8, Kind::Float);
        let new = [HEADS, KV_HEADS, KV_HEADS].map(|heads| Tensor::zeros([3, heads, 8], (Kind::Float, Device::Cpu)));
        let attend = |token, length, slot, start| {
            let spans = [CachedSpan { token, length, slot, start }];
            shim::attend_cached(new.each_ref(), cache.layers()[0].each_ref(), &spans)
        };
        assert!(attend(0, 3, 1, 61).is_ok());
        for (token, length, slot, start) in
            [(1, 3, 0, 0), (-1, 2, 0, 0), (0, 0, 0, 0), (0, 1, 2, 0), (0, 3, 0, 62), (0, 1, 0, -1)]
        {
            assert!(attend(token, length, slot, start).is_err(), "{token} {length} {slot} {start}");
        }
        let other = Tensor::zeros([3, HEADS, 16], (Kind::Float, Device::Cpu));
        assert!(shim::attend_cached([&other, &new[1], &new[2]], cache.layers()[0].each_ref(), &[]).is_err());
    }
}
