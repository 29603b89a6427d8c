use std::path::{Path, PathBuf};

use super::*;
use crate::{
    checkpoint,
    config::{
        Activation, Architecture, JobSpec, Method, ModelConfig, Norm, Objective, Optimizer, Positions, Precision, SPEC_VERSION,
        Schedule, Template, TrainConfig, Validation,
    },
    data::rows::{Row, Turn, Writer},
    protocol::{Command, DeviceChoice, FailureCode, MetricRow},
    tokenizer::{self, Tokenizer},
};

/// A folder with a dataset and a tokenizer, and what a run on it reported.
struct Bench {
    folder: tempfile::TempDir,
    vocabulary: i64,
}

impl Bench {
    fn new(rows: &[Row]) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("dataset")).unwrap();
        rows.iter().for_each(|row| writer.push(row).unwrap());
        writer.finish().unwrap();
        let made: Tokenizer = tokenizer::train(&folder.path().join("dataset"), 272, &folder.path().join("tokenizer")).unwrap();
        Bench { folder, vocabulary: made.vocabulary() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn task(&self, staging: &str, spec: JobSpec) -> TrainTask {
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
            staging: self.path(staging),
            device: DeviceChoice::Cpu,
            disk_low_bytes: 0,
        }
    }

    fn spec(&self, method: Method, steps: u64) -> JobSpec {
        JobSpec {
            spec_version: SPEC_VERSION,
            method,
            model: ModelConfig {
                architecture: Architecture::Gpt,
                layers: 2,
                heads: 4,
                kv_heads: 2,
                head_dim: 8,
                width: 32,
                mlp_width: 64,
                context: 32,
                vocabulary: self.vocabulary,
                positions: Positions::Rotary,
                norm: Norm::Rms,
                norm_eps: 1e-5,
                activation: Activation::Swiglu,
                bias: false,
                tie_embeddings: true,
                dropout: 0.0,
                rope_theta: 10_000.0,
            },
            validation: None,
            train: TrainConfig {
                steps: Some(steps),
                epochs: None,
                batch_size: 4,
                micro_batch_size: Some(4),
                precision: Some(Precision::Fp32),
                optimizer: Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 },
                schedule: Schedule::Cosine { peak: 1e-2, warmup_steps: None, floor: 1e-3 },
                clip: 1.0,
                seed: 3,
                checkpoint_every: Some(1_000_000),
                evaluate_every: None,
                keep_checkpoints: 2,
                sample_every: None,
                sample_prompts: Vec::new(),
                divergence: Default::default(),
            },
        }
    }
}

fn pretrain() -> Method {
    Method::Pretrain { objective: Objective::CausalLm }
}

fn instruction() -> Method {
    Method::Instruction { template: Template::Ins }
}

fn ask(instruction: &str, output: &str) -> Row {
    let turn = Turn { instruction: instruction.into(), input: String::new(), output: output.into() };
    Row::Conversation { system: None, turns: vec![turn] }
}

fn texts(count: usize) -> Vec<Row> {
    (0..count).map(|i| Row::Text { text: format!("text {i} of {}", i * i) }).collect()
}

fn run_with(task: &TrainTask, control: &Control, mut seen: impl FnMut(&Report)) -> (Result<TaskResult, Halt>, Vec<Report>) {
    let mut reports = Vec::new();
    let mut reporter = Reporter::new(|report| {
        seen(&report);
        reports.push(report);
    });
    let result = train(task, 1, control, &mut reporter);
    drop(reporter);
    (result, reports)
}

fn run(task: &TrainTask) -> (Result<TaskResult, Halt>, Vec<Report>) {
    run_with(task, &Control::default(), |_| {})
}

fn weights(result: Result<TaskResult, Halt>) -> String {
    match result.unwrap() {
        TaskResult::Model { weights_sha256, .. } => weights_sha256,
        other => panic!("{other:?}"),
    }
}

fn metrics(reports: &[Report]) -> Vec<MetricRow> {
    let row = |report: &Report| if let Report::Metric { row } = report { Some(row.clone()) } else { None };
    reports.iter().filter_map(row).collect()
}

/// Steps, losses and norms: what must repeat to the bit. Rates do not.
fn numbers(reports: &[Report]) -> Vec<(u64, u64, u64)> {
    metrics(reports).iter().map(|row| (row.step, row.loss.to_bits(), row.grad_norm.to_bits())).collect()
}

fn failure(result: Result<TaskResult, Halt>) -> Failure {
    match result.unwrap_err() {
        Halt::Failed(failure) => failure,
        Halt::Stopped => panic!("stopped instead of failed"),
    }
}

#[test]
fn a_tiny_set_is_learned_by_heart_and_answers() {
    let bench = Bench::new(&[ask("cat", "meow"), ask("dog", "woof"), ask("cow", "moo")]);
    let mut spec = bench.spec(instruction(), 150);
    spec.train.sample_prompts = vec!["dog".into()];
    let task = bench.task("staging", spec);
    let (result, reports) = run(&task);
    weights(result);
    let last = metrics(&reports).last().unwrap().clone();
    assert_eq!(last.step, 150);
    assert!(last.loss < 0.02, "loss {}", last.loss);
    // One sequence holds all rows: outputs with their ends, four times a batch.
    assert_eq!(last.tokens, 4 * (5 + 5 + 4));
    let answer = reports.iter().rev().find_map(|report| match report {
        Report::Event { code, data, .. } if code == "sample" => Some(data["text"].clone()),
        _ => None,
    });
    assert_eq!(answer.unwrap(), "woof");
    let (_, config, template) = checkpoint::load_model(&task.staging.join("model"), tch::Device::Cpu, tch::Kind::Float).unwrap();
    assert_eq!((config, template), (task.spec.model, Some(Template::Ins)));
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_to_the_bit() {
    let bench = Bench::new(&texts(40));
    let mut spec = bench.spec(pretrain(), 12);
    spec.model.dropout = 0.1;
    spec.train.micro_batch_size = Some(2);
    spec.train.evaluate_every = Some(4);
    spec.validation = Some(Validation::Fraction { fraction: 0.2 });
    let (whole, whole_reports) = run(&bench.task("whole", spec.clone()));

    let control = Control::default();
    let mut task = bench.task("paused", spec);
    let (halted, first) = run_with(&task, &control, |report| {
        if matches!(report, Report::Metric { row } if row.step == 6) {
            control.command(Command::Pause);
        }
    });
    assert_eq!(halted.unwrap_err(), Halt::Stopped);
    let saved = first.iter().rev().find_map(|report| match report {
        Report::Checkpoint { folder, step, .. } => Some((folder.clone(), *step)),
        _ => None,
    });
    let (folder, step) = saved.expect("a pause saves");
    assert!(step == 6 || step == 7, "paused at {step}");
    task.resume = Some(folder);
    let (resumed, second) = run(&task);
    assert_eq!(weights(resumed), weights(whole));
    assert_eq!([numbers(&first), numbers(&second)].concat(), numbers(&whole_reports));
}

#[test]
fn a_batch_in_one_piece_equals_micro_batches() {
    let bench = Bench::new(&texts(40));
    let losses = |micro: u64, dropout: f64| {
        let mut spec = bench.spec(pretrain(), 6);
        spec.train.micro_batch_size = Some(micro);
        spec.model.dropout = dropout;
        metrics(&run(&bench.task(&format!("micro{micro}{dropout}"), spec)).1)
    };
    for dropout in [0.0, 0.2] {
        for (one, many) in losses(4, dropout).iter().zip(losses(1, dropout)) {
            assert_eq!(one.tokens, many.tokens);
            assert!((one.loss - many.loss).abs() < 1e-4, "step {}: {} and {}", one.step, one.loss, many.loss);
            assert!((one.grad_norm - many.grad_norm).abs() < 1e-3);
        }
    }
}

#[test]
fn bf16_trains_too() {
    let bench = Bench::new(&texts(40));
    let mut spec = bench.spec(pretrain(), 30);
    spec.train.precision = Some(Precision::Bf16);
    let rows = metrics(&run(&bench.task("bf16", spec)).1);
    assert!(rows[29].loss < rows[0].loss * 0.7, "{} to {}", rows[0].loss, rows[29].loss);
}

#[test]
fn a_damaged_checkpoint_is_noticed() {
    let bench = Bench::new(&texts(20));
    let mut task = bench.task("staging", bench.spec(pretrain(), 2));
    run(&task).0.unwrap();
    let folder = task.staging.join("2");
    checkpoint::verify(&folder).unwrap();
    let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let (path, copy) = (folder.join(name), std::fs::read(folder.join(name)).unwrap());
        let mut bytes = copy.clone();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        let failure = checkpoint::verify(&folder).unwrap_err();
        assert_eq!(failure.code, FailureCode::CheckpointUnreadable);
        std::fs::write(path, copy).unwrap();
    };
    damage("weights.safetensors", &|bytes| *bytes.last_mut().unwrap() ^= 1);
    damage("optimizer.safetensors", &|bytes| bytes.truncate(bytes.len() - 4));
    damage("manifest.json", &|bytes| bytes.truncate(100));
    checkpoint::verify(&folder).unwrap();
    std::fs::remove_file(folder.join("manifest.json")).unwrap();
    task.resume = Some(folder);
    assert_eq!(failure(run(&task).0).code, FailureCode::CheckpointUnreadable);
}

#[test]
fn what_cannot_be_trained_says_why() {
    let bench = Bench::new(&texts(20));
    let code = |name: &str, change: &dyn Fn(&mut TrainTask)| {
        let mut task = bench.task(name, bench.spec(instruction(), 2));
        change(&mut task);
        failure(run(&task).0)
    };
    // Texts have no output to learn.
    assert_eq!(code("texts", &|_| {}).code, FailureCode::NoSupervisedTokens);
    let full = code("full", &|task| {
        task.spec.method = pretrain();
        task.disk_low_bytes = u64::MAX / 2;
    });
    assert_eq!(full.code, FailureCode::DiskFull);
    assert!(full.retryable);

    let long = Bench::new(&[ask("short", "ok"), ask(&"x y z ".repeat(20), "long")]);
    let too_long = failure(run(&long.task("long", long.spec(instruction(), 2))).0);
    assert_eq!(too_long.code, FailureCode::ContextTooShort);
    assert!(too_long.message.contains("row 2 ") && too_long.message.contains("context is 32"), "{}", too_long.message);
}

#[test]
fn an_open_spec_is_resolved_and_epochs_become_steps() {
    let bench = Bench::new(&texts(200));
    let mut spec = bench.spec(pretrain(), 0);
    spec.train.steps = None;
    spec.train.epochs = Some(2.0);
    spec.train.micro_batch_size = None;
    spec.train.precision = None;
    spec.model.vocabulary = 0;
    spec.validation = Some(Validation::Fraction { fraction: 0.1 });
    // At the end alone.
    spec.train.evaluate_every = Some(1_000_000);
    let (result, reports) = run(&bench.task("open", spec));
    result.unwrap();
    let resolved = reports.iter().find_map(|report| match report {
        Report::Resolved { spec, trained_tokens_per_epoch } => Some((spec.clone(), *trained_tokens_per_epoch)),
        _ => None,
    });
    let (spec, tokens) = resolved.unwrap();
    assert_eq!(spec.model.vocabulary, bench.vocabulary);
    assert_eq!(spec.train.precision, Some(Precision::Fp32));
    assert_eq!(spec.train.micro_batch_size, Some(4));
    let rows = metrics(&reports);
    assert_eq!(spec.train.steps, Some(rows.len() as u64));
    let trained: u64 = rows.iter().map(|row| row.tokens).sum();
    assert!(trained >= 2 * tokens && trained < 2 * tokens + 4 * 32, "{trained} of 2 × {tokens}");
    assert!(rows.iter().any(|row| row.validation_loss.is_some()));
}

#[test]
fn shards_are_found_again_and_hold_every_token_once() {
    use crate::data::{
        packing,
        packing::Packing,
        shards::{Shard, Source},
    };
    let rows: Vec<Row> = (0..30).map(|i| Row::Text { text: "word ".repeat(i) }).collect();
    let bench = Bench::new(&rows);
    let tokenizer = Tokenizer::load(&bench.path("tokenizer")).unwrap();
    let (dataset, method) = (bench.path("dataset"), pretrain());
    let source = |dataset: &Path| -> Shard {
        let source = Source {
            dataset,
            dataset_sha256: "a",
            tokenizer: &tokenizer,
            tokenizer_sha256: "b",
            method: &method,
            context: 32,
            threads: 2,
        };
        Shard::prepare(&bench.path("shards"), source).unwrap()
    };
    let shard = source(&dataset);
    // Found by name: the dataset is not read again.
    let again = source(Path::new("/nonexistent"));
    assert_eq!(again.manifest, shard.manifest);
    let packing = Packing::of(&shard, packing::all(&shard), 32);
    let mut seen = vec![0; shard.manifest.tokens as usize];
    for index in 0..packing.len() {
        let pieces = packing.sequence(index);
        assert!(pieces.iter().map(|piece| piece.len).sum::<u32>() <= 32);
        pieces
            .iter()
            .for_each(|piece| (piece.start..piece.start + u64::from(piece.len)).for_each(|input| seen[input as usize] += 1));
    }
    // Every token but the last of its document is an input once.
    for document in packing::all(&shard) {
        assert!(seen[document.start as usize..document.end as usize - 1].iter().all(|&count| count == 1));
        assert_eq!(seen[document.end as usize - 1], 0);
    }
    assert_eq!(packing.total_supervised(), shard.manifest.supervised);
}
