use tch::{Device, IndexOp, Kind, Tensor};

use super::*;
use crate::{
    arch::Model,
    config::Architecture,
    nn::{AttentionPlan, Dropout},
};

fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Gpt,
        layers: 2,
        heads: 4,
        kv_heads: 4,
        head_dim: 8,
        width: 32,
        mlp_width: 64,
        context: 24,
        vocabulary: 70,
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

/// Every combination of what the architecture offers.
fn variants() -> Vec<ModelConfig> {
    let mut variants = Vec::new();
    for bits in 0..64 {
        let bit = |place: u32| bits >> place & 1 == 1;
        let mut config = config();
        config.positions = if bit(0) { Positions::Rotary } else { Positions::Learned };
        config.norm = if bit(1) { Norm::Rms } else { Norm::Layer };
        config.activation = if bit(2) { Activation::Swiglu } else { Activation::Gelu };
        config.kv_heads = if bit(3) { 2 } else { 4 };
        config.tie_embeddings = bit(4);
        config.bias = bit(5);
        variants.push(config);
    }
    variants
}

fn build(config: &ModelConfig) -> (Model, Parameters) {
    let mut parameters = Parameters::trainable(Device::Cpu, 1);
    let gpt = Model::new(config, &mut parameters);
    (gpt, parameters)
}

fn tokens(rows: i64, length: i64, vocabulary: i64) -> Tensor {
    let ids: Vec<i64> = (0..rows * length).map(|i| (i * i * 31 + i * 7 + 3) % vocabulary).collect();
    Tensor::from_slice(&ids).view([rows, length])
}

fn positions(rows: i64, length: i64) -> Tensor {
    Tensor::arange(length, (Kind::Int64, Device::Cpu)).expand([rows, length], false).contiguous()
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    let difference = (a - b).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{what} differs by {difference}");
}

#[test]
fn counts_agree_with_the_built_model() {
    for config in variants() {
        let (_, parameters) = build(&config);
        assert_eq!(parameters.count(), Model::parameter_count(&config), "{config:?}");
    }
}

#[test]
fn padded_rows_are_zero_and_get_no_gradient() {
    for tied in [true, false] {
        let (gpt, parameters) = build(&ModelConfig { tie_embeddings: tied, ..config() });
        let logits = gpt.forward(&tokens(2, 6, 70), &positions(2, 6), &mut AttentionPlan::Causal);
        assert_eq!(logits.size(), [2, 6, 70]);
        logits.log_softmax(-1, Kind::Float).i((.., .., 0)).sum(Kind::Float).backward();
        for entry in parameters.entries() {
            let last = entry.pieces.last().unwrap();
            let used = last.start + last.numbers();
            let padding = |tensor: &Tensor| {
                tensor.view([-1]).narrow(0, used, tensor.numel() as i64 - used).abs().sum(Kind::Float).double_value(&[])
            };
            assert_eq!(padding(&entry.tensor), 0.0);
            assert_eq!(padding(&entry.tensor.grad()), 0.0);
        }
    }
}

#[test]
fn every_variant_trains_with_finite_loss() {
    for config in variants() {
        let (gpt, parameters) = build(&config);
        let ids = tokens(2, 24, config.vocabulary);
        let mut plan = AttentionPlan::of_documents(24, &[vec![24], vec![3, 20]], Device::Cpu);
        let logits = gpt.forward(&ids, &positions(2, 24), &mut plan);
        let loss = logits.view([-1, config.vocabulary]).cross_entropy_for_logits(&ids.view([-1]));
        loss.backward();
        assert!(loss.double_value(&[]).is_finite());
        for entry in parameters.entries() {
            let norm = entry.tensor.grad().norm().double_value(&[]);
            assert!(norm.is_finite() && norm > 0.0, "{} has gradient norm {norm} in {config:?}", entry.pieces[0].name);
        }
    }
}

/// The model once more in plain tensor operations, from its logical parameters by name.
fn restated(config: &ModelConfig, weights: &std::collections::BTreeMap<String, Tensor>, tokens_t: &Tensor) -> Tensor {
    let w = |name: &str| &weights[name];
    let linear = |x: &Tensor, name: &str| {
        let y = x.matmul(&w(&format!("{name}.weight")).tr());
        weights.get(&format!("{name}.bias")).map_or_else(|| y.shallow_clone(), |bias| &y + bias)
    };
    let norm = |x: &Tensor, name: &str| {
        let centred = match config.norm {
            Norm::Layer => x - x.mean_dim(-1, true, Kind::Double),
            Norm::Rms => x.shallow_clone(),
        };
        let variance = (&centred * &centred).mean_dim(-1, true, Kind::Double);
        let y = centred / (variance + config.norm_eps).sqrt() * w(&format!("{name}.weight"));
        weights.get(&format!("{name}.bias")).map_or_else(|| y.shallow_clone(), |bias| &y + bias)
    };
    let length = tokens_t.size()[0];
    let (d, half) = (config.head_dim, config.head_dim / 2);
    let turn = |x: Tensor| {
        if config.positions == Positions::Learned {
            return x;
        }
        let rows: Vec<Tensor> = (0..length)
            .map(|t| {
                let columns: Vec<Tensor> = (0..d)
                    .map(|i| {
                        let angle = t as f64 / config.rope_theta.powf(2.0 * (i % half) as f64 / d as f64);
                        let other = if i < half { -x.i((t, i + half)) } else { x.i((t, i - half)) };
                        x.i((t, i)) * angle.cos() + other * angle.sin()
                    })
                    .collect();
                Tensor::stack(&columns, 0)
            })
            .collect();
        Tensor::stack(&rows, 0)
    };
    let mut x = w("embedding.weight").index_select(0, tokens_t);
    if config.positions == Positions::Learned {
        x = x + w("positions.weight").narrow(0, 0, length);
    }
    for layer in 0..config.layers {
        let name = |leaf: &str| format!("layers.{layer}.{leaf}");
        let normed = norm(&x, &name("attention_norm"));
        let [q, k, v] = ["q", "k", "v"].map(|leaf| linear(&normed, &name(&format!("attention.{leaf}"))));
        let heads: Vec<Tensor> = (0..config.heads)
            .map(|head| {
                let shared = head / (config.heads / config.kv_heads);
                let (q, k) = (turn(q.narrow(1, head * d, d)), turn(k.narrow(1, shared * d, d)));
                let scores = q.matmul(&k.tr()) / (d as f64).sqrt();
                let future = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).triu(1);
                scores.masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(&v.narrow(1, shared * d, d))
            })
            .collect();
        x = x + linear(&Tensor::cat(&heads, 1), &name("attention.output"));
        let normed = norm(&x, &name("mlp_norm"));
        let up = linear(&normed, &name("mlp.up"));
        let fed = match config.activation {
            Activation::Gelu => {
                let inner = (&up + up.pow_tensor_scalar(3) * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
                &up * 0.5 * (inner.tanh() + 1.0)
            }
            Activation::Swiglu => {
                let gate = linear(&normed, &name("mlp.gate"));
                &gate * gate.sigmoid() * up
            }
        };
        x = x + linear(&fed, &name("mlp.down"));
    }
    let head = if config.tie_embeddings { "embedding.weight" } else { "head.weight" };
    norm(&x, "norm").matmul(&w(head).tr())
}

#[test]
fn forward_loss_and_gradients_agree_with_a_plain_restatement() {
    for config in variants() {
        let (gpt, parameters) = build(&config);
        let mut weights = std::collections::BTreeMap::new();
        for (name, mut view) in parameters.logical() {
            // Away from the initial zeros and ones, so that every parameter matters.
            let mut noise = vec![0f32; view.numel()];
            random_noise(name, &mut noise);
            view += Tensor::from_slice(&noise).view_as(&view);
            weights.insert(name.to_owned(), view.to_kind(Kind::Double).copy().set_requires_grad(true));
        }
        let ids = tokens(1, 9, config.vocabulary);
        let targets = (&ids + 1).remainder(config.vocabulary).view([-1]);
        let logits = gpt.forward(&ids, &positions(1, 9), &mut AttentionPlan::Causal).i(0);
        let expected = restated(&config, &weights, &ids.i(0));
        assert_close(&logits.to_kind(Kind::Double), &expected, 2e-4, "the logits");
        let (loss, expected_loss) = (logits.cross_entropy_for_logits(&targets), expected.cross_entropy_for_logits(&targets));
        loss.backward();
        expected_loss.backward();
        assert!((loss.double_value(&[]) - expected_loss.double_value(&[])).abs() < 1e-5);
        for (piece, entry) in parameters.pieces() {
            let gradient = piece.view(&entry.tensor.grad()).to_kind(Kind::Double);
            assert_close(&gradient, &weights[&piece.name].grad(), 2e-4, &piece.name);
        }
    }
}

fn random_noise(name: &str, values: &mut [f32]) {
    crate::random::normal(99, name, 0.05, 0, values);
}

#[test]
fn packed_documents_equal_the_same_one_by_one() {
    let lengths = [vec![5usize, 1, 12], vec![9, 9], vec![21]];
    for mut config in variants().into_iter().step_by(7) {
        config.vocabulary = 64;
        let (gpt, parameters) = build(&config);
        let ids = tokens(3, 24, 64);
        let packed_positions: Vec<i64> = lengths
            .iter()
            .flat_map(|row| {
                let used: usize = row.iter().sum();
                row.iter().flat_map(|&len| 0..len as i64).chain((0..24 - used).map(|i| i as i64)).collect::<Vec<_>>()
            })
            .collect();
        let mut plan = AttentionPlan::of_documents(24, &lengths, Device::Cpu);
        let packed = gpt.forward(&ids, &Tensor::from_slice(&packed_positions).view([3, 24]), &mut plan);
        let mut alone_loss = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let mut packed_loss = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        for (row, documents) in lengths.iter().enumerate() {
            let mut start = 0;
            for &len in documents {
                let cut = |x: &Tensor| x.i(row as i64).narrow(0, start, len as i64);
                let alone = gpt.forward(&cut(&ids).unsqueeze(0), &positions(1, len as i64), &mut AttentionPlan::Causal).i(0);
                assert_close(&cut(&packed), &alone, 1e-5, "a packed document");
                alone_loss += alone.pow_tensor_scalar(2).sum(Kind::Float);
                packed_loss += cut(&packed).pow_tensor_scalar(2).sum(Kind::Float);
                start += len as i64;
            }
        }
        let gradients = |loss: &Tensor| {
            loss.backward();
            let gradients: Vec<Tensor> = parameters.entries().iter().map(|entry| entry.tensor.grad().copy()).collect();
            parameters.entries().iter().for_each(|entry| entry.tensor.shallow_clone().zero_grad());
            gradients
        };
        for (a, b) in gradients(&alone_loss).iter().zip(gradients(&packed_loss)) {
            assert_close(a, &b, 1e-4, "a gradient");
        }
    }
}

#[test]
fn dropout_depends_on_the_sequence_and_not_on_the_batch() {
    let config = ModelConfig { dropout: 0.3, ..config() };
    let (gpt, _) = build(&config);
    let ids = tokens(4, 10, 70);
    let run = |rows: &[i64], step: u64| {
        let pick = Tensor::from_slice(rows);
        let sequences = rows.iter().map(|&row| row as u64 + 100).collect();
        let dropout = Dropout { probability: config.dropout, seed: 5, step, sequences, part: 0 };
        let mut plan = AttentionPlan::Causal;
        let mut pass = Pass { dropout: Some(&dropout), ..Pass::plain(&mut plan) };
        gpt.hidden(&ids.index_select(0, &pick), &positions(rows.len() as i64, 10), &mut pass)
    };
    let whole = run(&[0, 1, 2, 3], 1);
    assert_close(&whole.i(2..4), &run(&[2, 3], 1), 1e-6, "a sequence");
    assert!((whole.i(0..1) - run(&[0], 2)).abs().max().double_value(&[]) > 1e-3, "another step drops the same");
    let ones = Tensor::ones([4, 10, 32], (Kind::Float, Device::Cpu));
    let dropout = Dropout { probability: 0.3, seed: 5, step: 1, sequences: vec![0, 1, 2, 3], part: 0 };
    let dropped = dropout.apply(&ones, 1, Site::Mlp);
    assert!((dropped.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.06);
    let zeros = dropped.eq(0.0).sum(Kind::Int64).int64_value(&[]) as f64 / 1280.0;
    assert!((zeros - 0.3).abs() < 0.05, "{zeros} dropped");
}
