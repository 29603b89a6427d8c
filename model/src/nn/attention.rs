//! Attention, and the plan that says who attends to whom.
//!
//! Architectures take an [`AttentionPlan`] and never build a mask. Packed documents cost about the
//! sum of their squared lengths, never the square of the sequence.

use tch::{Device, Tensor};

use super::{Angles, CachedAttention, Linear, Parameters};
use crate::{config::ModelConfig, device::upload, shim};

/// Who attends to whom in one forward pass; the same for every layer.
#[derive(Debug)]
pub enum AttentionPlan {
    /// Every position attends to itself and to all before it in its row.
    Causal,
    /// Rows hold several documents; positions attend causally within their own.
    Blocks(Blocks),
    /// Positions attend to what the cache holds of their sequence, and are added to it.
    Cached(CachedAttention),
}

impl AttentionPlan {
    /// The plan for rows of `length` positions that hold documents of these lengths one after the
    /// other. What a row's documents do not fill is padding.
    pub fn of_documents(length: usize, documents: &[Vec<usize>], device: Device) -> AttentionPlan {
        if documents.iter().all(|row| row.as_slice() == [length]) {
            return AttentionPlan::Causal;
        }
        AttentionPlan::Blocks(Blocks::new(length, documents, device))
    }

    /// Attention of one layer. Queries are `(b, heads, t, d)`, keys and values
    /// `(b, kv heads, t, d)`; the result is shaped like the queries. Keys are not expanded in memory.
    pub fn attend(&mut self, layer: usize, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        match self {
            AttentionPlan::Causal => causal(q_bhtd, k_bgtd, v_bgtd),
            AttentionPlan::Blocks(blocks) => blocks.attend(q_bhtd, k_bgtd, v_bgtd),
            AttentionPlan::Cached(cached) => cached.attend(layer, q_bhtd, k_bgtd, v_bgtd),
        }
    }
}

/// Causal attention within rows through libtorch's fused kernels.
fn causal(q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
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

/// Documents grouped by length into causal batches. The index tensors are made once for a batch and
/// serve every layer.
#[derive(Debug)]
pub struct Blocks {
    classes: Vec<Class>,
    /// For every slot, the token (row × length + position) that it holds.
    tokens: Tensor,
    /// For every token, its slot.
    slots: Tensor,
    /// (slots, 1): slots behind a document's end.
    unused: Tensor,
    nothing: Tensor,
}

/// Documents of similar length, padded behind to the longest of them. Being behind, padding is never
/// attended to by a real position, so no mask is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Class {
    documents: i64,
    length: i64,
}

/// Documents up to this length share a class: smaller classes cost more calls than they save work.
const SHORTEST_CLASS: usize = 16;

impl Blocks {
    fn new(length: usize, rows: &[Vec<usize>], device: Device) -> Blocks {
        let mut by_class: std::collections::BTreeMap<usize, Vec<(usize, usize)>> = Default::default();
        let mut place = |start: usize, len: usize| {
            by_class.entry(len.next_power_of_two().max(SHORTEST_CLASS)).or_default().push((start, len));
        };
        for (row, documents) in rows.iter().enumerate() {
            let mut start = row * length;
            for &len in documents {
                place(start, len);
                start += len;
            }
            // Padding must go somewhere: it is a document of its own that nobody reads.
            if start < (row + 1) * length {
                place(start, (row + 1) * length - start);
            }
        }
        let mut slots = vec![0i64; rows.len() * length];
        let (mut tokens, mut unused, mut classes) = (Vec::new(), Vec::new(), Vec::new());
        for members in by_class.values() {
            let longest = members.iter().map(|&(_, len)| len).max().unwrap_or(0);
            for &(start, len) in members {
                for position in 0..longest {
                    if position < len {
                        slots[start + position] = tokens.len() as i64;
                    }
                    tokens.push((start + position.min(len - 1)) as i64);
                    unused.push(position >= len);
                }
            }
            classes.push(Class { documents: members.len() as i64, length: longest as i64 });
        }
        Blocks {
            classes,
            tokens: upload(Tensor::from_slice(&tokens), device),
            slots: upload(Tensor::from_slice(&slots), device),
            unused: upload(Tensor::from_slice(&unused).unsqueeze(1), device),
            nothing: upload(Tensor::from_slice::<bool>(&[]), device),
        }
    }

    fn attend(&self, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        let (b, heads, t, d) = q_bhtd.size4().expect("queries are (b, heads, t, d)");
        let [queries, keys, values] = [q_bhtd, k_bgtd, v_bgtd].map(|x| self.gather(x));
        let outputs: Vec<Tensor> = (0..self.classes.len())
            .map(|class| {
                let out_nhld = causal(&queries[class], &keys[class], &values[class]);
                out_nhld.transpose(1, 2).reshape([-1, heads * d])
            })
            .collect();
        let out = shim::move_rows(&Tensor::cat(&outputs, 0), &self.slots, &self.tokens, &self.unused);
        out.expect("scattering attention's result").view([b, t, heads, d]).transpose(1, 2)
    }

    /// `(b, heads, t, d)` as one `(n, heads, l, d)` for each class.
    fn gather(&self, x_bhtd: &Tensor) -> Vec<Tensor> {
        let (_, heads, _, d) = x_bhtd.size4().expect("attention acts on (b, heads, t, d)");
        let rows = x_bhtd.transpose(1, 2).reshape([-1, heads * d]);
        let slots = shim::move_rows(&rows, &self.tokens, &self.slots, &self.nothing).expect("gathering documents");
        let sizes: Vec<i64> = self.classes.iter().map(|class| class.documents * class.length).collect();
        let shape = |(rows, class): (Tensor, &Class)| rows.view([class.documents, class.length, heads, d]).transpose(1, 2);
        slots.split_with_sizes(&sizes, 0).into_iter().zip(&self.classes).map(shape).collect()
    }
}

/// Multi-head attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245).
#[derive(Debug)]
pub struct Attention {
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
        Attention {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            qkv: Linear::fused(parameters, &outputs, config.width, config.bias, std),
            output: Linear::new(parameters, &format!("{name}.output"), query, config.width, config.bias, residual_std),
        }
    }

    /// See [`Linear::pack`].
    pub fn pack(&mut self) {
        self.qkv.pack();
        self.output.pack();
    }

    /// `(b, t, width)` to the same. `angles` turns queries and keys where positions are rotary.
    pub fn forward(&self, layer: usize, x_btc: &Tensor, angles: Option<&Angles>, plan: &mut AttentionPlan) -> Tensor {
        let (b, t, _) = x_btc.size3().expect("attention acts on (b, t, width)");
        let (query, shared) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let qkv = self.qkv.forward(x_btc).split_with_sizes([query, shared, shared], -1);
        let heads = |x: &Tensor, heads: i64| x.view([b, t, heads, self.head_dim]);
        let turn = |x_bthd: Tensor| angles.map_or_else(|| x_bthd.shallow_clone(), |angles| angles.rotate(&x_bthd));
        let q_bhtd = turn(heads(&qkv[0], self.heads)).transpose(1, 2);
        let k_bgtd = turn(heads(&qkv[1], self.kv_heads)).transpose(1, 2);
        let v_bgtd = heads(&qkv[2], self.kv_heads).transpose(1, 2);
        let out_bhtd = plan.attend(layer, &q_bhtd, &k_bgtd, &v_bgtd);
        self.output.forward(&out_bhtd.transpose(1, 2).reshape([b, t, query]))
    }
}
