//! The speed of training against the same model in plain PyTorch, interleaved in one run.
//!
//! `make bench`, or `cargo bench -p lathe-model --bench train [PART OF A CASE'S NAME]` with
//! `LATHE_PEER` naming a folder in which Python finds torch. Both sides start from the same weights,
//! read the same batches and take the same steps (`peer/train.py`), so their losses must agree. Lathe
//! runs its whole loop; between its rounds it stands still while PyTorch takes as many steps: eager, eager with
//! its allocator set as Lathe sets its own, and compiled.
//!
//! Printed is Lathe's speed over the peer's, by wall time and by processor time of all threads: the
//! median of the rounds, the lowest and the highest. Where other programs take part of the machine,
//! processor time is the steadier of the two.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    time::Instant,
};

use lathe_model::{
    config::{JobSpec, Method, Objective, Optimizer, Precision, SPEC_VERSION, Schedule, Template, TrainConfig},
    control::{Control, Reporter},
    data::{
        batch::{Batch, Example, Order},
        packing::{self, Packing},
        rows::{Row, Turn, Writer},
        shards::{Shard, Source},
    },
    objective::Posing,
    protocol::{self, DeviceChoice, Report, TrainTask},
    shim,
    tokenizer::{self, Tokenizer},
    train,
};
use serde_json::json;
use tch::{Device, Tensor};

use self::peer::{Peer, SEED, Shape, figure, spread};

mod peer;

const ROUNDS: u64 = 15;
/// Steps before the first round; the first is the slowest.
const WARM_UP: u64 = 3;
const LEARNING_RATE: f64 = 1e-3;

/// glibc's thresholds as Lathe's shim sets them.
const TUNED_MALLOC: [(&str, &str); 4] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_TRIM_THRESHOLD_", "2147483647"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TOP_PAD_", "67108864"),
];

/// What is trained on.
#[derive(Clone, Copy, PartialEq)]
enum Data {
    /// Texts far longer than the context: every row is full.
    Texts,
    /// Questions and answers of some twenty tokens, packed.
    Pairs,
}

struct Case {
    name: &'static str,
    shape: Shape,
    batch_size: u64,
    data: Data,
    /// Steps of a round.
    steps: u64,
    /// Of the speed over PyTorch's, however it is set.
    goal: f64,
    expected: &'static str,
}

const SMALL: Shape = Shape { layers: 4, heads: 4, width: 128, context: 64, vocabulary: 4096 };
const MEDIUM: Shape = Shape { layers: 6, heads: 6, width: 384, context: 256, vocabulary: 4096 };
const GPT2_SMALL: Shape = Shape { layers: 12, heads: 12, width: 768, context: 512, vocabulary: 50_257 };

const CASES: [Case; 6] = [
    Case {
        name: "small-texts",
        shape: SMALL,
        batch_size: 12,
        data: Data::Texts,
        steps: 20,
        goal: 1.2,
        expected: "1.2, measured before the goal was judged here",
    },
    Case { name: "small-pairs", shape: SMALL, batch_size: 12, data: Data::Pairs, steps: 20, goal: 1.0, expected: "1.4" },
    Case { name: "medium-texts", shape: MEDIUM, batch_size: 8, data: Data::Texts, steps: 2, goal: 1.0, expected: "1.1" },
    Case { name: "medium-pairs", shape: MEDIUM, batch_size: 8, data: Data::Pairs, steps: 2, goal: 1.0, expected: "1.2" },
    Case { name: "gpt2-small-texts", shape: GPT2_SMALL, batch_size: 2, data: Data::Texts, steps: 1, goal: 1.0, expected: "1.05" },
    Case { name: "gpt2-small-pairs", shape: GPT2_SMALL, batch_size: 2, data: Data::Pairs, steps: 1, goal: 1.0, expected: "1.1" },
];

impl Case {
    fn method(&self) -> Method {
        match self.data {
            Data::Texts => Method::Pretrain { objective: Objective::CausalLm },
            Data::Pairs => Method::Instruction { template: Template::Ins },
        }
    }

    /// Tokens of a round, padding included.
    fn tokens(&self) -> u64 {
        self.steps * self.batch_size * self.shape.context as u64
    }

    /// Steps in all, with some to spare.
    fn total(&self) -> u64 {
        WARM_UP + self.steps * (ROUNDS + 1)
    }

    fn spec(&self, precision: Precision) -> JobSpec {
        JobSpec {
            spec_version: SPEC_VERSION,
            method: self.method(),
            model: self.shape.config(),
            validation: None,
            layout: Default::default(),
            train: TrainConfig {
                steps: Some(self.total()),
                epochs: None,
                batch_size: self.batch_size,
                micro_batch_size: Some(self.batch_size),
                precision: Some(precision),
                optimizer: Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 },
                schedule: Schedule::Constant { peak: LEARNING_RATE, warmup_steps: Some(0) },
                clip: 1.0,
                seed: SEED,
                checkpoint_every: Some(u64::MAX),
                evaluate_every: None,
                keep_checkpoints: 1,
                sample_every: None,
                sample_prompts: Vec::new(),
                divergence: Default::default(),
            },
        }
    }
}

/// A dataset, a tokenizer, the initial weights and every batch, in files that both sides read.
struct Prepared {
    folder: tempfile::TempDir,
    threads: usize,
}

impl Prepared {
    fn new(case: &Case, threads: usize) -> Prepared {
        let prepared = Prepared { folder: tempfile::tempdir().expect("a temporary folder"), threads };
        let mut writer = Writer::create(&prepared.path("dataset")).expect("the folder is ours");
        rows(case).iter().for_each(|row| writer.push(row).expect("the folder is ours"));
        writer.finish().expect("the folder is ours");
        let tokenizer = tokenizer::train(&prepared.path("dataset"), case.shape.vocabulary, &prepared.path("tokenizer"));
        let tokenizer = tokenizer.expect("the rows have enough repeated text");
        peer::write_weights(&case.shape.seeded().1, &prepared.path("weights.safetensors"));
        prepared.write_batches(case, &tokenizer);
        prepared
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write_batches(&self, case: &Case, tokenizer: &Tokenizer) {
        let method = case.method();
        let source = Source {
            dataset: &self.path("dataset"),
            dataset_sha256: "dataset",
            tokenizer,
            tokenizer_sha256: "tokenizer",
            method: &method,
            context: case.shape.context as u64,
            threads: self.threads,
        };
        let shard = Shard::prepare(&self.path("shards"), source).expect("rows fit into the context");
        let packing = Packing::of(&shard, packing::all(&shard), case.shape.context as u64);
        let posing = Posing { objective: method.objective(), seed: SEED };
        let order = Order { shard: &shard, packing: &packing, posing };
        let mut file = BufWriter::new(File::create(self.path("batches")).expect("the folder is ours"));
        for step in 0..case.total() {
            let first = step * case.batch_size;
            let examples: Vec<Example> = order.examples(first..first + case.batch_size).collect();
            write_batch(&mut file, &Batch::of(&examples, 1, Device::Cpu));
        }
        file.flush().expect("the folder is ours");
    }

    fn task(&self, spec: JobSpec) -> TrainTask {
        TrainTask {
            spec,
            dataset: self.path("dataset"),
            validation_dataset: None,
            tokenizer: self.path("tokenizer"),
            base_model: None,
            resume: None,
            shard_cache: self.path("shards"),
            dataset_sha256: "dataset".into(),
            tokenizer_sha256: "tokenizer".into(),
            staging: self.path("staging"),
            device: DeviceChoice::Cpu,
            disk_low_bytes: 0,
            gang: None,
        }
    }
}

fn write_batch(file: &mut impl Write, batch: &Batch) {
    let (rows, length) = batch.tokens_bt.size2().expect("tokens are (b, t)");
    let supervised: Vec<i64> = batch.targets_n.iter::<i64>().expect("targets are numbers").collect();
    let mut targets = vec![-100; (rows * length) as usize];
    match &batch.chosen {
        None => targets.copy_from_slice(&supervised),
        Some(chosen) => {
            let places = chosen.places.iter::<i64>().expect("places are numbers");
            places.zip(supervised).for_each(|(place, target)| targets[place as usize] = target);
        }
    }
    let numbers = |tensor: &Tensor| tensor.view([-1]).iter::<i64>().expect("whole numbers").collect::<Vec<_>>();
    let all = [vec![rows, length], numbers(&batch.tokens_bt), numbers(&batch.positions_bt), targets].concat();
    all.iter().for_each(|&number| file.write_all(&(number as i32).to_le_bytes()).expect("the folder is ours"));
}

/// Pseudo-random rows: words of two to four syllables, so that merges can be learned, or, where there must be more of them,
/// of three to five.
fn rows(case: &Case) -> Vec<Row> {
    let mut state = 1u64;
    let mut below = move |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    };
    let syllables = ["ka", "lo", "mir", "ten", "su", "va", "ne", "ro", "pid", "gal", "tu", "es", "ban", "fo", "che", "lin"];
    let shortest = if case.shape.vocabulary > 10_000 { 3 } else { 2 };
    let words: Vec<String> = (0..case.shape.vocabulary * 2)
        .map(|_| (0..shortest + below(3)).map(|_| syllables[below(16) as usize]).collect())
        .collect();
    let mut sentence =
        |count: u64| (0..count).map(|_| words[below(words.len() as u64) as usize].as_str()).collect::<Vec<_>>().join(" ");
    match case.data {
        // Enough for every batch and for every token of the vocabulary.
        Data::Texts => (0..case.total() * case.batch_size / 4 + case.shape.vocabulary as u64 / 100)
            .map(|_| Row::Text { text: sentence(2_000) })
            .collect(),
        Data::Pairs => (0..(case.shape.vocabulary as u64 * 2).max(20_000))
            .map(|index| {
                let turn = Turn { instruction: sentence(4 + index % 5), input: String::new(), output: sentence(2 + index % 3) };
                Row::Conversation { system: None, turns: vec![turn] }
            })
            .collect(),
    }
}

/// What a round took, in seconds: by the clock, and of all threads' processor time.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    processor: f64,
}

/// Runs since it was made.
struct Clock {
    begun: Instant,
    processor: f64,
}

impl Clock {
    fn start() -> Clock {
        Clock { begun: Instant::now(), processor: processor_seconds() }
    }

    fn cost(&self) -> Cost {
        Cost { wall: self.begun.elapsed().as_secs_f64(), processor: processor_seconds() - self.processor }
    }
}

fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is valid and outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// How PyTorch is run.
struct Setting {
    name: &'static str,
    compiled: bool,
    environment: &'static [(&'static str, &'static str)],
}

const SETTINGS: [Setting; 3] = [
    Setting { name: "eager", compiled: false, environment: &[] },
    Setting { name: "eager, tuned malloc", compiled: false, environment: &TUNED_MALLOC },
    Setting { name: "compiled", compiled: true, environment: &[] },
];

/// PyTorch that waits for a number of steps.
struct Rival {
    process: Peer,
    name: &'static str,
    rounds: Vec<Cost>,
    loss: f64,
}

impl Rival {
    fn start(setting: &Setting, case: &Case, precision: Precision, prepared: &Prepared) -> Rival {
        let more = json!({"threads": prepared.threads, "bf16": precision == Precision::Bf16, "compiled": setting.compiled,
            "learning_rate": LEARNING_RATE, "batches": prepared.path("batches")});
        let description = case.shape.describe(&prepared.path("weights.safetensors"), more);
        let process = Peer::start("train.py", &description, &prepared.path("case.json"), setting.environment);
        let mut process = process.expect("LATHE_PEER names a folder with torch: run `make bench`");
        // The file is written anew for the next.
        process.answer();
        Rival { process, name: setting.name, rounds: Vec::new(), loss: f64::NAN }
    }

    fn steps(&mut self, steps: u64) -> Cost {
        let line = self.process.ask(&steps.to_string());
        let numbers: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let &[wall, processor, loss] = numbers.as_slice() else { panic!("the peer says {line:?}") };
        self.loss = loss;
        Cost { wall, processor }
    }
}

fn measure(case: &Case, precision: Precision, prepared: &Prepared) {
    let mut rivals = SETTINGS.each_ref().map(|setting| Rival::start(setting, case, precision, prepared));
    let control = Control::default();
    let (mut clock, mut rounds, mut last_loss) = (Clock::start(), Vec::new(), f64::NAN);
    let mut reporter = Reporter::new(|report| {
        let Report::Metric { row } = report else { return };
        last_loss = row.loss;
        // A row is reported once the step after it is finished.
        if row.step == WARM_UP {
            rivals.iter_mut().for_each(|rival| _ = rival.steps(WARM_UP));
        } else if row.step > WARM_UP && (row.step - WARM_UP).is_multiple_of(case.steps) {
            rounds.push(clock.cost());
            for rival in &mut rivals {
                let taken = rival.steps(case.steps);
                rival.rounds.push(taken);
                assert!(
                    (rival.loss - row.loss).abs() < 0.05 * row.loss,
                    "{}'s loss is {}, Lathe's {}",
                    rival.name,
                    rival.loss,
                    row.loss
                );
            }
        } else {
            return;
        }
        clock = Clock::start();
        if rounds.len() as u64 == ROUNDS {
            control.command(protocol::Command::Cancel);
        }
    });
    let ended = train::train(&prepared.task(case.spec(precision)), prepared.threads, &control, &mut reporter);
    drop(reporter);
    assert_eq!(ended.err(), Some(train::Halt::Stopped));
    let step = |cost: fn(&Cost) -> f64| spread(rounds.iter().map(|round| cost(round) / case.steps as f64 * 1e3))[0];
    println!(
        "{}, {precision:?}: {:.1} ms a step, {:.1} ms of processor time; loss {last_loss:.3}, PyTorch's {:.3}",
        case.name,
        step(|cost| cost.wall),
        step(|cost| cost.processor),
        rivals[0].loss
    );
    let speeds = |rounds: &[Cost]| -> Vec<f64> { rounds.iter().map(|round| case.tokens() as f64 / round.wall).collect() };
    let best = rivals.iter().max_by(|a, b| {
        let [median, other] = [a, b].map(|rival| spread(speeds(&rival.rounds))[0]);
        median.total_cmp(&other)
    });
    if let Some(best) = best {
        let name = format!("train/{}-{}", case.name, if precision == Precision::Bf16 { "bf16" } else { "fp32" });
        figure(&name, "tokens/s", [&speeds(&rounds), &speeds(&best.rounds)], case.goal, case.expected);
    }
    for rival in &rivals {
        let ratios = |cost: fn(&Cost) -> f64| {
            let [median, low, high] = spread(rival.rounds.iter().zip(&rounds).map(|(theirs, ours)| cost(theirs) / cost(ours)));
            format!("{median:.3} ({low:.2} to {high:.2})")
        };
        println!(
            "    over PyTorch, {:<20} wall {}, processor {}",
            rival.name,
            ratios(|cost| cost.wall),
            ratios(|cost| cost.processor)
        );
    }
}

fn main() {
    // Cargo passes `--bench`.
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).unwrap_or_default();
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    shim::initialize(threads).expect("libtorch can be set up");
    for case in CASES.iter().filter(|case| case.name.contains(&wanted)) {
        let prepared = Prepared::new(case, threads);
        for precision in [Precision::Fp32, Precision::Bf16] {
            measure(case, precision, &prepared);
        }
    }
}
