//! Attention within documents through libtorch's own kernels, for devices other than the CPU.

use tch::{Device, Tensor};

use super::attention::causal;
use crate::{device::upload, shim};

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
    /// See [`super::AttentionPlan::of_documents`].
    pub fn new(length: usize, rows: &[Vec<usize>], device: Device) -> Blocks {
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

    pub fn attend(&self, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
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
