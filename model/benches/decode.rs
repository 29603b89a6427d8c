//! The speed of generation against the same model in plain PyTorch and, where it is installed, the GPT-2
//! of `transformers`, interleaved in one run.
//!
//! `make bench`, or `cargo bench -p lathe-model --bench decode [PART OF A CASE'S NAME]` with
//! `LATHE_PEER` naming a folder in which Python finds torch; without it, Lathe's own speed is printed.
//! All have the same random weights, threads and prompts, decode greedily with a cache of keys and
//! values, and must say the same. Prompts have 16 tokens, and count in the time; peers have theirs
//! ready as one tensor and decode one batch from beginning to end, which is the best case for them.
//!
//! Printed for 1, 8 and 32 sequences together: Lathe's tokens a second and its time to all first
//! tokens, and its speed over each peer's: the median of the rounds, the lowest and the highest.

use std::{path::Path, sync::mpsc::channel, time::Instant};

use lathe_model::{
    arch::Model,
    config::Sampling,
    engine::{Dtype, Engine, EngineConfig, EngineHandle, Event, Generation},
    nn::Parameters,
    shim,
};
use serde_json::json;
use tch::{Device, Kind};

use self::peer::{Peer, Shape, spread};

// Each bench uses a part of it.
#[allow(dead_code)]
mod peer;

const PROMPT: usize = 16;
const ROUNDS: usize = 7;

struct Case {
    name: &'static str,
    shape: Shape,
    dtype: Dtype,
    threads: usize,
    /// Of every answer.
    tokens: usize,
}

const GPT2_SMALL: Shape = Shape { layers: 12, heads: 12, width: 768, context: 1024, vocabulary: 50_257 };

const CASES: [Case; 4] = [
    Case {
        name: "small-fp32",
        shape: Shape { layers: 4, heads: 4, width: 128, context: 128, vocabulary: 1024 },
        dtype: Dtype::Fp32,
        threads: 1,
        tokens: 100,
    },
    Case {
        name: "medium-fp32",
        shape: Shape { layers: 6, heads: 6, width: 384, context: 256, vocabulary: 4096 },
        dtype: Dtype::Fp32,
        threads: 1,
        tokens: 48,
    },
    Case { name: "gpt2-small-fp32", shape: GPT2_SMALL, dtype: Dtype::Fp32, threads: 2, tokens: 24 },
    Case { name: "gpt2-small-bf16", shape: GPT2_SMALL, dtype: Dtype::Bf16, threads: 2, tokens: 24 },
];

impl Case {
    /// Writes the weights for the peers and gives the model to an engine.
    fn start(&self, folder: &Path) -> EngineHandle {
        let (trained, seeded) = self.shape.seeded();
        peer::write_weights(&seeded, &folder.join("weights.safetensors"));
        let kind = if self.dtype == Dtype::Bf16 { Kind::BFloat16 } else { Kind::Float };
        let mut frozen = Parameters::frozen(Device::Cpu, kind);
        let config = self.shape.config();
        let model = Model::new(&config, &mut frozen);
        for (target, source) in frozen.entries().iter().zip(seeded.entries()) {
            target.tensor.shallow_clone().copy_(&source.tensor.detach());
        }
        drop((trained, seeded, frozen));
        let engine = EngineConfig { dtype: self.dtype, threads: Some(self.threads), ..EngineConfig::default() };
        Engine::spawn(model, config, Vec::new(), &engine).expect("the engine starts")
    }
}

/// One round: seconds to all first tokens, seconds in all, the first answer.
struct Round {
    first: f64,
    whole: f64,
    answer: Vec<u32>,
}

fn lathe(engine: &EngineHandle, case: &Case, sequences: usize, seed: usize) -> Round {
    let begun = Instant::now();
    let open: Vec<_> = (0..sequences)
        .map(|index| {
            let prompt = (0..PROMPT).map(|at| (20 + (index * 13 + at * 7 + seed) % 200) as u32).collect();
            let max_tokens = case.tokens as i64;
            let sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0, max_tokens, logprobs: None };
            let (sender, events) = channel();
            let sink = Box::new(move |event| sender.send((Instant::now(), event)).is_ok());
            let generation = Generation { prompt, sampling, stop_tokens: vec![], prompt_logprobs: None };
            (engine.submit(generation, sink).expect("the engine accepts it"), events)
        })
        .collect();
    let (mut first, mut answers) = (0f64, Vec::new());
    for (_ticket, events) in open {
        let mut answer = Vec::new();
        for (at, event) in events {
            if let Event::Token(sampled) = event {
                if answer.is_empty() {
                    first = first.max((at - begun).as_secs_f64());
                }
                answer.push(sampled.token);
            }
        }
        assert_eq!(answer.len(), case.tokens);
        answers.push(answer);
    }
    Round { first, whole: begun.elapsed().as_secs_f64(), answer: answers.swap_remove(0) }
}

/// The peers' process.
struct Peers {
    process: Peer,
    names: Vec<String>,
}

impl Peers {
    fn start(case: &Case, folder: &Path) -> Option<Peers> {
        let more = json!({"threads": case.threads, "prompt": PROMPT, "bf16": case.dtype == Dtype::Bf16});
        let description = case.shape.describe(&folder.join("weights.safetensors"), more);
        let mut process = Peer::start("decode.py", &description, &folder.join("case.json"), &[])?;
        let names = process.answer().split_whitespace().map(str::to_owned).collect();
        Some(Peers { process, names })
    }

    fn round(&mut self, peer: usize, case: &Case, sequences: usize, seed: usize) -> Round {
        let line = self.process.ask(&format!("{} {sequences} {} {seed}", self.names[peer], case.tokens));
        let mut words = line.split_whitespace();
        let mut seconds = || words.next().and_then(|word| word.parse().ok()).expect("seconds");
        let (first, whole) = (seconds(), seconds());
        Round { first, whole, answer: words.map(|word| word.parse().expect("a token")).collect() }
    }
}

fn run(case: &Case) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    tch::set_num_threads(case.threads as i32);
    let engine = case.start(folder.path());
    let mut peers = Peers::start(case, folder.path());
    let names = peers.as_ref().map_or(Vec::new(), |peers| peers.names.clone());
    for sequences in [1, 8, 32] {
        let (mut speeds, mut firsts) = (Vec::new(), Vec::new());
        let mut ratios = vec![(Vec::new(), Vec::new()); names.len()];
        // The first round, which is the slowest, does not count.
        for round in 0..=ROUNDS {
            let ours = lathe(&engine, case, sequences, round);
            let theirs: Vec<Round> =
                (0..names.len()).filter_map(|peer| Some(peers.as_mut()?.round(peer, case, sequences, round))).collect();
            for other in &theirs {
                // Rounding may part them later on: bf16 decides between neighbours otherwise.
                assert_eq!(ours.answer[0], other.answer[0], "they say the same");
                if case.dtype == Dtype::Fp32 {
                    assert_eq!(ours.answer, other.answer, "they say the same");
                }
            }
            if round == 0 {
                continue;
            }
            speeds.push((sequences * case.tokens) as f64 / ours.whole);
            firsts.push(ours.first * 1e3);
            for (other, (whole, first)) in theirs.iter().zip(&mut ratios) {
                whole.push(other.whole / ours.whole);
                first.push(other.first / ours.first);
            }
        }
        let ([speed, ..], [first, ..]) = (spread(speeds), spread(firsts));
        print!("{:16} × {sequences:>2}: {speed:>8.1} tokens/s, first after {first:>7.1} ms", case.name);
        for (name, (whole, first)) in names.iter().zip(ratios) {
            let ([median, low, high], [first, ..]) = (spread(whole), spread(first));
            print!(" | over {name}: {median:.2} ({low:.2} to {high:.2}), first {first:.2}");
        }
        println!();
    }
}

fn main() {
    shim::initialize(1).expect("libtorch can be set up");
    let part = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).unwrap_or_default();
    for case in CASES.iter().filter(|case| case.name.contains(&part)) {
        run(case);
    }
}
