//! Rotary position embedding (Su et al., arXiv 2104.09864), half-split: channel i turns with i + d/2.

use tch::{Device, Kind, Tensor};

/// Cosines and sines for every position of the context.
#[derive(Debug)]
pub struct Rotary {
    /// (context, d/2), fp32
    cos: Tensor,
    sin: Tensor,
}

/// The rows for the positions of one batch, shared by all layers: `(b, t, 1, d/2)`.
#[derive(Debug)]
pub struct Angles {
    cos_bt1d: Tensor,
    sin_bt1d: Tensor,
}

impl Rotary {
    pub fn new(context: i64, head_dim: i64, theta: f64, device: Device) -> Rotary {
        let options = (Kind::Double, Device::Cpu);
        let frequencies = (Tensor::arange(head_dim / 2, options) * (-2.0 / head_dim as f64 * theta.ln())).exp();
        let angles = Tensor::arange(context, options).outer(&frequencies);
        Rotary {
            cos: angles.cos().to_kind(Kind::Float).to_device(device),
            sin: angles.sin().to_kind(Kind::Float).to_device(device),
        }
    }

    pub fn angles(&self, positions_bt: &Tensor) -> Angles {
        let rows = |table: &Tensor| Tensor::embedding(table, positions_bt, -1, false, false).unsqueeze(2);
        Angles { cos_bt1d: rows(&self.cos), sin_bt1d: rows(&self.sin) }
    }
}

impl Angles {
    /// Turns queries or keys `(b, t, heads, d)`.
    pub fn rotate(&self, x_bthd: &Tensor) -> Tensor {
        let halves = x_bthd.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        let turned = [a * &self.cos_bt1d - b * &self.sin_bt1d, b * &self.cos_bt1d + a * &self.sin_bt1d];
        Tensor::cat(&turned, -1).to_kind(x_bthd.kind())
    }
}
