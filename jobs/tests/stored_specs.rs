//! A job begun before an upgrade resumes after it: what version 1 has stored is read, to the value.
//!
//! The fixtures are never edited. A new version of the specification gets a file of its own.

use lathe_jobs::spec::{Spec, SpecError};
use lathe_model::{
    checkpoint::Manifest,
    config::{Method, Optimizer, Positions, Precision, Schedule, Template, Validation},
};

const SPEC_V1: &str = include_str!("fixtures/spec_v1.json");
const MANIFEST_V1: &str = include_str!("fixtures/manifest_v1.json");

#[test]
fn the_row_of_version_1_is_read() {
    let column: serde_json::Value = serde_json::from_str(SPEC_V1).expect("it is JSON");
    let Spec::Train(spec) = Spec::read(column.clone()).expect("it is read") else { panic!("another kind") };
    assert_eq!(spec.method, Method::Instruction { template: Template::Ins });
    assert_eq!((spec.model.kv_heads, spec.model.positions, spec.model.dropout), (1, Positions::Rotary, 0.1));
    assert_eq!(spec.validation, Some(Validation::Fraction { fraction: 0.1 }));
    let train = &spec.train;
    assert_eq!((train.steps, train.micro_batch_size, train.precision), (Some(400), Some(4), Some(Precision::Fp32)));
    assert_eq!(train.optimizer, Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 });
    assert_eq!(train.schedule, Schedule::Cosine { peak: 0.001, warmup_steps: Some(8), floor: 0.0001 });
    assert_eq!((train.checkpoint_every, train.keep_checkpoints, train.sample_prompts.len()), (Some(20), 2, 1));

    let mut newer = column;
    newer["spec_version"] = 99.into();
    newer["of_the_future"] = true.into();
    let refused = Spec::read(newer).expect_err("it is of the future");
    assert!(matches!(refused, SpecError::Newer { stored: 99 }), "{refused}");
}

#[test]
fn the_checkpoint_of_version_1_is_read() {
    let manifest: Manifest = serde_json::from_str(MANIFEST_V1).expect("it is read");
    let column: serde_json::Value = serde_json::from_str(SPEC_V1).expect("it is JSON");
    let Spec::Train(spec) = Spec::read(column).expect("it is read") else { panic!("another kind") };
    assert_eq!((manifest.format, manifest.step, manifest.spec), (1, 20, spec));
    let state = &manifest.state;
    assert_eq!((state.step, state.cursor, state.tokens, state.loss, state.best), (20, 80, 1234, Some(4.25), Some((10, 4.5))));
}
