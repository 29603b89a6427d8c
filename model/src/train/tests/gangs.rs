//! A run of several ranks beside the same run of one.

use std::{collections::BTreeMap, net::SocketAddr};

use safetensors::SafeTensors;

use super::*;
use crate::{
    parallel::{self, Layout, tests::in_ranks},
    protocol::Membership,
};

/// A folder of all ranks, as those of one host have one. The first one's removes it.
struct Shared {
    folder: PathBuf,
    rank: usize,
}

impl Shared {
    fn new(store: SocketAddr, rank: usize) -> Shared {
        Shared { folder: std::env::temp_dir().join(format!("lathe-gang-{}", store.port())), rank }
    }

    fn gang(&self, task: TrainTask, data: u32, store: SocketAddr) -> TrainTask {
        self.of(task, Layout { data, ..Layout::default() }, store)
    }

    fn of(&self, task: TrainTask, layout: Layout, store: SocketAddr) -> TrainTask {
        let staging = self.folder.join(task.staging.file_name().unwrap());
        let membership = Membership { rank: self.rank, store, address: "127.0.0.1".into() };
        let mut task = TrainTask { gang: Some(membership), staging, ..task };
        task.spec.layout = layout;
        task
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.rank == 0 {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

fn spec(bench: &Bench, steps: u64) -> JobSpec {
    let mut spec = bench.spec(pretrain(), steps);
    spec.train.batch_size = 8;
    spec.train.micro_batch_size = Some(2);
    spec.train.optimizer = Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-5, weight_decay: 0.1 };
    spec.model.dropout = 0.1;
    spec.train.evaluate_every = Some(5);
    spec.validation = Some(Validation::Fraction { fraction: 0.2 });
    spec
}

fn tensors(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(folder.join("weights.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |bytes: &[u8]| bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
    file.tensors().into_iter().map(|(name, view)| (name, numbers(view.data()))).collect()
}

fn norm(numbers: impl Iterator<Item = f32>) -> f64 {
    numbers.map(|number| f64::from(number) * f64::from(number)).sum::<f64>().sqrt()
}

/// What many ranks made, against one rank's.
fn assert_near(made: &Path, alone: &Path, (ours, theirs): (&[MetricRow], &[MetricRow])) {
    assert_eq!(ours.len(), theirs.len());
    for (row, other) in ours.iter().zip(theirs) {
        assert_eq!(
            (row.step, row.tokens, row.validation_loss.is_some()),
            (other.step, other.tokens, other.validation_loss.is_some())
        );
        let apart = |a: f64, b: f64| (a - b).abs() / b;
        assert!(apart(row.loss, other.loss) < 1e-4, "{row:?} {other:?}");
        assert!(apart(row.grad_norm, other.grad_norm) < 1e-4, "{row:?} {other:?}");
        if let (Some(a), Some(b)) = (row.validation_loss, other.validation_loss) {
            assert!(apart(a, b) < 1e-4, "{row:?} {other:?}");
        }
    }
    let (ours, theirs) = (tensors(made), tensors(alone));
    assert!(ours.keys().eq(theirs.keys()));
    for (name, numbers) in &ours {
        let apart = norm(numbers.iter().zip(&theirs[name]).map(|(a, b)| a - b)) / norm(theirs[name].iter().copied());
        assert!(apart < 1e-4, "{name}: {apart:e}");
    }
}

#[test]
fn four_data_ranks_train_as_one_does() {
    in_ranks("train::tests::gangs::four_data_ranks_train_as_one_does", 4, |[store, ..], rank| {
        let bench = Bench::new(&texts(60));
        let (shared, spec) = (Shared::new(store, rank), spec(&bench, 20));
        let (made, reports) = run(&shared.gang(bench.task("gang", spec.clone()), 4, store));
        if rank > 0 {
            assert_eq!(made.unwrap(), TaskResult::Rank);
            assert!(
                reports.iter().all(|report| matches!(report, Report::Started { .. } | Report::Progress { .. })),
                "{reports:?}"
            );
            return;
        }
        weights(made);
        let (alone, alone_reports) = run(&bench.task("alone", spec));
        weights(alone);
        let (ours, theirs) = (shared.folder.join("gang/model"), bench.path("alone/model"));
        assert_near(&ours, &theirs, (&metrics(&reports), &metrics(&alone_reports)));
    });
}

#[test]
fn a_pause_of_one_rank_stops_all_at_one_step_and_the_gang_resumes_to_the_bit() {
    in_ranks(
        "train::tests::gangs::a_pause_of_one_rank_stops_all_at_one_step_and_the_gang_resumes_to_the_bit",
        2,
        |[first, second, third, ..], rank| {
            let bench = Bench::new(&texts(60));
            let (shared, spec) = (Shared::new(first, rank), spec(&bench, 12));
            let whole = run(&shared.gang(bench.task("whole", spec.clone()), 2, first)).0;

            // The second rank alone is told to.
            let control = Control::default();
            let task = shared.gang(bench.task("paused", spec.clone()), 2, second);
            let (halted, reports) = run_with(&task, &control, |report| {
                if matches!(report, Report::Progress { step: 1, .. }) && rank == 1 {
                    control.command(Command::Pause);
                }
            });
            assert_eq!(halted.unwrap_err(), Halt::Stopped);
            let told = reports.iter().any(|report| matches!(report, Report::Checkpoint { .. }));
            assert_eq!(told, rank == 0, "the first rank speaks for all");
            let saved = std::fs::read_dir(&task.staging).unwrap().map(|entry| entry.unwrap().path());
            let [saved] = saved.collect::<Vec<_>>().try_into().unwrap();
            let resumed = TrainTask { resume: Some(saved), ..shared.gang(bench.task("paused", spec), 2, third) };
            let again = run(&resumed).0;
            match rank {
                0 => assert_eq!(weights(again), weights(whole)),
                _ => assert_eq!(again.unwrap(), TaskResult::Rank),
            }
        },
    );
}

/// Every resumed run goes on where the one before would have: each of its steps is the undisturbed run's.
#[test]
fn a_checkpoint_is_resumed_from_under_any_layout() {
    in_ranks("train::tests::gangs::a_checkpoint_is_resumed_from_under_any_layout", 2, |[first, second, third, ..], rank| {
        let bench = Bench::new(&texts(60));
        let (shared, mut spec) = (Shared::new(first, rank), spec(&bench, 24));
        (spec.train.checkpoint_every, spec.model.layers) = (Some(6), 4);
        let one = Layout::default();
        let layouts = [
            (Layout { tensor: 2, sequence: true, ..one }, first),
            (Layout { pipeline: 2, schedule: parallel::layout::Schedule::Interleaved, chunks: 2, ..one }, second),
            (Layout { data: 2, zero: 3, ..one }, third),
        ];
        let expected = (rank == 0).then(|| metrics(&run(&bench.task("undisturbed", spec.clone())).1));
        let mut resume: Option<PathBuf> = None;
        for (number, (layout, store)) in (1..).zip(layouts) {
            let task = shared.of(bench.task(&number.to_string(), spec.clone()), layout, store);
            let task = TrainTask { resume, ..task };
            let (result, reports) = run(&task);
            result.unwrap();
            let before = 6 * (number - 1);
            expected.iter().for_each(|expected| assert_equal_steps(&metrics(&reports), expected, before));
            resume = Some(task.staging.join((6 * number).to_string()));
        }
        if let Some(expected) = expected {
            let alone = TrainTask { resume, ..bench.task("alone", spec) };
            assert_equal_steps(&metrics(&run(&alone).1), &expected, 18);
        }
    });
}

#[test]
fn a_model_is_tuned_under_any_layout() {
    in_ranks("train::tests::gangs::a_model_is_tuned_under_any_layout", 2, |[first, second, third, ..], rank| {
        let bench = Bench::new(&texts(60));
        let (shared, mut spec) = (Shared::new(first, rank), spec(&bench, 6));
        spec.model.tie_embeddings = false;
        // Every rank has one of its own, of equal bits.
        run(&bench.task("base", spec.clone())).0.unwrap();
        spec.train.seed += 1;
        let from_base = |task: TrainTask| TrainTask { base_model: Some(bench.path("base").join("model")), ..task };
        let expected = metrics(&run(&from_base(bench.task("alone", spec.clone()))).1);
        let one = Layout::default();
        let layouts = [Layout { tensor: 2, ..one }, Layout { pipeline: 2, ..one }, Layout { data: 2, zero: 3, ..one }];
        for (number, (layout, store)) in layouts.into_iter().zip([first, second, third]).enumerate() {
            let task = shared.of(bench.task(&number.to_string(), spec.clone()), layout, store);
            let (result, reports) = run(&from_base(task));
            result.unwrap();
            if rank == 0 {
                assert_equal_steps(&metrics(&reports), &expected, 0);
            }
        }
    });
}

/// All steps after `before`, to rounding.
fn assert_equal_steps(found: &[MetricRow], expected: &[MetricRow], before: usize) {
    assert_eq!(found.len(), expected.len() - before);
    for (row, other) in found.iter().zip(&expected[before..]) {
        assert_eq!(row.step, other.step);
        assert!((row.loss / other.loss - 1.0).abs() < 1e-4, "{row:?} {other:?}");
    }
}
