use std::sync::Arc;

use tch::{Device, Kind, Reduction, Tensor};

use super::{LOOPBACK, TIMEOUT, in_ranks};
use crate::{
    arch::Model,
    config::{Activation, Architecture, ModelConfig, Norm, Positions},
    nn::{AttentionPlan, Dropout, Parameters, Pass},
    parallel::{Gradients, Group, Record},
    shim::c10d::Store,
};

const CONTEXT: i64 = 12;
const VOCABULARY: i64 = 70;
const SEQUENCES: i64 = 8;

fn config(bits: u32) -> ModelConfig {
    let bit = |place: u32| bits >> place & 1 == 1;
    ModelConfig {
        architecture: Architecture::Gpt,
        layers: 2,
        heads: 4,
        kv_heads: if bit(0) { 2 } else { 4 },
        head_dim: 8,
        width: 32,
        mlp_width: 64,
        context: CONTEXT,
        vocabulary: VOCABULARY,
        positions: if bit(1) { Positions::Rotary } else { Positions::Learned },
        norm: if bit(2) { Norm::Rms } else { Norm::Layer },
        norm_eps: 1e-5,
        activation: if bit(3) { Activation::Swiglu } else { Activation::Gelu },
        bias: !bit(2),
        tie_embeddings: !bit(1),
        dropout: if bit(0) { 0.1 } else { 0.0 },
        rope_theta: 10_000.0,
    }
}

/// The mean loss over all sequences, of these alone.
fn loss(model: &Model, config: &ModelConfig, sequences: std::ops::Range<i64>) -> Tensor {
    let count = sequences.end - sequences.start;
    let tokens_bt = (Tensor::arange_start(sequences.start * CONTEXT, sequences.end * CONTEXT, (Kind::Int64, Device::Cpu)) * 31)
        .remainder(VOCABULARY)
        .view([count, CONTEXT]);
    let positions_bt = Tensor::arange(CONTEXT, (Kind::Int64, Device::Cpu)).expand([count, CONTEXT], false);
    let numbers = sequences.map(|sequence| sequence as u64).collect();
    let dropout = (config.dropout > 0.0).then_some(Dropout { probability: config.dropout, seed: 1, step: 1, sequences: numbers });
    let mut plan = AttentionPlan::Causal;
    let hidden_btc = model.hidden(&tokens_bt, &positions_bt, &mut Pass { plan: &mut plan, dropout: dropout.as_ref() });
    let logits = model.logits(&hidden_btc.view([-1, config.width]));
    let targets = (&tokens_bt * 7 + 1).remainder(VOCABULARY).view([-1]);
    logits.cross_entropy_loss(&targets, None::<Tensor>, Reduction::Sum, -100, 0.0) / (SEQUENCES * CONTEXT) as f64
}

#[test]
fn gradients_of_ranks_are_those_of_one_with_accumulation_and_dropout() {
    const RANKS: usize = 2;
    const MICRO: i64 = 2;
    in_ranks(
        "parallel::tests::gradients::gradients_of_ranks_are_those_of_one_with_accumulation_and_dropout",
        RANKS,
        |[store, ..], rank| {
            for bits in 0..16 {
                let config = config(bits);
                let build = || {
                    let mut parameters = Parameters::trainable(Device::Cpu, 3);
                    (Model::new(&config, &mut parameters), parameters)
                };
                let (model, parameters) = build();
                let store = Store::join(store, TIMEOUT).unwrap();
                let record = Arc::new(Record::default());
                let group = Group::gloo(&store, &bits.to_string(), (rank, RANKS), LOOPBACK, TIMEOUT, record).unwrap();
                let gradients = Gradients::new(&parameters, group).unwrap();
                let (whole, whole_parameters) = build();
                loss(&whole, &config, 0..SEQUENCES).backward();

                let each = SEQUENCES / RANKS as i64;
                let own = rank as i64 * each..(rank as i64 + 1) * each;
                // The second step shows that nothing is left of the first.
                for step in 1..3 {
                    gradients.clear().unwrap();
                    for first in own.clone().step_by(MICRO as usize) {
                        let loss = loss(&model, &config, first..first + MICRO);
                        if first + MICRO == own.end {
                            gradients.expect_last();
                        }
                        loss.backward();
                    }
                    gradients.finish().unwrap();
                    for (ours, theirs) in parameters.entries().iter().zip(whole_parameters.entries()) {
                        let (ours_grad, theirs_grad) = (ours.tensor.grad(), theirs.tensor.grad());
                        let apart = (&ours_grad - &theirs_grad).norm().double_value(&[]) / theirs_grad.norm().double_value(&[]);
                        assert!(apart < 1e-5, "variant {bits}, step {step}, {:?}: {apart:e}", ours.parts);
                    }
                }
            }
        },
    );
}
