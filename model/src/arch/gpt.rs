//! The GPT decoder (Radford et al. 2018, 2019): pre-norm blocks of causal attention and a
//! feed-forward net around a residual stream.
//!
//! Variants, each by [`ModelConfig`]: learned or rotary positions, LayerNorm or RMSNorm, GELU or
//! SwiGLU, grouped-query attention, tied or untied output, biases, dropout on the embeddings and on
//! what each block adds to the stream. Weights start at deviation 0.02, the projections into the
//! stream at 0.02/√(2·layers).

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

    fn forward(&self, layer: usize, x_btc: &Tensor, angles: Option<&Angles>, pass: &mut Pass) -> Tensor {
        let attended = self.attention.forward(layer, &self.attention_norm.forward(x_btc), angles, pass.plan);
        let x_btc = x_btc + pass.dropped(attended, layer, Site::Attention);
        let fed = self.mlp.forward(&self.mlp_norm.forward(&x_btc));
        &x_btc + pass.dropped(fed, layer, Site::Mlp)
    }
}

#[derive(Debug)]
pub struct Gpt {
    tokens: Embedding,
    positions: Option<Embedding>,
    rotary: Option<Rotary>,
    blocks: Vec<Block>,
    norm: NormLayer,
    /// `None`: the token embedding is the output projection too.
    head: Option<Embedding>,
    /// The output projection once it is laid out for use alone.
    packed_head: Option<Packed>,
}

impl Gpt {
    pub fn new(config: &ModelConfig, parameters: &mut Parameters) -> Gpt {
        let (rows, padded) = (config.vocabulary, config.padded_vocabulary());
        let table = |parameters: &mut Parameters, name, rows, padded| {
            Embedding::new(parameters, name, rows, padded, config.width, INITIAL_STD)
        };
        let tokens = table(parameters, "embedding", rows, padded);
        let learned = config.positions == Positions::Learned;
        let positions = learned.then(|| table(parameters, "positions", config.context, config.context));
        let rotary = (!learned).then(|| Rotary::new(config.context, config.head_dim, config.rope_theta, parameters.device()));
        let blocks = (0..config.layers).map(|layer| Block::new(parameters, layer, config)).collect();
        let norm = NormLayer::new(parameters, "norm", config);
        let head = (!config.tie_embeddings).then(|| table(parameters, "head", rows, padded));
        Gpt { tokens, positions, rotary, blocks, norm, head, packed_head: None }
    }

    pub fn pack(&mut self) {
        for block in &mut self.blocks {
            block.attention.pack();
            block.mlp.pack();
        }
        self.packed_head = Packed::new(&self.head.as_ref().unwrap_or(&self.tokens).unpadded());
        if self.packed_head.is_some() {
            self.head = None;
        }
    }

    pub fn hidden(&self, tokens_bt: &Tensor, positions_bt: &Tensor, pass: &mut Pass) -> Tensor {
        let mut x_btc = self.tokens.forward(tokens_bt);
        if let Some(table) = &self.positions {
            x_btc = x_btc + table.forward(positions_bt);
        }
        let angles = self.rotary.as_ref().map(|rotary| rotary.angles(positions_bt));
        x_btc = pass.dropped(x_btc, 0, Site::Embedding);
        for (layer, block) in self.blocks.iter().enumerate() {
            x_btc = block.forward(layer, &x_btc, angles.as_ref(), pass);
        }
        self.norm.forward(&x_btc)
    }

    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        if let Some(packed) = &self.packed_head {
            return packed.product(hidden, None, false);
        }
        let table = self.head.as_ref().unwrap_or(&self.tokens);
        hidden.linear(&table.unpadded(), None::<&Tensor>)
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
