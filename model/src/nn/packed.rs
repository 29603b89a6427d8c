//! Weights laid out for the CPU's matrix kernels, for models that only answer.
//!
//! libtorch's own product lays a weight out anew in every call. With the few rows of a decoding step
//! that costs more than the product itself, so an engine does it once. A single row in bf16, which is a step for one
//! client, has a kernel of its own on the same memory (`cpp/row_product.cpp`): what oneDNN does around a product weighs there.

use tch::{Device, Kind, Tensor};

use crate::shim;

/// Up to this many numbers the plain weight is kept as well: it is small, and a product with very
/// few rows is quicker with it.
const SMALL: usize = 1 << 19;

/// Rows from which the packed product is the quicker one even for a small fp32 weight.
const FEW_ROWS: usize = 8;

#[derive(Debug)]
pub struct Packed {
    weight: Tensor,
    plain: Option<Tensor>,
    outputs: i64,
    /// The kernel for single rows takes it.
    for_rows: bool,
}

impl Packed {
    /// `None` where the device or this CPU's library has no such layout.
    pub fn new(weight: &Tensor) -> Option<Packed> {
        if weight.device() != Device::Cpu {
            return None;
        }
        let _no_grad = tch::no_grad_guard();
        let keep = weight.kind() == Kind::Float && weight.numel() <= SMALL;
        let plain = weight.detach();
        let packed = shim::pack_weight(&plain).ok()?;
        let for_rows = shim::is_for_rows(&plain, &packed);
        Some(Packed { weight: packed, plain: keep.then_some(plain), outputs: weight.size()[0], for_rows })
    }

    /// Bytes beyond the weights' own that a model with so many parameters may take for plain copies, at most.
    pub fn small_bytes(parameters: u64) -> u64 {
        parameters.min(64 << 20) * 4
    }

    /// `x W^T + b` of any rows `(…, inputs)`, and the GELU of it if `gelu`.
    pub fn product(&self, x: &Tensor, bias: Option<&Tensor>, gelu: bool) -> Tensor {
        let mut size = x.size();
        let inputs = size.pop().unwrap_or(0);
        let rows = size.iter().product::<i64>();
        if let Some(plain) = self.plain.as_ref().filter(|_| (rows as usize) < FEW_ROWS) {
            let y = x.linear(plain, bias);
            return if gelu { y.gelu("tanh") } else { y };
        }
        let y = if rows == 1 && self.for_rows {
            let y = shim::row_product(x, &self.weight, bias, self.outputs).expect("a product of a row");
            if gelu { y.gelu("tanh") } else { y }
        } else {
            shim::packed_linear(&x.reshape([rows, inputs]), &self.weight, bias, gelu).expect("a packed product")
        };
        size.push(self.outputs);
        y.view(size.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_products_equal_plain_ones() {
        for (kind, tolerance) in [(Kind::Float, 1e-4), (Kind::BFloat16, 2e-2)] {
            for (outputs, inputs) in [(48, 32), (1000, 600), (1000, 608)] {
                let weight = (Tensor::randn([outputs, inputs], (Kind::Float, Device::Cpu)) * 0.1).to_kind(kind);
                let bias = Tensor::randn([outputs], (Kind::Float, Device::Cpu)).to_kind(kind);
                let packed = Packed::new(&weight).expect("every x86 CPU has the kernels");
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx512bf16") {
                    assert_eq!(packed.for_rows, kind == Kind::BFloat16 && inputs % 32 == 0, "{outputs} {inputs}");
                }
                for (rows, positions) in [(1, 1), (1, 2), (3, 2), (32, 2)] {
                    let x = Tensor::randn([rows, positions, inputs], (Kind::Float, Device::Cpu)).to_kind(kind);
                    for (bias, gelu) in [(Some(&bias), false), (Some(&bias), true), (None, false)] {
                        let plain = x.linear(&weight, bias);
                        let plain = if gelu { plain.gelu("tanh") } else { plain };
                        let found = packed.product(&x, bias, gelu);
                        assert_eq!(found.size(), [rows, positions, outputs]);
                        let [found, plain] = [found, plain].map(|y| y.to_kind(Kind::Float));
                        assert!(found.allclose(&plain, tolerance, tolerance, false), "{kind:?} {outputs} {rows} {gelu}");
                    }
                }
            }
        }
    }
}
