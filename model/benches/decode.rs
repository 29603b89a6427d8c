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

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc::channel,
    time::Instant,
};

use lathe_model::{
    arch::Gpt,
    config::{Activation, Architecture, ModelConfig, Norm, Positions, Sampling},
    engine::{Dtype, Engine, EngineConfig, EngineHandle, Event, Generation},
    nn::Parameters,
    shim,
};
use tch::{Device, Kind, Tensor};

const PROMPT: usize = 16;
const ROUNDS: usize = 7;

struct Case {
    name: &'static str,
    layers: i64,
    heads: i64,
    width: i64,
    vocabulary: i64,
    context: i64,
    dtype: Dtype,
    threads: usize,
    /// Of every answer.
    tokens: usize,
}

const CASES: [Case; 4] = [
    Case {
        name: "small-fp32",
        layers: 4,
        heads: 4,
        width: 128,
        vocabulary: 1024,
        context: 128,
        dtype: Dtype::Fp32,
        threads: 1,
        tokens: 100,
    },
    Case {
        name: "medium-fp32",
        layers: 6,
        heads: 6,
        width: 384,
        vocabulary: 4096,
        context: 256,
        dtype: Dtype::Fp32,
        threads: 1,
        tokens: 48,
    },
    Case {
        name: "gpt2-small-fp32",
        layers: 12,
        heads: 12,
        width: 768,
        vocabulary: 50_257,
        context: 1024,
        dtype: Dtype::Fp32,
        threads: 2,
        tokens: 24,
    },
    Case {
        name: "gpt2-small-bf16",
        layers: 12,
        heads: 12,
        width: 768,
        vocabulary: 50_257,
        context: 1024,
        dtype: Dtype::Bf16,
        threads: 2,
        tokens: 24,
    },
];

impl Case {
    fn model(&self) -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Gpt,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.width / self.heads,
            width: self.width,
            mlp_width: 4 * self.width,
            context: self.context,
            vocabulary: self.vocabulary,
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

    /// Writes the weights for the peers and gives the model to an engine.
    fn start(&self, folder: &Path) -> EngineHandle {
        let shape = self.model();
        let mut seeded = Parameters::trainable(Device::Cpu, 1);
        let trained = Gpt::new(&shape, &mut seeded);
        let weights: Vec<(&str, Tensor)> = seeded.logical().into_iter().collect();
        Tensor::write_safetensors(&weights, folder.join("weights.safetensors")).expect("the folder is ours");
        let kind = if self.dtype == Dtype::Bf16 { Kind::BFloat16 } else { Kind::Float };
        let mut frozen = Parameters::frozen(Device::Cpu, kind);
        let model = Gpt::new(&shape, &mut frozen);
        for (target, source) in frozen.entries().iter().zip(seeded.entries()) {
            target.tensor.shallow_clone().copy_(&source.tensor.detach());
        }
        drop(weights);
        drop((trained, seeded, frozen));
        let config = EngineConfig { dtype: self.dtype, threads: Some(self.threads), ..EngineConfig::default() };
        Engine::spawn(model, shape, Vec::new(), &config).expect("the engine starts")
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
    process: Child,
    answers: BufReader<ChildStdout>,
    names: Vec<String>,
}

impl Peers {
    /// `None` where `LATHE_PEER` does not say where torch is.
    fn start(case: &Case, folder: &Path) -> Option<Peers> {
        let packages = std::env::var_os("LATHE_PEER")?;
        let file = folder.join("case.json");
        let description = serde_json::json!({"layers": case.layers, "heads": case.heads, "width": case.width, "vocabulary": case.vocabulary,
            "context": case.context, "threads": case.threads, "prompt": PROMPT, "bf16": case.dtype == Dtype::Bf16,
            "weights": folder.join("weights.safetensors")});
        std::fs::write(&file, description.to_string()).expect("the folder is ours");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/decode_peer.py");
        let mut python = Command::new("python3");
        // The library path is for Lathe's own libtorch.
        python.arg(script).arg(&file).env("PYTHONPATH", packages).env_remove("LD_LIBRARY_PATH");
        let mut process = python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 runs");
        let mut answers = BufReader::new(process.stdout.take().expect("it is piped"));
        let mut line = String::new();
        answers.read_line(&mut line).expect("the peers are there");
        let names = line.split_whitespace().map(str::to_owned).collect();
        Some(Peers { process, answers, names })
    }

    fn round(&mut self, peer: usize, case: &Case, sequences: usize, seed: usize) -> Round {
        let ask = self.process.stdin.as_mut().expect("it is piped");
        writeln!(ask, "{} {sequences} {} {seed}", self.names[peer], case.tokens).expect("the peer lives");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the peer lives");
        let mut words = line.split_whitespace();
        let mut seconds = || words.next().and_then(|word| word.parse().ok()).expect("seconds");
        let (first, whole) = (seconds(), seconds());
        Round { first, whole, answer: words.map(|word| word.parse().expect("a token")).collect() }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // It ends with its input; how does not matter any more.
        let _ = self.process.wait();
    }
}

/// Median, lowest and highest.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
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
