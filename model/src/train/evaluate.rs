//! Validation loss and samples. Neither draws a random number nor touches a gradient, so neither
//! disturbs training.

use tch::{Kind, Tensor};

use super::{Halt, run::Run};
use crate::{arch::gpt::Pass, config::Method, data::batch::Batch, nn::AttentionPlan, template};

/// Evaluation reads at most this many sequences, the same ones each time.
const SEQUENCES: u64 = 1024;
const SAMPLE_TOKENS: usize = 64;

/// The mean loss over the supervised tokens of the validation set; `None` if there is none.
pub fn validation_loss(run: &Run) -> Result<Option<f32>, Halt> {
    let Some((shard, packing)) = run.data.validation() else { return Ok(None) };
    let _no_grad = tch::no_grad_guard();
    let sequences = packing.len().min(SEQUENCES);
    let (mut sum, mut tokens) = (Tensor::zeros([], (Kind::Float, run.device)), 0);
    let mut first = 0;
    while first < sequences {
        let last = (first + run.micro_batch_size()).min(sequences);
        let rows: Vec<_> = (first..last).map(|index| packing.sequence(index)).collect();
        let mut batch = Batch::of(shard, &rows, (first..last).collect(), run.device);
        tokens += batch.supervised();
        sum += run.loss_sum(&mut batch, None)?;
        first = last;
    }
    Ok(Some((sum.double_value(&[]) / tokens.max(1) as f64) as f32))
}

/// The greedy continuation of a prompt, at most 64 tokens.
pub fn sample(run: &Run, prompt: &str) -> String {
    let _no_grad = tch::no_grad_guard();
    let tokenizer = &run.tokenizer;
    let mut ids = match run.spec.method {
        Method::Instruction { .. } => template::prompt(tokenizer, None, &[], prompt, ""),
        Method::Pretrain { .. } => tokenizer.encode(prompt),
    };
    if ids.is_empty() {
        ids.push(tokenizer.roles().eos);
    }
    let context = run.spec.model.context as usize;
    let asked = ids.len();
    while ids.len() < context && ids.len() < asked + SAMPLE_TOKENS {
        let tokens: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let tokens_bt = Tensor::from_slice(&tokens).unsqueeze(0).to_device(run.device);
        let positions_bt = Tensor::arange(ids.len() as i64, (Kind::Int64, run.device)).unsqueeze(0);
        let mut pass = Pass { plan: &mut AttentionPlan::Causal, dropout: None };
        let hidden = run.gpt.hidden(&tokens_bt, &positions_bt, &mut pass);
        let next = run.gpt.logits(&hidden.select(1, -1)).argmax(-1, false).int64_value(&[0]) as u32;
        if next == tokenizer.roles().eos {
            break;
        }
        ids.push(next);
    }
    tokenizer.decode(&ids[asked.min(ids.len())..])
}
