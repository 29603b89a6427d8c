//! A training's steps with nothing around them: no data, metrics, events, checkpoints or control.
//!
//! `share CASE DATASET TOKENIZER`, the folders of a dataset and a tokenizer, answers each line, a number of steps, with
//! the seconds that they took. The batches are made beforehand and used over and over. `make bench PART=share`
//! (`tests/bench/parts/share.py`) runs it beside the same training as a job of the whole platform.

use std::{io, path::Path, time::Instant};

use lathe_model::{
    arch::Model,
    config::{Method, Objective, Optimizer},
    data::{
        batch::{Batch, Example, Order},
        packing::{self, Packing},
        shards::{Shard, Source},
    },
    nn::{Parameters, Pass},
    objective::Posing,
    optim::{self, Slice},
    shim::{self, Autocast},
    tokenizer::Tokenizer,
};
use tch::{Device, Kind, Reduction, Tensor};

use self::peer::{SEED, Shape};

// Each bench uses a part of it.
#[allow(dead_code)]
mod peer;

const BATCHES: u64 = 24;
/// Of the learning rate, which decides nothing here.
const RATE: f64 = 1e-3;
const CLIP: f64 = 1.0;

/// As `share.py` posts them.
fn case(name: &str) -> Option<(Shape, u64)> {
    let shape = |layers, heads, width, context| Shape { layers, heads, width, context, vocabulary: 4096 };
    match name {
        "small" => Some((shape(4, 4, 128, 64), 12)),
        "medium" => Some((shape(6, 6, 384, 256), 8)),
        _ => None,
    }
}

fn batches(dataset: &Path, tokenizer: &Path, context: u64, batch_size: u64, threads: usize) -> Vec<Batch> {
    let tokenizer = Tokenizer::load(tokenizer).expect("a tokenizer's folder");
    let method = Method::Pretrain { objective: Objective::CausalLm };
    let source = Source {
        dataset,
        dataset_sha256: "dataset",
        tokenizer: &tokenizer,
        tokenizer_sha256: "tokenizer",
        method: &method,
        context,
        threads,
    };
    let cache = tempfile::tempdir().expect("a temporary folder");
    let shard = Shard::prepare(cache.path(), source).expect("rows fit into the context");
    let packing = Packing::of(&shard, packing::all(&shard), context);
    let order = Order { shard: &shard, packing: &packing, posing: Posing { objective: method.objective(), seed: SEED } };
    let batch = |step: u64| {
        let examples: Vec<Example> = order.examples(step * batch_size..(step + 1) * batch_size).collect();
        Batch::of(&examples, 1, Device::Cpu)
    };
    (0..BATCHES).map(batch).collect()
}

fn step(model: &Model, optimizer: &mut optim::Optimizer, batch: &mut Batch) {
    let autocast = Autocast::bf16(Device::Cpu).expect("the CPU computes in bf16");
    let mut pass = Pass::plain(&mut batch.plan);
    let hidden_btc = model.hidden(&batch.tokens_bt, &batch.positions_bt, &mut pass);
    let width = *hidden_btc.size().last().expect("it has three dimensions");
    let hidden_tc = hidden_btc.view([-1, width]);
    let hidden_nc = match &batch.chosen {
        None => hidden_tc,
        Some(chosen) => shim::move_rows(&hidden_tc, &chosen.places, &chosen.back, &chosen.unused).expect("they fit"),
    };
    let logits_nv = model.logits(&hidden_nc).to_kind(Kind::Float);
    drop(autocast);
    logits_nv.cross_entropy_loss(&batch.targets_n, None::<Tensor>, Reduction::Mean, -100, 0.0).backward();
    let norm = optimizer.gradient_norm().expect("gradients are there");
    optimizer.step(RATE, CLIP, &norm).expect("gradients are there");
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    // Run by `cargo bench` with all others, it has nothing to do.
    let [name, dataset, tokenizer] = arguments.as_slice() else { return };
    let (shape, batch_size) = case(name).expect("a case's name");
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    shim::initialize(threads).expect("libtorch can be set up");
    let mut batches = batches(dataset.as_ref(), tokenizer.as_ref(), shape.context as u64, batch_size, threads);
    let mut parameters = Parameters::trainable(Device::Cpu, SEED);
    let model = Model::new(&shape.config(), &mut parameters);
    let mut optimizer =
        optim::Optimizer::new(Slice::of(&parameters), &Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 });
    println!("0");
    for line in io::stdin().lines() {
        let steps: usize = line.expect("text").trim().parse().expect("a number of steps");
        let begun = Instant::now();
        (0..steps).for_each(|number| step(&model, &mut optimizer, &mut batches[number % BATCHES as usize]));
        println!("{}", begun.elapsed().as_secs_f64());
    }
}
