mod gangs;
mod layouts;

use std::path::{Path, PathBuf};

use super::*;
use crate::{
    checkpoint,
    config::{
        Activation, Architecture, JobSpec, Method, ModelConfig, Norm, Objective, Optimizer, Positions, Precision, SPEC_VERSION,
        Schedule, Template, TrainConfig, Validation,
    },
    data::{
        batch::{Batch, Example},
        packing::Piece,
        rows::{Row, Turn, Writer},
    },
    device,
    protocol::{Command, DeviceChoice, Failure, FailureCode, MetricRow},
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
            gang: None,
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
            layout: Default::default(),
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
    let file = checkpoint::read_model_file(&task.staging.join("model")).unwrap();
    let (config, template) = (file.model, file.template);
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

/// The speed of a step is its own: neither an evaluation nor a checkpoint around it slows it.
#[test]
fn speed_and_pace_are_told_apart() {
    let bench = Bench::new(&texts(200));
    let mut spec = bench.spec(pretrain(), 8);
    spec.train.evaluate_every = Some(1);
    spec.train.checkpoint_every = Some(1);
    spec.train.micro_batch_size = Some(1);
    spec.validation = Some(Validation::Fraction { fraction: 0.5 });
    let (result, reports) = run(&bench.task("speed", spec));
    result.unwrap();
    let rows = metrics(&reports);
    assert_eq!(rows.len(), 8);
    assert!(rows.iter().all(|row| row.validation_loss.is_some() && row.tokens_per_second > 0.0));
    let pace = reports.iter().rev().find_map(|report| match report {
        Report::Progress { seconds_per_step, .. } => *seconds_per_step,
        _ => None,
    });
    // A batch is at most 4 × 32 tokens; the pace has the evaluations and checkpoints in it.
    let own = rows.iter().map(|row| 128.0 / row.tokens_per_second).sum::<f64>() / 8.0;
    assert!(pace.unwrap() > own, "a step takes {own} s and the pace is {pace:?}");
}

/// Stopped in an evaluation, a run resumes with it, and nothing differs from an uninterrupted one.
#[test]
fn a_stop_in_an_evaluation_is_made_up_for() {
    let bench = Bench::new(&texts(200));
    let mut spec = bench.spec(pretrain(), 6);
    spec.train.evaluate_every = Some(3);
    spec.validation = Some(Validation::Fraction { fraction: 0.3 });
    let validated = |reports: &[Report]| -> Vec<(u64, u64)> {
        metrics(reports).iter().filter_map(|row| Some((row.step, row.validation_loss?.to_bits()))).collect()
    };
    let (whole, whole_reports) = run(&bench.task("whole", spec.clone()));
    let control = Control::default();
    let mut task = bench.task("stopped", spec);
    // The row of step 2 is reported when step 3 is finished; the evaluation comes next.
    let (halted, first) = run_with(&task, &control, |report| {
        if matches!(report, Report::Metric { row } if row.step == 2) {
            control.command(Command::Pause);
        }
    });
    assert_eq!(halted.unwrap_err(), Halt::Stopped);
    let folder = first.iter().rev().find_map(|report| match report {
        Report::Checkpoint { folder, step: 3, .. } => Some(folder.clone()),
        _ => None,
    });
    task.resume = Some(folder.expect("step 3 was finished and is saved"));
    let (resumed, second) = run(&task);
    assert_eq!(weights(resumed), weights(whole));
    assert!(validated(&first).is_empty());
    assert_eq!(validated(&second), validated(&whole_reports));
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

/// The loss over packed rows, as training computes it, against each document alone: sums and gradients.
#[test]
fn packed_batches_equal_the_same_documents_one_by_one() {
    for rows in [texts(30), vec![ask("cat", "meow"), ask("dog", "woof"), ask("cow", "moo"), ask("what a long question", "so")]] {
        let bench = Bench::new(&rows);
        let method = if matches!(rows[0], Row::Text { .. }) { pretrain() } else { instruction() };
        let task = bench.task("packed", bench.spec(method, 1));
        let run = prepare::prepare(&task, 1, &mut Reporter::new(|_| {})).map_err(|halt| format!("{halt:?}")).unwrap();
        let (shard, packing) = (&run.data.shard, &run.data.train);
        let sequences: Vec<_> = (0..packing.len()).map(|index| packing.sequence(index)).collect();
        assert!(sequences.iter().any(|pieces| pieces.len() > 1), "nothing is packed");
        let backward = |rows: &[&[Piece]]| {
            let examples: Vec<_> = rows.iter().map(|pieces| Example::of(shard, pieces, 0, run.posing())).collect();
            let mut batch = Batch::of(&examples, 1, run.device);
            let loss = run.loss_sum(std::slice::from_mut(&mut batch)).map_err(|halt| format!("{halt:?}")).unwrap();
            loss.backward();
            (loss.double_value(&[]), batch.supervised())
        };
        let gradients = || -> Vec<tch::Tensor> {
            let taken = run.parameters.entries().iter().map(|entry| entry.tensor.grad().copy()).collect();
            run.optimizer.zero_gradients().unwrap();
            taken
        };
        let packed = backward(&sequences);
        let packed_gradients = gradients();
        let alone = sequences.iter().flat_map(|pieces| pieces.chunks(1)).map(|piece| backward(&[piece]));
        let alone = alone.fold((0.0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        assert_eq!(packed.1, alone.1);
        assert!((packed.0 / alone.0 - 1.0).abs() < 1e-5, "{packed:?} and {alone:?}");
        for (entry, (a, b)) in run.parameters.entries().iter().zip(packed_gradients.iter().zip(gradients())) {
            let difference = (a - &b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]);
            assert!(difference < 1e-4, "{} differs by {difference}", entry.pieces[0].name);
        }
    }
}

#[test]
fn bf16_begins_like_fp32_and_trains() {
    let bench = Bench::new(&texts(40));
    let rows = |precision| {
        let mut spec = bench.spec(pretrain(), 30);
        spec.train.precision = Some(precision);
        metrics(&run(&bench.task(&format!("{precision:?}"), spec)).1)
    };
    let (bf16, fp32) = (rows(Precision::Bf16), rows(Precision::Fp32));
    assert!((bf16[0].loss / fp32[0].loss - 1.0).abs() < 1e-3, "{} and {}", bf16[0].loss, fp32[0].loss);
    assert_ne!(bf16[0].loss, fp32[0].loss, "one of them is not what it says");
    assert!((bf16[0].grad_norm / fp32[0].grad_norm - 1.0).abs() < 2e-2, "{} and {}", bf16[0].grad_norm, fp32[0].grad_norm);
    assert!(bf16[29].loss < bf16[0].loss * 0.7, "{} to {}", bf16[0].loss, bf16[29].loss);
}

#[test]
fn evaluations_and_checkpoints_change_no_bit_of_the_training() {
    let bench = Bench::new(&texts(40));
    let result = |every: u64| {
        let mut spec = bench.spec(pretrain(), 6);
        spec.model.dropout = 0.2;
        spec.validation = Some(Validation::Fraction { fraction: 0.3 });
        spec.train.evaluate_every = Some(every);
        spec.train.checkpoint_every = Some(every);
        spec.train.sample_every = Some(every);
        spec.train.sample_prompts = vec!["text".into()];
        weights(run(&bench.task(&format!("every{every}"), spec)).0)
    };
    assert_eq!(result(1), result(1_000_000));
}

fn events(reports: &[Report], wanted: &str) -> Vec<(String, serde_json::Value)> {
    let event = |report: &Report| match report {
        Report::Event { code, message, data, .. } if code == wanted => Some((message.clone(), data.clone())),
        _ => None,
    };
    reports.iter().filter_map(event).collect()
}

/// The first update at such a rate overflows, and every loss after it is not a number.
#[test]
fn a_loss_that_is_no_number_skips_its_steps_and_then_fails() {
    let bench = Bench::new(&texts(40));
    let mut spec = bench.spec(pretrain(), 20);
    spec.train.schedule = Schedule::Constant { peak: 1e38, warmup_steps: Some(0) };
    let (result, reports) = run(&bench.task("nan", spec));
    let failure = failure(result);
    assert_eq!((failure.code, failure.retryable), (FailureCode::NonFiniteLoss, false));
    assert!(failure.message.contains("step 4") && failure.message.contains("learning rate"), "{}", failure.message);
    let skipped = events(&reports, "step.skipped");
    assert_eq!(skipped.iter().map(|(_, data)| data["step"].clone()).collect::<Vec<_>>(), [2, 3, 4]);
    let diverged = events(&reports, "diverged");
    assert_eq!((diverged.len(), &diverged[0].0, &diverged[0].1["step"]), (1, &failure.message, &serde_json::json!(4)));
    assert_eq!(metrics(&reports).len(), 1, "only what was measured is reported");
}

#[test]
fn a_loss_that_rises_for_long_fails_with_step_and_value() {
    let bench = Bench::new(&texts(40));
    let mut spec = bench.spec(pretrain(), 200);
    spec.train.schedule = Schedule::Constant { peak: 3.0, warmup_steps: Some(0) };
    spec.train.divergence = crate::config::Divergence { window: 2, factor: 1.5, patience: 4, non_finite_steps: 3 };
    let (result, reports) = run(&bench.task("diverged", spec));
    let failure = failure(result);
    assert_eq!(failure.code, FailureCode::Diverged);
    let diverged = events(&reports, "diverged");
    let (step, loss) = (diverged[0].1["step"].as_u64().unwrap(), diverged[0].1["loss"].as_str().unwrap());
    assert!(failure.message.contains(&format!("at step {step} ")) && loss.parse::<f64>().unwrap() > 8.0, "{failure:?} {loss}");
    assert_eq!(diverged.len(), 1);
}

/// The bench's tokenizer with two more tokens, as an upload that adds to it.
fn grown_tokenizer(bench: &Bench, name: &str) -> Tokenizer {
    let read = std::fs::read(bench.path("tokenizer/tokenizer.json")).unwrap();
    let mut document: serde_json::Value = serde_json::from_slice(&read).unwrap();
    let added = document["added_tokens"].as_array_mut().unwrap();
    for offset in 0..2 {
        let mut token = added[0].clone();
        token["id"] = (bench.vocabulary + offset).into();
        token["content"] = format!("[NEW{offset}]").into();
        added.push(token);
    }
    let file = bench.path("upload.json");
    std::fs::write(&file, document.to_string()).unwrap();
    tokenizer::import(&file, &bench.path(name)).unwrap()
}

#[test]
fn a_tokenizer_that_adds_to_the_bases_grows_the_embedding() {
    let bench = Bench::new(&[ask("cat", "meow"), ask("dog", "woof"), ask("cow", "moo")]);
    for tied in [true, false] {
        let name = |leaf: &str| format!("{leaf}{tied}");
        let mut spec = bench.spec(pretrain(), 2);
        spec.model.tie_embeddings = tied;
        run(&bench.task(&name("base"), spec.clone())).0.unwrap();
        let grown = grown_tokenizer(&bench, &name("grown"));
        assert_eq!(grown.vocabulary(), bench.vocabulary + 2);
        spec.method = instruction();
        spec.model.vocabulary = 0;
        let mut task = bench.task(&name("tuned"), spec.clone());
        task.base_model = Some(bench.path(&name("base")).join("model"));
        task.tokenizer = bench.path(&name("grown"));
        task.tokenizer_sha256 = name("grown");
        // Before the first step: the old rows are the base's, the new ones their mean.
        let begun = prepare::prepare(&task, 1, &mut Reporter::new(|_| {})).map_err(|halt| format!("{halt:?}")).unwrap();
        let base = tch::Tensor::read_safetensors(task.base_model.as_ref().unwrap().join("weights.safetensors")).unwrap();
        for table in if tied { &["embedding.weight"][..] } else { &["embedding.weight", "head.weight"] } {
            let old = &base.iter().find(|(name, _)| name == table).unwrap().1;
            let new = &begun.parameters.logical()[table];
            assert_eq!(new.size()[0], bench.vocabulary + 2);
            assert_eq!(new.narrow(0, 0, bench.vocabulary), *old);
            let mean = old.mean_dim(0, true, tch::Kind::Float).expand([2, old.size()[1]], false);
            assert_eq!(new.narrow(0, bench.vocabulary, 2), mean);
        }
        let (result, reports) = run(&task);
        result.unwrap();
        let told = events(&reports, "embedding.grown");
        let sizes = serde_json::json!({ "from": bench.vocabulary, "to": bench.vocabulary + 2 });
        assert_eq!(told.into_iter().map(|(_, data)| data).collect::<Vec<_>>(), [sizes]);

        // The other way round the base has tokens that the tokenizer lacks.
        spec.model.vocabulary = 0;
        let mut task = bench.task(&name("shrunk"), spec);
        task.base_model = Some(bench.path(&name("tuned")).join("model"));
        let failure = failure(run(&task).0);
        assert_eq!((failure.code, failure.param.as_deref()), (FailureCode::InvalidTokenizer, Some("tokenizer")));
    }
}

#[test]
fn a_model_of_another_rendering_of_its_template_is_not_loaded() {
    let bench = Bench::new(&[ask("cat", "meow"), ask("dog", "woof")]);
    let task = bench.task("staging", bench.spec(instruction(), 1));
    run(&task).0.unwrap();
    let folder = task.staging.join("model");
    let mut file = checkpoint::read_model_file(&folder).unwrap();
    assert_eq!(file.template_sha256, Some(Template::Ins.sha256()));
    file.template_sha256 = Some("of another version".into());
    std::fs::write(folder.join("config.json"), serde_json::to_vec(&file).unwrap()).unwrap();
    assert_eq!(checkpoint::read_shape(&folder).unwrap_err(), checkpoint::read_model_file(&folder).unwrap_err());
    let failure = checkpoint::read_model_file(&folder).unwrap_err();
    assert!(failure.message.contains("renders the template ins otherwise"), "{}", failure.message);
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
    let native = if device::has_bf16(tch::Device::Cpu) { Precision::Bf16 } else { Precision::Fp32 };
    assert_eq!(spec.train.precision, Some(native));
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
