use lathe_model::config::{Activation, Norm, Optimizer, Positions, Precision, Schedule};
use serde_json::{Value, json};

use super::{TrainBody, *};
use crate::parse;

fn pretrain() -> Value {
    json!({
        "method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64},
        "dataset": "ds_1", "tokenizer": "tok_1"
    })
}

fn tune() -> Value {
    json!({"method": {"type": "instruction"}, "base_model": "model-1", "dataset": "ds_1"})
}

/// `body` with the value at a pointer replaced, parents made where they lack.
fn with(mut body: Value, pointer: &str, value: Value) -> Value {
    let mut at = &mut body;
    for name in pointer.trim_start_matches('/').split('/') {
        at = match name.parse::<usize>() {
            Ok(index) if at.is_array() => &mut at[index],
            _ => &mut at[name],
        };
    }
    *at = value;
    body
}

fn request(body: Value) -> Result<TrainRequest, ApiError> {
    parse::typed::<TrainBody>(body)?.resolve()
}

/// The field that a refusal with `status` names.
fn refused(body: Value, status: u16) -> String {
    let error = request(body).unwrap_err();
    assert_eq!(error.status, status, "{error}");
    error.body.error.param.clone().unwrap_or_default()
}

fn invalid(body: Value) -> String {
    refused(body, 400)
}

fn contradiction(body: Value) -> String {
    refused(body, 422)
}

fn parse(body: Value) -> TrainRequest {
    request(body).unwrap()
}

fn shape(body: Value) -> ModelConfig {
    match parse(body).origin {
        Origin::Fresh { model, .. } => model,
        Origin::Base { .. } => panic!("a pretraining body has a shape"),
    }
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let request = parse(pretrain());
    let train = &request.train;
    assert_eq!((train.steps, train.epochs, train.batch_size, train.micro_batch_size), (None, Some(1.0), 32, None));
    assert_eq!(train.precision, None);
    assert_eq!(train.optimizer, Optimizer::Adamw { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 });
    assert_eq!(train.schedule, Schedule::Cosine { peak: 1e-3, warmup_steps: None, floor: 1e-4 });
    assert_eq!((train.clip, train.seed), (1.0, 0));
    assert_eq!((train.checkpoint_every, train.evaluate_every, train.keep_checkpoints), (None, None, 2));
    assert_eq!((train.sample_every, train.sample_prompts.len()), (None, 0));
    assert_eq!(train.divergence, Default::default());
    assert_eq!((request.max_attempts, request.priority, request.validation), (3, 0, None));
    let Schedule::Cosine { peak, floor, .. } = parse(tune()).train.schedule else { panic!("cosine is the default") };
    assert_eq!((peak, floor), (1e-4, 1e-5));
}

#[test]
fn the_shape_has_the_usual_defaults() {
    let model = shape(pretrain());
    assert_eq!((model.kv_heads, model.head_dim, model.mlp_width, model.vocabulary), (4, 32, 512, 0));
    assert_eq!((model.positions, model.norm, model.activation), (Positions::Learned, Norm::Layer, Activation::Gelu));
    assert_eq!((model.bias, model.tie_embeddings, model.dropout), (true, true, 0.0));
    assert_eq!((model.rope_theta, model.norm_eps), (10_000.0, 1e-5));
    assert_eq!(shape(with(pretrain(), "/model/activation", json!("swiglu"))).mlp_width, 384);
    let small = shape(with(pretrain(), "/model", json!({"preset": "gpt2-small"})));
    assert_eq!((small.layers, small.heads, small.width, small.context), (12, 12, 768, 1024));
}

#[test]
fn everything_stated_is_kept() {
    let hyperparameters = json!({"steps": 2000, "batch_size": 12, "micro_batch_size": 12, "precision": "bf16", "seed": u64::MAX,
        "clip": 0.5, "optimizer": {"type": "adamw", "betas": [0.8, 0.9], "weight_decay": 0, "eps": 1e-6},
        "schedule": {"type": "linear", "peak": 1e-2, "warmup_steps": 100, "floor": 0}, "checkpoint_every": 200,
        "evaluate_every": 100, "keep_checkpoints": 3, "sample_every": 50, "sample_prompts": ["a"],
        "divergence": {"factor": 2.5}, "max_attempts": 1});
    let body = with(with(pretrain(), "/hyperparameters", hyperparameters), "/validation", json!({"fraction": 0.05}));
    let request = parse(with(with(body, "/priority", json!(-3)), "/after", json!(["ftjob-1"])));
    let train = &request.train;
    assert_eq!((train.steps, train.epochs, train.batch_size, train.micro_batch_size), (Some(2000), None, 12, Some(12)));
    assert_eq!((train.precision, train.seed, train.clip), (Some(Precision::Bf16), u64::MAX, 0.5));
    assert_eq!(train.optimizer, Optimizer::Adamw { betas: [0.8, 0.9], eps: 1e-6, weight_decay: 0.0 });
    assert_eq!(train.schedule, Schedule::Linear { peak: 1e-2, warmup_steps: Some(100), floor: 0.0 });
    assert_eq!((train.checkpoint_every, train.evaluate_every, train.keep_checkpoints), (Some(200), Some(100), 3));
    assert_eq!((train.sample_every, &train.sample_prompts[..]), (Some(50), &["a".to_owned()][..]));
    assert_eq!((train.divergence.factor, train.divergence.window), (2.5, 50));
    assert_eq!((request.max_attempts, request.priority, request.after), (1, -3, vec!["ftjob-1".to_owned()]));
    assert_eq!(request.validation, Some(Validation::Fraction { fraction: 0.05 }));
}

#[test]
fn an_optimizer_has_its_own_settings_and_defaults() {
    let of = |optimizer: Value| with(pretrain(), "/hyperparameters", json!({"steps": 1, "optimizer": optimizer}));
    let resolved = |optimizer| parse(of(optimizer)).train.optimizer;
    assert_eq!(resolved(json!({"type": "sgd"})), Optimizer::Sgd { momentum: 0.9, weight_decay: 0.0 });
    let stated = json!({"type": "sgd", "momentum": 0, "weight_decay": 0.1});
    assert_eq!(resolved(stated), Optimizer::Sgd { momentum: 0.0, weight_decay: 0.1 });
    for (optimizer, field) in [
        (json!({"momentum": 0.9}), "momentum"),
        (json!({"type": "sgd", "betas": [0.9, 0.95]}), "betas"),
        (json!({"type": "sgd", "eps": 1e-8}), "eps"),
    ] {
        assert_eq!(contradiction(of(optimizer)), format!("hyperparameters.optimizer.{field}"));
    }
}

#[test]
fn every_bound_is_a_400_with_its_path() {
    let cases = [
        ("/hyperparameters/steps", json!(0), "hyperparameters.steps"),
        ("/hyperparameters/steps", json!(10_000_001), "hyperparameters.steps"),
        ("/hyperparameters/epochs", json!(0.5), "hyperparameters.epochs"),
        ("/hyperparameters/epochs", json!(1001), "hyperparameters.epochs"),
        ("/hyperparameters/batch_size", json!(65_537), "hyperparameters.batch_size"),
        ("/hyperparameters/batch_size", json!("32"), "hyperparameters.batch_size"),
        ("/hyperparameters/micro_batch_size", json!(0), "hyperparameters.micro_batch_size"),
        ("/hyperparameters/precision", json!("fp8"), "hyperparameters.precision"),
        ("/hyperparameters/clip", json!(0), "hyperparameters.clip"),
        ("/hyperparameters/seed", json!(-1), "hyperparameters.seed"),
        ("/hyperparameters/keep_checkpoints", json!(0), "hyperparameters.keep_checkpoints"),
        ("/hyperparameters/max_attempts", json!(101), "hyperparameters.max_attempts"),
        ("/hyperparameters/sample_prompts", json!(vec!["a"; 9]), "hyperparameters.sample_prompts"),
        ("/hyperparameters/sample_prompts", json!([""]), "hyperparameters.sample_prompts[0]"),
        ("/hyperparameters/optimizer", json!({"betas": [0.9, 1.0]}), "hyperparameters.optimizer.betas[1]"),
        ("/hyperparameters/optimizer", json!({"betas": [0.9]}), "hyperparameters.optimizer.betas"),
        ("/hyperparameters/optimizer", json!({"type": "rmsprop"}), "hyperparameters.optimizer.type"),
        ("/hyperparameters/optimizer", json!({"type": "sgd", "momentum": 1}), "hyperparameters.optimizer.momentum"),
        ("/hyperparameters/schedule", json!({"peak": 0}), "hyperparameters.schedule.peak"),
        ("/hyperparameters/schedule", json!({"type": "constant", "floor": 1e-4}), "hyperparameters.schedule.floor"),
        ("/hyperparameters/divergence", json!({"factor": 1}), "hyperparameters.divergence.factor"),
        ("/hyperparameters/learning_rate", json!(1), "hyperparameters.learning_rate"),
        ("/model/layers", json!(0), "model.layers"),
        ("/model/layers", json!(2.5), "model.layers"),
        ("/model/dropout", json!(1), "model.dropout"),
        ("/model/rope_theta", json!(500_000), "model.rope_theta"),
        ("/model/positions", json!("alibi"), "model.positions"),
        ("/model/window", json!(64), "model.window"),
        ("/model", json!({"preset": "gpt3"}), "model.preset"),
        ("/model", json!({"preset": "gpt2-small", "layers": 2}), "model.layers"),
        ("/validation", json!({"fraction": 0}), "validation.fraction"),
        ("/validation", json!({"share": 0.1}), "validation.share"),
        ("/method/type", json!("distil"), "method.type"),
        ("/method/objective", json!("mlm"), "method.objective"),
        ("/metadata", json!({"a": 1}), "metadata.a"),
        ("/priority", json!(1001), "priority"),
        ("/name", json!(""), "name"),
        ("/parallelism", json!({"data": 0}), "parallelism.data"),
        ("/parallelism", json!({"tensors": 2}), "parallelism.tensors"),
        ("/base_model", json!("model-1"), "base_model"),
    ];
    for (pointer, value, param) in cases {
        assert_eq!(invalid(with(pretrain(), pointer, value.clone())), param, "{pointer} = {value}");
    }
    let many: serde_json::Map<String, Value> = (0..17).map(|n| (n.to_string(), json!("x"))).collect();
    assert_eq!(invalid(with(pretrain(), "/metadata", Value::Object(many))), "metadata");
    assert_eq!(invalid(with(tune(), "/model", json!({"preset": "gpt2-small"}))), "model");
    assert_eq!(invalid(with(tune(), "/tokenizer", json!(1))), "tokenizer");
    assert_eq!(invalid(with(tune(), "/method/template", json!("chatml"))), "method.template");
}

#[test]
fn the_bounds_themselves_are_allowed() {
    for (pointer, value) in [
        ("/hyperparameters/steps", json!(10_000_000)),
        ("/hyperparameters/epochs", json!(1000)),
        ("/hyperparameters/batch_size", json!(65_536)),
        ("/hyperparameters/max_attempts", json!(100)),
        ("/hyperparameters/optimizer", Value::Null),
        ("/hyperparameters/schedule", json!({"type": "constant", "peak": 1})),
        ("/hyperparameters/schedule", json!({"floor": 1e-3})),
        ("/validation", json!({"fraction": 0.5})),
        ("/metadata", json!({"a": "x"})),
    ] {
        parse(with(pretrain(), pointer, value));
    }
    let rotary = with(with(pretrain(), "/model/positions", json!("rotary")), "/model/rope_theta", json!(500_000));
    assert_eq!(shape(rotary).rope_theta, 500_000.0);
}

#[test]
fn contradictions_are_a_422() {
    let hyper = |value: Value| with(pretrain(), "/hyperparameters", value);
    assert_eq!(contradiction(hyper(json!({"steps": 1, "epochs": 1}))), "hyperparameters.epochs");
    assert_eq!(contradiction(hyper(json!({"batch_size": 12, "micro_batch_size": 5}))), "hyperparameters.micro_batch_size");
    assert_eq!(contradiction(hyper(json!({"schedule": {"peak": 1e-3, "floor": 1e-2}}))), "hyperparameters.schedule.floor");
    assert_eq!(
        contradiction(hyper(json!({"steps": 10, "schedule": {"warmup_steps": 11}}))),
        "hyperparameters.schedule.warmup_steps"
    );
    assert_eq!(contradiction(hyper(json!({"sample_every": 10}))), "hyperparameters.sample_every");
    assert_eq!(contradiction(hyper(json!({"evaluate_every": 10}))), "hyperparameters.evaluate_every");
    assert_eq!(contradiction(with(pretrain(), "/model/kv_heads", json!(3))), "model.kv_heads");
    assert_eq!(contradiction(with(pretrain(), "/model/width", json!(130))), "model.width");
    let odd = json!({"architecture": "gpt", "layers": 1, "heads": 2, "width": 6, "context": 8, "positions": "rotary"});
    assert_eq!(contradiction(with(pretrain(), "/model", odd)), "model.positions");
}

#[test]
fn the_examples_of_the_document_are_valid() {
    let mut schemas = Vec::new();
    <TrainBody as utoipa::ToSchema>::schemas(&mut schemas);
    let examples: Vec<Value> = schemas
        .iter()
        .filter(|(name, _)| name == "PretrainBody" || name == "InstructionBody")
        .map(|(_, schema)| serde_json::to_value(schema).unwrap()["example"].clone())
        .collect();
    assert_eq!(examples.len(), 2);
    for example in examples {
        parse(example);
    }
}
