//! The GPT decoder (Radford et al. 2018, 2019): pre-norm blocks of causal attention and a
//! feed-forward net around a residual stream.
//!
//! Variants, each by [`ModelConfig`]: learned or rotary positions, LayerNorm or RMSNorm, GELU or
//! SwiGLU, grouped-query attention, tied or untied output, biases, dropout on the embeddings and on
//! what each block adds to the stream. Weights start at deviation 0.02, the projections into the
//! stream at 0.02/√(2·layers).

use std::collections::BTreeMap;

use tch::Tensor;

use crate::{
    config::{Activation, ModelConfig, Norm, Positions},
    nn::{Angles, Attention, Embedding, Mlp, NormLayer, Packed, Parameters, Pass, Rotary, Site},
};

const INITIAL_STD: f64 = 0.02;

/// One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug)]
struct Block {
    attention_norm: NormLayer,
    attention: Attention,
    mlp_norm: NormLayer,
    mlp: Mlp,
}

impl Block {
    fn new(parameters: &mut Parameters, layer: i64, config: &ModelConfig) -> Block {
        let residual_std = INITIAL_STD / (2.0 * config.layers as f64).sqrt();
        let name = |leaf: &str| format!("layers.{layer}.{leaf}");
        Block {
            attention_norm: NormLayer::new(parameters, &name("attention_norm"), config),
            attention: Attention::new(parameters, &name("attention"), config, INITIAL_STD, residual_std),
            mlp_norm: NormLayer::new(parameters, &name("mlp_norm"), config),
            mlp: Mlp::new(parameters, &name("mlp"), config, INITIAL_STD, residual_std),
        }
    }

    fn forward(&self, layer: usize, x_btc: &Tensor, pass: &mut Pass) -> Tensor {
        let attended = self.attention.forward(layer, &self.attention_norm.forward(x_btc), pass.angles.as_ref(), pass.plan);
        let x_btc = x_btc + pass.dropped(attended, layer, Site::Attention);
        let fed = self.mlp.forward(&self.mlp_norm.forward(&x_btc));
        &x_btc + pass.dropped(fed, layer, Site::Mlp)
    }
}

/// Of a part of the model, what is not in it is `None`.
#[derive(Debug)]
pub struct Gpt {
    tokens: Option<Embedding>,
    positions: Option<Embedding>,
    rotary: Option<Rotary>,
    blocks: BTreeMap<i64, Block>,
    norm: Option<NormLayer>,
    /// The output projection, where it is not the token embedding.
    head: Option<Embedding>,
    /// The output projection once it is laid out for use alone.
    packed_head: Option<Packed>,
}

impl Gpt {
    pub fn new(config: &ModelConfig, parameters: &mut Parameters) -> Gpt {
        let stage = parameters.stage(config.layers);
        let table = |parameters: &mut Parameters, name| {
            Embedding::of_vocabulary(parameters, name, config.vocabulary, config.width, INITIAL_STD)
        };
        let is_tied_output = stage.is_last && config.tie_embeddings;
        let tokens = (stage.is_first || is_tied_output).then(|| table(parameters, "embedding"));
        if config.tie_embeddings && tokens.is_some() {
            parameters.tie();
        }
        let learned = config.positions == Positions::Learned;
        let positions = (learned && stage.is_first)
            .then(|| Embedding::of_positions(parameters, "positions", config.context, config.width, INITIAL_STD));
        let rotary = (!learned).then(|| Rotary::new(config.context, config.head_dim, config.rope_theta, parameters.device()));
        let blocks = stage.layers.map(|layer| (layer, Block::new(parameters, layer, config))).collect();
        let norm = stage.is_last.then(|| NormLayer::new(parameters, "norm", config));
        let head = (stage.is_last && !config.tie_embeddings).then(|| table(parameters, "head"));
        Gpt { tokens, positions, rotary, blocks, norm, head, packed_head: None }
    }

    pub fn pack(&mut self) {
        for block in self.blocks.values_mut() {
            block.attention.pack();
            block.mlp.pack();
        }
        self.packed_head = self.output().and_then(|table| Packed::new(&table.unpadded()));
        if self.packed_head.is_some() {
            self.head = None;
        }
    }

    fn output(&self) -> Option<&Embedding> {
        self.head.as_ref().or(self.tokens.as_ref())
    }

    pub fn embed(&self, tokens_bt: &Tensor, positions_bt: &Tensor, pass: &Pass) -> Tensor {
        let mut x_btc = self.tokens.as_ref().expect("the first stage has the embedding").forward(tokens_bt);
        if let Some(table) = &self.positions {
            x_btc = x_btc + table.forward(positions_bt);
        }
        pass.dropped(x_btc, 0, Site::Embedding)
    }

    pub fn angles(&self, positions_bt: &Tensor) -> Option<Angles> {
        self.rotary.as_ref().map(|rotary| rotary.angles(positions_bt))
    }

    pub fn layer(&self, layer: i64, x_btc: &Tensor, pass: &mut Pass) -> Tensor {
        self.blocks[&layer].forward(layer as usize, x_btc, pass)
    }

    pub fn finish(&self, x_btc: &Tensor) -> Tensor {
        self.norm.as_ref().expect("the last stage has the norm").forward(x_btc)
    }

    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        match (&self.packed_head, self.output()) {
            (Some(packed), _) => packed.product(hidden, None, false),
            (None, Some(table)) => hidden.linear(&table.unpadded(), None::<&Tensor>),
            (None, None) => panic!("only the last stage has logits"),
        }
    }

    pub fn parameter_count(config: &ModelConfig) -> u64 {
        let bias = i64::from(config.bias);
        let linear = |inputs: i64, outputs: i64| outputs * (inputs + bias);
        let norm = config.width * if config.norm == Norm::Layer { 1 + bias } else { 1 };
        let (query, shared) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let attention = linear(config.width, query + 2 * shared) + linear(query, config.width);
        let ups = if config.activation == Activation::Swiglu { 2 } else { 1 };
        let mlp = ups * linear(config.width, config.mlp_width) + linear(config.mlp_width, config.width);
        let tables = 1 + i64::from(!config.tie_embeddings);
        let positions = if config.positions == Positions::Learned { config.context } else { 0 };
        let embeddings = (tables * config.vocabulary + positions) * config.width;
        (embeddings + config.layers * (attention + mlp + 2 * norm) + norm) as u64
    }
}

#[cfg(test)]
mod tests;
