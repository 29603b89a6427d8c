//! Attention, and the plan that says who attends to whom.
//!
//! Architectures take an [`AttentionPlan`] and never build a mask. Packed documents cost about the
//! sum of their squared lengths, never the square of the sequence.

use tch::{Device, Tensor};

use super::{Angles, Blocks, CachedAttention, Documents, KvCache, Linear, MaskedAttention, Parameters, Placement};
use crate::config::ModelConfig;

/// Who attends to whom in one forward pass; the same for every layer.
#[derive(Debug)]
pub enum AttentionPlan {
    /// Every position attends to itself and to all before it in its row.
    Causal,
    /// Positions attend causally within their document, of which a row may hold several. On the CPU.
    Documents(Documents),
    /// The same on other devices.
    Blocks(Blocks),
    /// Positions attend to what the cache holds of their sequence, and are added to it. On the CPU.
    Cached(CachedAttention),
    /// The same on other devices.
    Masked(MaskedAttention),
}

impl AttentionPlan {
    /// The plan for rows of `length` positions that hold documents of these lengths one after the
    /// other. What a row's documents do not fill is padding.
    pub fn of_documents(length: usize, documents: &[Vec<usize>], device: Device) -> AttentionPlan {
        if device == Device::Cpu {
            return AttentionPlan::Documents(Documents::new(length, documents));
        }
        if documents.iter().all(|row| row.as_slice() == [length]) {
            return AttentionPlan::Causal;
        }
        AttentionPlan::Blocks(Blocks::new(length, documents, device))
    }

    /// The plan for tokens placed in a cache, which must not be resized while the plan is used.
    pub fn over_cache(cache: &KvCache, placement: &Placement) -> AttentionPlan {
        match cache.device() {
            Device::Cpu => AttentionPlan::Cached(CachedAttention::new(cache, placement)),
            _ => AttentionPlan::Masked(MaskedAttention::new(cache, placement)),
        }
    }

    /// Attention of one layer. Queries are `(b, heads, t, d)`, keys and values
    /// `(b, kv heads, t, d)`; the result is shaped like the queries. Keys are not expanded in memory.
    pub fn attend(&mut self, layer: usize, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        match self {
            AttentionPlan::Causal => causal(q_bhtd, k_bgtd, v_bgtd),
            AttentionPlan::Documents(documents) => documents.attend(q_bhtd, k_bgtd, v_bgtd),
            AttentionPlan::Blocks(blocks) => blocks.attend(q_bhtd, k_bgtd, v_bgtd),
            AttentionPlan::Cached(cached) => cached.attend(layer, q_bhtd, k_bgtd, v_bgtd),
            AttentionPlan::Masked(masked) => masked.attend(layer, q_bhtd, k_bgtd, v_bgtd),
        }
    }
}

/// Causal attention within rows through libtorch's fused kernels.
pub(super) fn causal(q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
    let sdpa =
        |q: &Tensor| Tensor::scaled_dot_product_attention(q, k_bgtd, v_bgtd, None::<Tensor>, 0.0, q.size()[2] > 1, None, false);
    let (b, heads, t, d) = q_bhtd.size4().expect("queries are (b, heads, t, d)");
    let groups = k_bgtd.size()[1];
    if heads == groups {
        return sdpa(q_bhtd);
    }
    // The CPU kernel knows no grouped heads and would fall back to expanded keys and full scores.
    // Each query of a group in turn meets the same keys instead.
    let q_bgrtd = q_bhtd.view([b, groups, heads / groups, t, d]);
    let outputs: Vec<Tensor> = q_bgrtd.unbind(2).iter().map(sdpa).collect();
    Tensor::stack(&outputs, 2).view([b, heads, t, d])
}

/// Multi-head attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245).
#[derive(Debug)]
pub struct Attention {
    /// Of this rank, where several share them.
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    qkv: Linear,
    output: Linear,
}

impl Attention {
    pub fn new(parameters: &mut Parameters, name: &str, config: &ModelConfig, std: f64, residual_std: f64) -> Attention {
        let (query, shared) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let names = ["q", "k", "v"].map(|leaf| format!("{name}.{leaf}"));
        let outputs = [(names[0].as_str(), query), (names[1].as_str(), shared), (names[2].as_str(), shared)];
        let output = format!("{name}.output");
        let ranks = parameters.axis().size();
        Attention {
            heads: config.heads / ranks,
            kv_heads: config.kv_heads / ranks,
            head_dim: config.head_dim,
            qkv: Linear::by_outputs(parameters, &outputs, config.width, config.bias, std),
            output: Linear::by_inputs(parameters, &output, query, config.width, config.bias, residual_std),
        }
    }

    /// See [`Linear::pack`].
    pub fn pack(&mut self) {
        self.qkv.pack();
        self.output.pack();
    }

    /// `(b, t, width)` to the same. `angles` turns queries and keys where positions are rotary.
    pub fn forward(&self, layer: usize, x_btc: &Tensor, angles: Option<&Angles>, plan: &mut AttentionPlan) -> Tensor {
        let (query, shared) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let qkv_btc = self.qkv.forward(x_btc);
        let (b, t, _) = qkv_btc.size3().expect("attention acts on (b, t, width)");
        let qkv = qkv_btc.split_with_sizes([query, shared, shared], -1);
        let heads = |x: &Tensor, heads: i64| x.view([b, t, heads, self.head_dim]);
        let turn = |x_bthd: Tensor| angles.map_or_else(|| x_bthd.shallow_clone(), |angles| angles.rotate(&x_bthd));
        let q_bhtd = turn(heads(&qkv[0], self.heads)).transpose(1, 2);
        let k_bgtd = turn(heads(&qkv[1], self.kv_heads)).transpose(1, 2);
        let v_bgtd = heads(&qkv[2], self.kv_heads).transpose(1, 2);
        let out_bhtd = plan.attend(layer, &q_bhtd, &k_bgtd, &v_bgtd);
        self.output.forward(&out_bhtd.transpose(1, 2).reshape([b, t, query]))
    }
}
