//! Decoding for one client against the memory's own speed, interleaved in one run.
//!
//! `make bench PART=bandwidth`, or `cargo bench -p lathe-model --bench bandwidth [PART OF A CASE'S NAME]`. Every
//! token of one sequence takes all weights (an embedding that is also the head, once) and the keys and
//! values so far out of memory, and computes little with them; so the memory bounds its speed. In each
//! round an answer is generated, and then as many bytes as one of its tokens needs are read as often, by as many
//! threads, from a buffer of that size: what a last-level cache keeps, it keeps for both.

use std::{hint::black_box, sync::mpsc::channel, thread, time::Instant};

use lathe_model::{
    arch::Model,
    config::Sampling,
    engine::{Dtype, Engine, EngineConfig, EngineHandle, Event, Generation},
    nn::Parameters,
    shim,
};
use tch::{Device, Kind};

use self::peer::{Shape, figure, spread};

// Each bench uses a part of it.
#[allow(dead_code)]
mod peer;

const PROMPT: usize = 16;
/// Of every answer.
const TOKENS: usize = 65;
const ROUNDS: usize = 7;
/// Of the speed at which memory is read.
const GOAL: f64 = 0.7;
const BF16_BYTES: i64 = 2;

struct Case {
    name: &'static str,
    shape: Shape,
    expected: &'static str,
}

const CASES: [Case; 2] = [
    Case {
        name: "124m-bf16",
        shape: Shape { layers: 12, heads: 12, width: 768, context: 1024, vocabulary: 50_257 },
        expected: "0.6: products of one row run at less than the memory's speed",
    },
    Case {
        name: "1.1b-bf16",
        shape: Shape { layers: 20, heads: 32, width: 2048, context: 1024, vocabulary: 50_257 },
        expected: "0.7: larger products, the same kernels",
    },
];

fn start(shape: &Shape, threads: usize) -> (EngineHandle, i64) {
    let config = shape.config();
    let mut parameters = Parameters::frozen(Device::Cpu, Kind::BFloat16);
    let model = Model::new(&config, &mut parameters);
    for entry in parameters.entries() {
        let _ = entry.tensor.shallow_clone().normal_(0.0, 0.02);
    }
    // Of the table of positions a token reads one row.
    let read = parameters.count() as i64 - shape.context * shape.width;
    drop(parameters);
    let engine = EngineConfig { dtype: Dtype::Bf16, threads: Some(threads), ..EngineConfig::default() };
    (Engine::spawn(model, config, Vec::new(), &engine).expect("the engine starts"), read * BF16_BYTES)
}

/// Seconds of a token after the first.
fn decode(engine: &EngineHandle, round: usize) -> f64 {
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_tokens: TOKENS as i64, logprobs: None };
    let prompt = (0..PROMPT).map(|at| (20 + (at * 7 + round) % 200) as u32).collect();
    let (sender, events) = channel();
    let sink = Box::new(move |event| sender.send((Instant::now(), event)).is_ok());
    let generation = Generation { prompt, sampling, stop_tokens: vec![], prompt_logprobs: None };
    let _ticket = engine.submit(generation, sink).expect("the engine accepts it");
    let at: Vec<Instant> = events.iter().filter_map(|(at, event)| matches!(event, Event::Token(_)).then_some(at)).collect();
    assert_eq!(at.len(), TOKENS);
    (at[TOKENS - 1] - at[0]).as_secs_f64() / (TOKENS - 1) as f64
}

/// Seconds to read the buffer once.
fn read(buffer: &[u64], threads: usize) -> f64 {
    let begun = Instant::now();
    for _ in 1..TOKENS {
        thread::scope(|scope| {
            for part in buffer.chunks(buffer.len().div_ceil(threads)) {
                scope.spawn(|| black_box(sum(part)));
            }
        });
    }
    begun.elapsed().as_secs_f64() / (TOKENS - 1) as f64
}

/// In lanes, which a compiler makes into the widest loads that the target has.
fn sum(part: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in part.chunks_exact(lanes.len()) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane ^= value;
        }
    }
    lanes.into_iter().fold(0, |all, lane| all ^ lane)
}

fn run(case: &Case, threads: usize) {
    let (engine, weights) = start(&case.shape, threads);
    // Keys and values of every layer, at the middle of the answer.
    let cache = 2 * case.shape.layers * case.shape.width * (PROMPT + TOKENS / 2) as i64 * BF16_BYTES;
    let bytes = (weights + cache) as f64;
    let buffer = vec![1u64; bytes as usize / size_of::<u64>()];
    let (mut ours, mut memory) = (Vec::new(), Vec::new());
    // The first round, which is the slowest, does not count.
    for round in 0..=ROUNDS {
        let (token, pass) = (decode(&engine, round), read(&buffer, threads));
        if round > 0 {
            ours.push(bytes / token / 1e9);
            memory.push(bytes / pass / 1e9);
        }
    }
    let [speed, ..] = spread(ours.iter().copied());
    println!("{}: {:.1} tokens/s, {:.2} GB a token", case.name, speed * 1e9 / bytes, bytes / 1e9);
    figure(&format!("bandwidth/{}", case.name), "GB/s", [&ours, &memory], GOAL, case.expected);
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    shim::initialize(threads).expect("libtorch can be set up");
    tch::set_num_threads(threads as i32);
    let part = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).unwrap_or_default();
    for case in CASES.iter().filter(|case| case.name.contains(&part)) {
        run(case, threads);
    }
}
