//! Validation loss and samples. Neither draws a random number nor touches a gradient, so neither
//! disturbs training.

use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::{halt::Halt, run::Run};
use crate::{
    config::Method,
    control::{Control, Reporter},
    data::batch::{Batch, Example},
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
    let all = evenly_spaced(packing.len(), SEQUENCES);
    let chosen = run.gang.own(all.clone());
    let (mut sum, mut tokens) = (Tensor::zeros([], (Kind::Float, run.device)), 0);
    let (begun, mut announced) = (Instant::now(), false);
    // As many at once as there are stages to work on them.
    let micro = run.micro_batch_size() as usize;
    let example = |&index: &u64| Example::of(shard, packing.sequence(index), index, run.posing());
    let batch = |part: &[u64]| Batch::of(&part.iter().map(example).collect::<Vec<_>>(), run.gang.sequence_multiple(), run.device);
    for parts in chosen.chunks(micro * run.gang.pipeline(1).stages) {
        if run.stops(control) {
            return Err(Halt::Stopped);
        }
        if !announced && begun.elapsed() > BRIEF {
            announced = true;
            report.send(Report::Phase { phase: Phase::Evaluating });
        }
        let mut micros: Vec<Batch> = parts.chunks(micro).map(batch).collect();
        if run.gang.stage() == 0 {
            tokens += micros.iter().map(Batch::supervised).sum::<i64>();
        }
        sum += run.loss_sum(&mut micros)?;
    }
    // Where ranks gather parameters of one another, those with less to do go through the model as often.
    for _ in chosen.len().div_ceil(micro)..run.gang.most(all.len()).div_ceil(micro) {
        let _ = run.loss_sum(&mut [batch(&all[..1])])?;
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
pub fn sample(run: &Run, prompt: &str) -> Result<String, Halt> {
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
        let next = run.most_likely(&ids)?;
        if next == tokenizer.roles().eos {
            break;
        }
        ids.push(next);
    }
    Ok(tokenizer.decode(&ids[asked.min(ids.len())..]))
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
