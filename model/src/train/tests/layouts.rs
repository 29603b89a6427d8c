//! Gradients, losses and weights of every variant of a model under every layout, beside one rank's.

use tch::Tensor;

use super::*;
use crate::{
    nn::{Parameters, Piece},
    parallel::{Layout, layout::Schedule as Order, tests::in_ranks},
    protocol::Membership,
};

const STEPS: u64 = 20;

fn variant(model: ModelConfig, bits: u32) -> ModelConfig {
    let bit = |place: u32| bits >> place & 1 == 1;
    ModelConfig {
        layers: 4,
        kv_heads: if bit(0) { 2 } else { 4 },
        positions: if bit(1) { Positions::Rotary } else { Positions::Learned },
        norm: if bit(2) { Norm::Rms } else { Norm::Layer },
        activation: if bit(3) { Activation::Swiglu } else { Activation::Gelu },
        bias: !bit(2),
        tie_embeddings: !bit(1),
        dropout: if bit(0) { 0.1 } else { 0.0 },
        ..model
    }
}

/// Every other variant of those that take all steps is trained by SGD.
fn spec(bench: &Bench, bits: u32) -> JobSpec {
    let mut spec = bench.spec(pretrain(), STEPS);
    spec.model = variant(spec.model, bits);
    (spec.train.batch_size, spec.train.micro_batch_size) = (16, Some(2));
    spec.train.optimizer = match bits % 2 {
        0 => Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-5, weight_decay: 0.1 },
        _ => Optimizer::Sgd { momentum: 0.9, weight_decay: 0.1 },
    };
    spec
}

fn prepared(task: &TrainTask) -> Run {
    prepare::prepare(task, 1, &mut Reporter::new(|_| {})).map_err(|halt| format!("{halt:?}")).unwrap()
}

/// What one rank has of a piece.
fn whole(alone: &Parameters, piece: &Piece, of: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let (found, entry) = alone.pieces().find(|(found, _)| found.name == piece.name).unwrap();
    let all = found.view(&of(&entry.tensor));
    (0..piece.shape.len())
        .fold(all, |cut, dimension| cut.narrow(dimension as i64, piece.offset[dimension], piece.shape[dimension]))
}

/// ‖ours − theirs‖ / ‖theirs‖, but for key biases, whose gradient is zero but for rounding.
fn assert_near(name: &str, ours: &Tensor, theirs: &Tensor, tolerance: f64, what: &str) {
    if ours.numel() == 0 {
        return;
    }
    let apart = (ours - theirs).norm().double_value(&[]);
    let bound = if name.ends_with(".k.bias") { 1e-6 } else { tolerance * theirs.norm().double_value(&[]) };
    assert!(apart <= bound, "{what}, {name}: {apart:e} of {bound:e}");
}

fn train_as_one(bench: &Bench, bits: u32, layout: Layout, membership: Membership) {
    let mut task = TrainTask { gang: Some(membership), ..bench.task("gang", spec(bench, bits)) };
    task.spec.layout = layout;
    let (mut ours, mut alone) = (prepared(&task), prepared(&bench.task("alone", spec(bench, bits))));
    let what = format!("variant {bits} of rank {}", ours.gang.rank());
    // The gradients of the first step; they are computed anew for its update.
    let backward = |run: &Run| run.whole_backward(&Control::default()).map_err(|halt| format!("{halt:?}")).unwrap();
    backward(&ours);
    backward(&alone);
    for slice in ours.optimizer.slices() {
        for piece in &slice.pieces {
            let theirs = whole(&alone.parameters, piece, Tensor::grad);
            assert_near(&piece.name, &piece.view(&slice.tensor.grad()), &theirs, 1e-5, &what);
        }
    }
    if !bits.is_multiple_of(5) {
        return;
    }
    for run in [&ours, &alone] {
        run.optimizer.zero_gradients().unwrap();
    }
    for step in 1..=STEPS {
        let [(loss, norm), (expected, expected_norm)] = [&mut ours, &mut alone].map(|run| {
            run.step(&Control::default()).map_err(|halt| format!("{halt:?}")).unwrap();
            let taken = run.ledger.pending.pop_front().unwrap();
            (taken.loss.double_value(&[]), taken.grad_norm.double_value(&[]))
        });
        assert!((loss / expected - 1.0).abs() < 1e-4, "{what}, step {step}: {loss} and {expected}");
        assert!((norm / expected_norm - 1.0).abs() < 1e-4, "{what}, step {step}: norms {norm} and {expected_norm}");
    }
    let tolerance = if bits.is_multiple_of(2) { 1e-4 } else { 1e-5 };
    for held in ours.gang.weights(&ours.parameters, &ours.optimizer) {
        let theirs = whole(&alone.parameters, &held.piece, Tensor::detach);
        if !held.piece.name.ends_with(".k.bias") {
            assert_near(&held.piece.name, &held.tensor, &theirs, tolerance, &what);
        }
    }
}

/// One test for each layout, which starts its ranks as processes.
macro_rules! layouts {
    ($($name:ident: $layout:expr,)+) => {
        $(#[test]
        fn $name() {
            let layout: Layout = $layout;
            let test = concat!("train::tests::layouts::", stringify!($name));
            // All variants are many for many ranks.
            let every = if layout.ranks() > 4 { 5 } else { 1 };
            in_ranks(test, layout.ranks(), |stores, rank| {
                let bench = Bench::new(&texts(60));
                for bits in (0..stores.len()).step_by(every).filter(|bits| layout.tensor < 4 || bits % 2 == 0) {
                    let membership = Membership { rank, store: stores[bits], address: "127.0.0.1".into() };
                    train_as_one(&bench, bits as u32, layout, membership);
                }
            });
        })+
    };
}

const ONE: Layout = Layout {
    data: 1,
    tensor: 1,
    pipeline: 1,
    zero: 0,
    sequence: false,
    schedule: Order::OneForwardOneBackward,
    chunks: 1,
    elastic: false,
};

layouts! {
    data_2: Layout { data: 2, ..ONE },
    data_4: Layout { data: 4, ..ONE },
    zero_1: Layout { data: 2, zero: 1, ..ONE },
    zero_2: Layout { data: 2, zero: 2, ..ONE },
    zero_3: Layout { data: 2, zero: 3, ..ONE },
    tensor_2: Layout { tensor: 2, ..ONE },
    tensor_2_sequence: Layout { tensor: 2, sequence: true, ..ONE },
    tensor_4: Layout { tensor: 4, ..ONE },
    pipeline_2: Layout { pipeline: 2, ..ONE },
    pipeline_2_gpipe: Layout { pipeline: 2, schedule: Order::Gpipe, ..ONE },
    pipeline_2_interleaved: Layout { pipeline: 2, schedule: Order::Interleaved, chunks: 2, ..ONE },
    pipeline_4: Layout { pipeline: 4, ..ONE },
    data_2_tensor_2: Layout { data: 2, tensor: 2, ..ONE },
    data_2_tensor_2_zero_2_sequence: Layout { data: 2, tensor: 2, zero: 2, sequence: true, ..ONE },
    data_2_tensor_2_zero_3_sequence: Layout { data: 2, tensor: 2, zero: 3, sequence: true, ..ONE },
    tensor_2_pipeline_2: Layout { tensor: 2, pipeline: 2, ..ONE },
    data_2_pipeline_2: Layout { data: 2, pipeline: 2, ..ONE },
    data_2_pipeline_2_gpipe_zero_1: Layout { data: 2, pipeline: 2, zero: 1, schedule: Order::Gpipe, ..ONE },
    data_2_pipeline_2_interleaved_zero_2: Layout { data: 2, pipeline: 2, zero: 2, schedule: Order::Interleaved, chunks: 2, ..ONE },
    data_2_pipeline_2_zero_3: Layout { data: 2, pipeline: 2, zero: 3, ..ONE },
    data_2_tensor_2_pipeline_2: Layout { data: 2, tensor: 2, pipeline: 2, zero: 1, sequence: true, ..ONE },
}
