//! A run of several ranks beside the same run of one.

use std::{collections::BTreeMap, net::SocketAddr};

use safetensors::SafeTensors;

use super::*;
use crate::{
    parallel::{Layout, tests::in_ranks},
    protocol::Membership,
};

fn gang(task: TrainTask, ranks: usize, rank: usize, store: SocketAddr) -> TrainTask {
    let mut task = TrainTask { gang: Some(Membership { rank, store, address: "127.0.0.1".into() }), ..task };
    task.spec.layout = Layout { data: ranks as u32, ..Layout::default() };
    task
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
        let spec = spec(&bench, 20);
        let (made, reports) = run(&gang(bench.task("gang", spec.clone()), 4, rank, store));
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
        let folder = |staging: &str| bench.path(staging).join("model");
        assert_near(&folder("gang"), &folder("alone"), (&metrics(&reports), &metrics(&alone_reports)));
    });
}

#[test]
fn a_pause_of_one_rank_stops_all_at_one_step_and_the_gang_resumes_to_the_bit() {
    in_ranks(
        "train::tests::gangs::a_pause_of_one_rank_stops_all_at_one_step_and_the_gang_resumes_to_the_bit",
        2,
        |[first, second, third], rank| {
            let bench = Bench::new(&texts(60));
            let spec = spec(&bench, 12);
            let whole = run(&gang(bench.task("whole", spec.clone()), 2, rank, first)).0;

            // The second rank alone is told to.
            let control = Control::default();
            let (halted, reports) = run_with(&gang(bench.task("paused", spec.clone()), 2, rank, second), &control, |report| {
                if matches!(report, Report::Progress { step: 1, .. }) && rank == 1 {
                    control.command(Command::Pause);
                }
            });
            assert_eq!(halted.unwrap_err(), Halt::Stopped);
            let mut resumed = gang(bench.task("paused", spec), 2, rank, third);
            let saved = reports.iter().rev().find_map(|report| match report {
                Report::Checkpoint { folder, .. } => Some(folder.clone()),
                _ => None,
            });
            assert_eq!(saved.is_some(), rank == 0, "the first rank saves for all");
            // Both are on one host here, but each has files of its own: the second reads the first's.
            let note = std::env::temp_dir().join(format!("lathe-gang-{}", first.port()));
            match saved {
                Some(folder) => {
                    let whole = note.with_extension("tmp");
                    std::fs::write(&whole, folder.to_str().unwrap()).unwrap();
                    std::fs::rename(whole, &note).unwrap();
                }
                None => wait_for(&note),
            }
            resumed.resume = Some(std::fs::read_to_string(&note).unwrap().into());
            let again = run(&resumed).0;
            match rank {
                0 => {
                    std::fs::remove_file(note).unwrap();
                    assert_eq!(weights(again), weights(whole));
                }
                _ => assert_eq!(again.unwrap(), TaskResult::Rank),
            }
        },
    );
}

fn wait_for(path: &Path) {
    let deadline = Instant::now() + std::time::Duration::from_secs(60);
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} does not come", path.display());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
