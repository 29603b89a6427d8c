//! Fills what a request left open, once, from the data and the device.
//!
//! The rules: one epoch where neither steps nor epochs are given; a warm-up of 2 % of the steps; an
//! evaluation every twentieth of the steps; bf16 where the device computes it natively; the largest
//! micro-batch that divides the batch and fits an estimate of the memory.

use tch::Device;

use crate::{
    config::{Activation, ModelConfig, Precision, Schedule, TrainConfig},
    device,
};

/// Larger micro-batches leave a CPU's caches and gain nothing.
const CPU_MICRO_BATCH_TOKENS: u64 = 16_384;

/// The share of free memory that activations may take.
const ACTIVATION_SHARE: u64 = 3;
const CUDA_ACTIVATION_BYTES: u64 = 16 << 30;

/// `ranks`: how many share a batch.
pub fn resolve(train: &mut TrainConfig, model: &ModelConfig, sequences: u64, validates: bool, device: Device, ranks: u64) {
    let steps = *train.steps.get_or_insert_with(|| {
        let epochs = train.epochs.unwrap_or(1.0);
        ((epochs * sequences as f64 / train.batch_size as f64).ceil() as u64).max(1)
    });
    match &mut train.schedule {
        Schedule::Cosine { warmup_steps, .. }
        | Schedule::Linear { warmup_steps, .. }
        | Schedule::Constant { warmup_steps, .. } => {
            warmup_steps.get_or_insert(steps.div_ceil(50));
        }
    }
    let precision =
        *train.precision.get_or_insert_with(|| if device::has_bf16(device) { Precision::Bf16 } else { Precision::Fp32 });
    if validates || !train.sample_prompts.is_empty() {
        let every = *train.evaluate_every.get_or_insert(steps.div_ceil(20));
        train.sample_every.get_or_insert(every);
    }
    let (batch, budget) = (train.batch_size / ranks, activation_budget(device));
    train.micro_batch_size.get_or_insert_with(|| largest_micro_batch(model, batch, precision, budget, device));
}

fn largest_micro_batch(model: &ModelConfig, batch: u64, precision: Precision, budget: u64, device: Device) -> u64 {
    let per_sequence = activation_bytes(model, precision) * model.context as u64;
    let by_memory = budget / per_sequence.max(1);
    let by_cache = if device.is_cuda() { u64::MAX } else { CPU_MICRO_BATCH_TOKENS / model.context as u64 };
    let bound = by_memory.min(by_cache).max(1);
    (1..=batch.min(bound)).rev().find(|size| batch.is_multiple_of(*size)).unwrap_or(1)
}

/// Bytes that one token keeps alive until the backward pass.
fn activation_bytes(model: &ModelConfig, precision: Precision) -> u64 {
    let ups = if model.activation == Activation::Swiglu { 2 } else { 1 };
    let heads = (model.heads + 2 * model.kv_heads) * model.head_dim;
    // Two norms and two sums of the stream, queries to values twice (gathered), the output, the block.
    let layer = 6 * model.width + 3 * heads + (2 * ups + 1) * model.mlp_width;
    let element = if precision == Precision::Bf16 { 3 } else { 4 };
    // Logits, their log-softmax and their gradient, always fp32.
    (model.layers * layer * element + model.vocabulary * 12) as u64
}

fn activation_budget(device: Device) -> u64 {
    if device.is_cuda() {
        return CUDA_ACTIVATION_BYTES;
    }
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.map_or(1 << 30, |kib| kib * 1024 / ACTIVATION_SHARE)
}
