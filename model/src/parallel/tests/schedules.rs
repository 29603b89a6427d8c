use std::collections::HashSet;

use proptest::prelude::*;

use crate::parallel::{
    layout::Schedule,
    schedule::{Action, Direction, Pipeline},
};

fn pipeline(schedule: Schedule, stages: usize, chunks: usize, micros: usize) -> Pipeline {
    Pipeline { schedule, stages, chunks, micros }
}

/// A backward pass takes twice as long as a forward one.
fn usual(_: usize, action: Action) -> f64 {
    if action.pass == Direction::Forward { 1.0 } else { 2.0 }
}

/// Most micro-batches at once whose activations a stage holds, each as a part of the model's.
fn most_alive(pipeline: Pipeline, stage: usize) -> usize {
    let mut alive = 0;
    let mut most = 0;
    for action in pipeline.actions(stage) {
        match action.pass {
            Direction::Forward => alive += 1,
            Direction::Backward => alive -= 1,
        }
        most = most.max(alive);
    }
    most
}

#[test]
fn a_stage_of_1f1b_begins_with_what_the_stages_after_it_need() {
    let of = |stage| {
        let actions = pipeline(Schedule::OneForwardOneBackward, 3, 1, 4).actions(stage);
        let name = |action: &Action| match action.pass {
            Direction::Forward => format!("F{}", action.micro),
            Direction::Backward => format!("B{}", action.micro),
        };
        actions.iter().map(name).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(of(0), "F0 F1 F2 B0 F3 B1 B2 B3");
    assert_eq!(of(1), "F0 F1 B0 F2 B1 F3 B2 B3");
    assert_eq!(of(2), "F0 B0 F1 B1 F2 B2 F3 B3");
}

#[test]
fn the_idle_share_is_the_formulas() {
    for (stages, micros) in [(2, 2), (2, 8), (4, 4), (4, 12), (8, 16)] {
        let (p, m) = (stages as f64, micros as f64);
        for schedule in [Schedule::Gpipe, Schedule::OneForwardOneBackward] {
            let idle = pipeline(schedule, stages, 1, micros).replay(usual).idle();
            assert!((idle - (p - 1.0) / (m + p - 1.0)).abs() < 1e-9, "{schedule:?} {stages} {micros}: {idle}");
        }
        for chunks in [2, 3] {
            let idle = pipeline(Schedule::Interleaved, stages, chunks, micros).replay(usual).idle();
            let expected = (p - 1.0) / (chunks as f64 * m + p - 1.0);
            assert!((idle - expected).abs() < 1e-9, "{stages} {chunks} {micros}: {idle} for {expected}");
        }
    }
}

#[test]
fn gpipe_holds_every_micro_batch_and_1f1b_as_many_as_stages_follow() {
    for stage in 0..4 {
        assert_eq!(most_alive(pipeline(Schedule::Gpipe, 4, 1, 12), stage), 12);
        assert_eq!(most_alive(pipeline(Schedule::OneForwardOneBackward, 4, 1, 12), stage), 4 - stage);
        assert_eq!(most_alive(pipeline(Schedule::OneForwardOneBackward, 4, 1, 2), stage), 2.min(4 - stage));
    }
}

proptest! {
    /// Whatever takes how long.
    #[test]
    fn every_pass_is_computed_once_and_nobody_waits_for_ever(
        kind in 0usize..3, stages in 1usize..6, chunks in 2usize..4, rounds in 1usize..5, extra in 0usize..5, seed: u64,
    ) {
        let schedule = Schedule::ALL[kind];
        let interleaved = schedule == Schedule::Interleaved;
        let (chunks, micros) = if interleaved { (chunks, rounds * stages) } else { (1, rounds + extra) };
        let pipeline = pipeline(schedule, stages, chunks, micros);
        for stage in 0..stages {
            let actions = pipeline.actions(stage);
            prop_assert_eq!(actions.iter().collect::<HashSet<_>>().len(), actions.len());
            prop_assert_eq!(actions.len(), 2 * chunks * micros);
            prop_assert!(actions.iter().all(|action| action.chunk < chunks && action.micro < micros));
        }
        let seconds = |stage: usize, action: Action| {
            let mixed = seed ^ (stage * 31 + action.chunk * 7 + action.micro * 3) as u64;
            (mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60) as f64 + 1.0
        };
        prop_assert!(pipeline.replay(seconds).finished);
    }
}
