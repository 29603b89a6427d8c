//! Linear maps, embeddings, norms and the feed-forward block.

use tch::Tensor;

use super::{Cut, Init, Packed, Parameters};
use crate::{
    config::{Activation, ModelConfig, Norm},
    parallel::TensorAxis,
};

/// `x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    /// How the weight is shared by ranks, where it is.
    cut: Cut,
    axis: TensorAxis,
}

/// (outputs, inputs)
#[derive(Debug)]
enum Weight {
    Plain(Tensor),
    /// For use alone: the parameter is not looked at any more.
    Packed(Packed),
}

impl Linear {
    /// Several maps of one input as one product, whose outputs ranks share. Each keeps its own names, `{name}.weight` and, if
    /// `bias`, `{name}.bias`.
    pub fn by_outputs(parameters: &mut Parameters, outputs: &[(&str, i64)], inputs: i64, bias: bool, std: f64) -> Linear {
        let named = |leaf: &str| outputs.iter().map(|(name, rows)| (format!("{name}.{leaf}"), *rows)).collect::<Vec<_>>();
        let weight = parameters.add_cut(&named("weight"), &[inputs], Cut::Rows, Init::Normal(std));
        let bias = bias.then(|| parameters.add_cut(&named("bias"), &[], Cut::Rows, Init::Zeros));
        Linear { weight: Weight::Plain(weight), bias, cut: Cut::Rows, axis: parameters.axis().clone() }
    }

    /// A map whose inputs ranks share, as the product before it leaves them.
    pub fn by_inputs(parameters: &mut Parameters, name: &str, inputs: i64, outputs: i64, bias: bool, std: f64) -> Linear {
        let weight = [(format!("{name}.weight"), outputs)];
        let weight = parameters.add_cut(&weight, &[inputs], Cut::Columns, Init::Normal(std));
        let bias = bias.then(|| parameters.add(format!("{name}.bias"), &[outputs], Init::Zeros));
        Linear { weight: Weight::Plain(weight), bias, cut: Cut::Columns, axis: parameters.axis().clone() }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        match &self.weight {
            Weight::Plain(weight) if self.axis.is_alone() => x.linear(weight, self.bias.as_ref()),
            Weight::Plain(weight) if self.cut == Cut::Rows => self.axis.enter(x).linear(weight, self.bias.as_ref()),
            Weight::Plain(weight) => {
                let y = self.axis.leave(x.linear(weight, None::<&Tensor>));
                // What all have is added once.
                self.bias.as_ref().map_or_else(|| y.shallow_clone(), |bias| &y + bias)
            }
            Weight::Packed(packed) => packed.product(x, self.bias.as_ref(), false),
        }
    }

    /// The GELU (tanh) of [`Linear::forward`].
    pub fn forward_gelu(&self, x: &Tensor) -> Tensor {
        match &self.weight {
            Weight::Plain(_) => self.forward(x).gelu("tanh"),
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

/// A table of rows.
#[derive(Debug)]
pub struct Embedding {
    /// (rows in memory, width)
    weight: Tensor,
    /// The first row that is here.
    first: i64,
    /// Rows that are no padding.
    rows: i64,
    cut: Cut,
    axis: TensorAxis,
}

impl Embedding {
    /// Of every token, shared by ranks and padded in memory.
    pub fn of_vocabulary(parameters: &mut Parameters, name: &str, rows: i64, width: i64, std: f64) -> Embedding {
        Embedding::new(parameters, name, [rows, width], Cut::Vocabulary, std)
    }

    /// Of every position.
    pub fn of_positions(parameters: &mut Parameters, name: &str, rows: i64, width: i64, std: f64) -> Embedding {
        Embedding::new(parameters, name, [rows, width], Cut::Whole, std)
    }

    fn new(parameters: &mut Parameters, name: &str, [rows, width]: [i64; 2], cut: Cut, std: f64) -> Embedding {
        let weight = parameters.add_cut(&[(format!("{name}.weight"), rows)], &[width], cut, Init::Normal(std));
        let axis = parameters.axis().clone();
        let own = if cut == Cut::Vocabulary { axis.vocabulary(rows).0 } else { 0..rows };
        Embedding { weight, first: own.start, rows: own.end - own.start, cut, axis }
    }

    /// The rows of `(b, t)` indices as `(b, t, width)`.
    pub fn forward(&self, indices_bt: &Tensor) -> Tensor {
        let look_up = |indices: &Tensor| Tensor::embedding(&self.weight, indices, -1, false, false);
        if self.cut == Cut::Whole || self.axis.is_alone() {
            return look_up(&self.axis.own_positions(indices_bt));
        }
        let places_bt = indices_bt - self.first;
        let elsewhere_bt = places_bt.lt(0).logical_or(&places_bt.ge(self.rows));
        let here_btc = look_up(&places_bt.masked_fill(&elsewhere_bt, 0));
        self.axis.leave(here_btc.masked_fill(&elsewhere_bt.unsqueeze(-1), 0.0))
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
        let [gate, up, down] = ["gate", "up", "down"].map(|leaf| format!("{name}.{leaf}"));
        let outputs: &[(&str, i64)] = match config.activation {
            Activation::Gelu => &[(&up, config.mlp_width)],
            Activation::Swiglu => &[(&gate, config.mlp_width), (&up, config.mlp_width)],
        };
        Mlp {
            activation: config.activation,
            up: Linear::by_outputs(parameters, outputs, config.width, config.bias, std),
            down: Linear::by_inputs(parameters, &down, config.mlp_width, config.width, config.bias, residual_std),
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
