//! Linear maps, embeddings, norms and the feed-forward block.

use tch::Tensor;

use super::{Init, Packed, Parameters};
use crate::config::{Activation, ModelConfig, Norm};

/// `x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

/// (outputs, inputs)
#[derive(Debug)]
enum Weight {
    Plain(Tensor),
    /// For use alone: the parameter is not looked at any more.
    Packed(Packed),
}

impl Linear {
    /// Named `{name}.weight` and, if `bias`, `{name}.bias`.
    pub fn new(parameters: &mut Parameters, name: &str, inputs: i64, outputs: i64, bias: bool, std: f64) -> Linear {
        Linear::fused(parameters, &[(name, outputs)], inputs, bias, std)
    }

    /// Several maps of one input as one product; each keeps its own names.
    pub fn fused(parameters: &mut Parameters, outputs: &[(&str, i64)], inputs: i64, bias: bool, std: f64) -> Linear {
        let named = |leaf: &str| outputs.iter().map(|(name, rows)| (format!("{name}.{leaf}"), *rows)).collect::<Vec<_>>();
        let weight = parameters.add_parts(&named("weight"), &[inputs], 0, Init::Normal(std));
        let bias = bias.then(|| parameters.add_parts(&named("bias"), &[], 0, Init::Zeros));
        Linear { weight: Weight::Plain(weight), bias }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        match &self.weight {
            Weight::Plain(weight) => x.linear(weight, self.bias.as_ref()),
            Weight::Packed(packed) => packed.product(x, self.bias.as_ref(), false),
        }
    }

    /// The GELU (tanh) of [`Linear::forward`].
    pub fn forward_gelu(&self, x: &Tensor) -> Tensor {
        match &self.weight {
            Weight::Plain(weight) => x.linear(weight, self.bias.as_ref()).gelu("tanh"),
            Weight::Packed(packed) => packed.product(x, self.bias.as_ref(), true),
        }
    }

    /// Lays the weight out for use alone, where that is possible; its parameter may be dropped.
    pub fn pack(&mut self) {
        if let Weight::Plain(weight) = &self.weight
            && let Some(packed) = Packed::new(weight)
        {
            self.weight = Weight::Packed(packed);
        }
    }
}

/// A table of rows, padded in memory to `padded_rows`.
#[derive(Debug)]
pub struct Embedding {
    /// (padded rows, width)
    pub weight: Tensor,
    rows: i64,
}

impl Embedding {
    pub fn new(parameters: &mut Parameters, name: &str, rows: i64, padded_rows: i64, width: i64, std: f64) -> Embedding {
        let names = [(format!("{name}.weight"), rows)];
        Embedding { weight: parameters.add_parts(&names, &[width], padded_rows - rows, Init::Normal(std)), rows }
    }

    pub fn forward(&self, indices: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, indices, -1, false, false)
    }

    /// The rows that are not padding. As an output projection this gives padded rows no logit at all,
    /// which is a logit of −∞, and so an exactly zero gradient.
    pub fn unpadded(&self) -> Tensor {
        if self.weight.size()[0] == self.rows { self.weight.shallow_clone() } else { self.weight.narrow(0, 0, self.rows) }
    }
}

/// LayerNorm (Ba et al., arXiv 1607.06450) or RMSNorm (Zhang & Sennrich, arXiv 1910.07467).
#[derive(Debug)]
pub struct NormLayer {
    kind: Norm,
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

impl NormLayer {
    pub fn new(parameters: &mut Parameters, name: &str, config: &ModelConfig) -> NormLayer {
        let weight = parameters.add(format!("{name}.weight"), &[config.width], Init::Ones);
        let has_bias = config.norm == Norm::Layer && config.bias;
        let bias = has_bias.then(|| parameters.add(format!("{name}.bias"), &[config.width], Init::Zeros));
        NormLayer { kind: config.norm, weight, bias, eps: config.norm_eps }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let shape = self.weight.size();
        match self.kind {
            Norm::Layer => x.layer_norm(&shape, Some(&self.weight), self.bias.as_ref(), self.eps, true),
            Norm::Rms => x.rms_norm(&shape, Some(&self.weight), self.eps),
        }
    }
}

/// The position-wise feed-forward block.
#[derive(Debug)]
pub struct Mlp {
    activation: Activation,
    /// For SwiGLU the gate and the value side by side.
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// `residual_std` is the deviation of the projection that writes into the residual stream.
    pub fn new(parameters: &mut Parameters, name: &str, config: &ModelConfig, std: f64, residual_std: f64) -> Mlp {
        let (gate, up) = (format!("{name}.gate"), format!("{name}.up"));
        let outputs: &[(&str, i64)] = match config.activation {
            Activation::Gelu => &[(&up, config.mlp_width)],
            Activation::Swiglu => &[(&gate, config.mlp_width), (&up, config.mlp_width)],
        };
        Mlp {
            activation: config.activation,
            up: Linear::fused(parameters, outputs, config.width, config.bias, std),
            down: Linear::new(parameters, &format!("{name}.down"), config.mlp_width, config.width, config.bias, residual_std),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let hidden = match self.activation {
            Activation::Gelu => self.up.forward_gelu(x),
            Activation::Swiglu => {
                let halves = self.up.forward(x).chunk(2, -1);
                halves[0].silu() * &halves[1]
            }
        };
        self.down.forward(&hidden)
    }

    /// See [`Linear::pack`].
    pub fn pack(&mut self) {
        self.up.pack();
        self.down.pack();
    }
}
