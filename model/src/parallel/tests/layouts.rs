use proptest::prelude::*;

use crate::{
    config::{Activation, Architecture, ModelConfig, Norm, Positions},
    parallel::layout::{Divided, Layout, MisfitKind, Schedule},
};

/// 12 heads in 4 groups, 6 layers.
fn model() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Gpt,
        layers: 6,
        heads: 12,
        kv_heads: 4,
        head_dim: 4,
        width: 48,
        mlp_width: 96,
        context: 64,
        vocabulary: 300,
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

fn check(layout: Layout, batch_size: u64, micro_batch_size: Option<u64>) -> Result<(), crate::parallel::Misfit> {
    layout.check(Divided { model: &model(), batch_size, micro_batch_size })
}

#[test]
fn every_rank_stands_at_one_place_and_the_tensor_axis_is_the_nearest() {
    let layout = Layout { data: 3, tensor: 2, pipeline: 4, ..Layout::default() };
    assert_eq!(layout.ranks(), 24);
    for rank in 0..24 {
        assert_eq!(layout.rank(layout.coordinates(rank)), rank);
    }
    let at = layout.coordinates(1);
    assert_eq!((at.tensor, at.data, at.pipeline), (1, 0, 0));
    let at = layout.coordinates(6);
    assert_eq!((at.tensor, at.data, at.pipeline), (0, 0, 1));
}

#[test]
fn the_default_is_one_rank_and_what_is_left_out_is_the_default() {
    assert!(check(Layout::default(), 1, None).is_ok());
    assert_eq!(serde_json::from_str::<Layout>("{}").unwrap(), Layout::default());
    assert_eq!(serde_json::to_value(Layout::default()).unwrap()["schedule"], "1f1b");
    assert!(serde_json::from_str::<Layout>(r#"{"tensors": 2}"#).is_err());
}

#[test]
fn what_does_not_divide_is_refused_with_the_numbers_and_the_nearest_that_does() {
    let cases = [
        (
            Layout { data: 5, ..Layout::default() },
            MisfitKind::LayoutDoesNotDivide,
            "24 is not a multiple of 5 data ranks",
            6,
            1,
            1,
        ),
        (
            Layout { data: 7, ..Layout::default() },
            MisfitKind::LayoutDoesNotDivide,
            "24 is not a multiple of 7 data ranks",
            6,
            1,
            1,
        ),
        (Layout { tensor: 3, ..Layout::default() }, MisfitKind::HeadsDoNotSplit, "12 heads and 4 key/value heads", 1, 4, 1),
        (
            Layout { pipeline: 9, ..Layout::default() },
            MisfitKind::LayoutDoesNotDivide,
            "6 layers are too few for 9 stages",
            1,
            1,
            6,
        ),
    ];
    for (layout, kind, said, data, tensor, pipeline) in cases {
        let misfit = check(layout, 24, Some(2)).unwrap_err();
        assert_eq!(misfit.kind, kind, "{misfit}");
        assert!(misfit.message.contains(said), "{misfit}");
        let nearest = misfit.nearest;
        assert_eq!((nearest.data, nearest.tensor, nearest.pipeline), (data, tensor, pipeline), "{misfit}");
    }
}

#[test]
fn chunks_go_with_the_interleaved_schedule_alone() {
    let interleaved = Layout { pipeline: 2, schedule: Schedule::Interleaved, chunks: 3, ..Layout::default() };
    assert!(check(interleaved, 4, Some(1)).is_ok());
    assert!(check(Layout { chunks: 1, ..interleaved }, 4, Some(1)).is_err());
    assert!(check(Layout { chunks: 2, ..Layout::default() }, 4, Some(1)).is_err());
    assert!(check(Layout { chunks: 4, ..interleaved }, 4, Some(1)).is_err(), "six layers, eight parts");
    let misfit = check(interleaved, 3, Some(1)).unwrap_err();
    assert!(misfit.message.contains("a multiple of 2 micro-batches, and there are 3"), "{misfit}");
}

proptest! {
    #[test]
    fn the_nearest_layout_fits(
        sizes in [1u32..40, 1u32..40, 1u32..40], chunks in 0u32..8, zero in 0u8..5, sequence: bool, kind in 0usize..3,
        batch in 1u64..200, micro in 1u64..4,
    ) {
        let [data, tensor, pipeline] = sizes;
        let layout = Layout { data, tensor, pipeline, zero, sequence, schedule: Schedule::ALL[kind], chunks, elastic: false };
        let batch_size = batch * micro;
        if let Err(misfit) = check(layout, batch_size, Some(micro)) {
            prop_assert!(misfit.nearest != layout);
            prop_assert!(check(misfit.nearest, batch_size, Some(micro)).is_ok(), "{misfit}: {:?}", misfit.nearest);
        }
    }
}
