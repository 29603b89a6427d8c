//! Generation speed on random weights: tokens a second at several numbers of concurrent sequences.
//!
//! `cargo bench -p lathe-model --bench decode`. Greedy, prompts of 16 tokens, answers of `TOKENS`.

use std::{sync::mpsc::channel, time::Instant};

use lathe_model::{
    arch::Gpt,
    config::{Activation, Architecture, ModelConfig, Norm, Positions, Sampling},
    engine::{Dtype, Engine, EngineConfig, EngineHandle, Event, Generation},
    nn::Parameters,
    shim,
};

const TOKENS: i64 = 48;

fn shape(layers: i64, heads: i64, width: i64, vocabulary: i64, context: i64) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Gpt,
        layers,
        heads,
        kv_heads: heads,
        head_dim: width / heads,
        width,
        mlp_width: 4 * width,
        context,
        vocabulary,
        positions: Positions::Learned,
        norm: Norm::Layer,
        norm_eps: 1e-5,
        activation: Activation::Gelu,
        bias: true,
        tie_embeddings: true,
        dropout: 0.0,
        rope_theta: 10_000.0,
    }
}

/// Tokens a second over all sequences, prompts included in the time.
fn measure(engine: &EngineHandle, sequences: usize, rounds: usize) -> f64 {
    let start = Instant::now();
    let mut tokens = 0;
    for round in 0..rounds {
        let open: Vec<_> = (0..sequences)
            .map(|index| {
                let prompt = (0..16).map(|at| (20 + (index * 13 + at * 7 + round) % 200) as u32).collect();
                let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_tokens: TOKENS, logprobs: None };
                let (sender, events) = channel();
                let sink = Box::new(move |event| sender.send(event).is_ok());
                let generation = Generation { prompt, sampling, stop_tokens: vec![], prompt_logprobs: None };
                (engine.submit(generation, sink).expect("the engine accepts it"), events)
            })
            .collect();
        for (_ticket, events) in open {
            tokens += events.iter().filter(|event| matches!(event, Event::Token(_))).count();
        }
    }
    tokens as f64 / start.elapsed().as_secs_f64()
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    shim::initialize(threads).expect("libtorch can be set up");
    let cases = [
        ("4 × 128, vocabulary 1,024", shape(4, 4, 128, 1024, 64), Dtype::Fp32),
        ("gpt2-small", shape(12, 12, 768, 50_257, 1024), Dtype::Fp32),
        ("gpt2-small", shape(12, 12, 768, 50_257, 1024), Dtype::Bf16),
    ];
    for (name, shape, dtype) in cases {
        for deterministic_decode in [false, true] {
            if deterministic_decode && shape.layers > 4 {
                continue;
            }
            let kind = if dtype == Dtype::Bf16 { tch::Kind::BFloat16 } else { tch::Kind::Float };
            let mut parameters = Parameters::trainable(tch::Device::Cpu, 1);
            let seeded = Gpt::new(&shape, &mut parameters);
            let mut frozen = Parameters::frozen(tch::Device::Cpu, kind);
            let model = Gpt::new(&shape, &mut frozen);
            for (target, source) in frozen.entries().iter().zip(parameters.entries()) {
                target.tensor.shallow_clone().copy_(&source.tensor.detach());
            }
            drop((seeded, parameters, frozen));
            let config = EngineConfig { dtype, threads: Some(threads), deterministic_decode, ..EngineConfig::default() };
            let engine = Engine::spawn(model, shape.clone(), Vec::new(), &config).expect("the engine starts");
            measure(&engine, 1, 1);
            for sequences in [1, 8, 32] {
                let rounds = if shape.layers > 4 { 1 } else { 8 };
                let speed = measure(&engine, sequences, rounds);
                println!(
                    "{name}, {dtype:?}, deterministic {deterministic_decode}, {sequences:>2} sequences: {speed:>8.1} tokens/s"
                );
            }
        }
    }
}
