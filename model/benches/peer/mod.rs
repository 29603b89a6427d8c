//! What the benches share: the shape of a model, its weights in a file that both sides read, and the
//! Python process of a peer.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use lathe_model::{
    arch::Model,
    config::{Activation, Architecture, ModelConfig, Norm, Positions},
    nn::Parameters,
};
use serde_json::{Value, json};
use tch::{Device, Tensor};

/// Of the initial weights.
pub const SEED: u64 = 1;

/// A model like GPT-2.
#[derive(Clone, Copy)]
pub struct Shape {
    pub layers: i64,
    pub heads: i64,
    pub width: i64,
    pub context: i64,
    pub vocabulary: i64,
}

impl Shape {
    pub fn config(&self) -> ModelConfig {
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

    /// A model of this shape with its initial weights.
    pub fn seeded(&self) -> (Model, Parameters) {
        let mut parameters = Parameters::trainable(Device::Cpu, SEED);
        (Model::new(&self.config(), &mut parameters), parameters)
    }

    /// What a peer is told of the shape and the weights in `file`; `more` is added.
    pub fn describe(&self, weights: &Path, more: Value) -> Value {
        let mut description = json!({"layers": self.layers, "heads": self.heads, "width": self.width,
            "context": self.context, "vocabulary": self.vocabulary, "weights": weights});
        if let (Value::Object(all), Value::Object(more)) = (&mut description, more) {
            all.extend(more);
        }
        description
    }
}

pub fn write_weights(parameters: &Parameters, file: &Path) {
    let weights: Vec<(&str, Tensor)> = parameters.logical().into_iter().collect();
    Tensor::write_safetensors(&weights, file).expect("the folder is ours");
}

/// A Python process that answers a line with a line.
pub struct Peer {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Runs `benches/peer/{script}` with the path of a file that holds `description`. `None` where
    /// `LATHE_PEER` does not say where torch is.
    pub fn start(script: &str, description: &Value, file: &Path, environment: &[(&str, &str)]) -> Option<Peer> {
        let packages = std::env::var_os("LATHE_PEER")?;
        std::fs::write(file, description.to_string()).expect("the folder is ours");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peer").join(script);
        let mut python = Command::new("python3");
        // The library path is for Lathe's own libtorch.
        python.arg(script).arg(file).env("PYTHONPATH", packages).env_remove("LD_LIBRARY_PATH").envs(environment.iter().copied());
        let mut process = python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 runs");
        let answers = BufReader::new(process.stdout.take().expect("it is piped"));
        Some(Peer { process, answers })
    }

    pub fn ask(&mut self, line: &str) -> String {
        writeln!(self.process.stdin.as_mut().expect("it is piped"), "{line}").expect("the peer lives");
        self.answer()
    }

    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the peer lives");
        assert!(line.ends_with('\n'), "the peer ended");
        line
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // It ends with its input; how does not matter any more.
        let _ = self.process.wait();
    }
}

/// Median, lowest and highest.
pub fn spread(values: impl IntoIterator<Item = f64>) -> [f64; 3] {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    [sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]]
}

/// Prints a figure for `make bench`, which judges it (`tests/bench/report.py`): a value a round of both sides, and the
/// least ratio that is good enough. `expected` was written down before the first measurement.
pub fn figure(name: &str, unit: &str, [ours, peers]: [&[f64]; 2], goal: f64, expected: &str) {
    println!("FIGURE {}", json!({"name": name, "unit": unit, "ours": ours, "peers": peers, "goal": goal, "expected": expected}));
}
