//! Validation loss and samples. Neither draws a random number nor touches a gradient, so neither
//! disturbs training.

use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::{halt::Halt, run::Run};
use crate::{
    config::Method,
    control::{Control, Reporter},
    data::batch::{Batch, Example},
    nn::{AttentionPlan, Pass},
    protocol::{Phase, Report},
    pulse, template,
};

/// A validation set is read whole up to this many sequences; of a larger one as many, evenly spaced
/// and the same ones each time, so that what validation costs is bounded and its losses compare.
const SEQUENCES: u64 = 1024;
const SAMPLE_TOKENS: usize = 64;

/// An evaluation that takes longer shows as a phase of its own.
const BRIEF: Duration = Duration::from_millis(500);

/// The mean loss over the supervised tokens of the validation set; `None` if there is none. Stopping is
/// looked at between micro-batches.
pub fn validation_loss(run: &Run, control: &Control, report: &mut Reporter) -> Result<Option<f32>, Halt> {
    let Some((shard, packing)) = run.data.validation() else { return Ok(None) };
    let _no_grad = tch::no_grad_guard();
    let chosen = run.gang.own(evenly_spaced(packing.len(), SEQUENCES));
    let (mut sum, mut tokens) = (Tensor::zeros([], (Kind::Float, run.device)), 0);
    let (begun, mut announced) = (Instant::now(), false);
    for part in chosen.chunks(run.micro_batch_size() as usize) {
        if run.stops(control) {
            return Err(Halt::Stopped);
        }
        if !announced && begun.elapsed() > BRIEF {
            announced = true;
            report.send(Report::Phase { phase: Phase::Evaluating });
        }
        let example = |&index: &u64| Example::of(shard, packing.sequence(index), index, run.posing());
        let mut batch = Batch::of(&part.iter().map(example).collect::<Vec<_>>(), run.device);
        tokens += batch.supervised();
        sum += run.loss_sum(&mut batch, None)?;
    }
    if announced {
        report.send(Report::Phase { phase: Phase::Training });
    }
    let totals = Tensor::from_slice(&[sum.double_value(&[]), tokens as f64]);
    run.gang.sum(&totals)?;
    Ok(Some((totals.double_value(&[0]) / totals.double_value(&[1]).max(1.0)) as f32))
}

/// At most `most` of the numbers below `len`, ascending.
fn evenly_spaced(len: u64, most: u64) -> Vec<u64> {
    let count = len.min(most);
    (0..count).map(|index| (u128::from(index) * u128::from(len) / u128::from(count)) as u64).collect()
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
        pulse::beat();
        let tokens: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let tokens_bt = Tensor::from_slice(&tokens).unsqueeze(0).to_device(run.device);
        let positions_bt = Tensor::arange(ids.len() as i64, (Kind::Int64, run.device)).unsqueeze(0);
        let mut pass = Pass { plan: &mut AttentionPlan::Causal, dropout: None };
        let hidden = run.model.hidden(&tokens_bt, &positions_bt, &mut pass);
        let next = run.model.logits(&hidden.select(1, -1)).argmax(-1, false).int64_value(&[0]) as u32;
        if next == tokenizer.roles().eos {
            break;
        }
        ids.push(next);
    }
    tokenizer.decode(&ids[asked.min(ids.len())..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_sets_are_read_whole_and_large_ones_evenly() {
        assert_eq!(evenly_spaced(5, 1024), [0, 1, 2, 3, 4]);
        assert_eq!(evenly_spaced(10, 4), [0, 2, 5, 7]);
        assert!(evenly_spaced(0, 4).is_empty());
    }
}
