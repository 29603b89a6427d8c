//! The engine as its clients see it, on small models with random weights.

use std::sync::mpsc::{Receiver, channel};

use tch::{Device, Kind, Tensor};

use super::*;
use crate::{
    config::{Activation, Architecture, Norm, Positions},
    data::rows::{Row, Writer},
    nn::{AttentionPlan, Parameters},
    tokenizer,
};

const VOCABULARY: usize = 97;
const EOS: u32 = 1;
const NEVER: [u32; 3] = [0, 2, 3];

fn shape(positions: Positions, kv_heads: i64) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Gpt,
        layers: 2,
        heads: 4,
        kv_heads,
        head_dim: 8,
        width: 32,
        mlp_width: 64,
        context: 96,
        vocabulary: VOCABULARY as i64,
        positions,
        norm: Norm::Layer,
        norm_eps: 1e-5,
        activation: Activation::Gelu,
        bias: true,
        tie_embeddings: false,
        dropout: 0.1,
        rope_theta: 10_000.0,
    }
}

/// Weights wide enough that attention and the choice of tokens are far from uniform.
fn model(shape: &ModelConfig) -> Model {
    let mut parameters = Parameters::trainable(Device::Cpu, 5);
    let model = Model::new(shape, &mut parameters);
    let _no_grad = tch::no_grad_guard();
    for entry in parameters.entries().iter().filter(|entry| entry.is_matrix()) {
        let mut tensor = entry.tensor.shallow_clone();
        let _ = tensor.g_mul_scalar_(12.0);
    }
    model
}

fn config() -> EngineConfig {
    EngineConfig { threads: Some(1), prefill_chunk: 8, max_sequences: 32, ..EngineConfig::default() }
}

fn start(shape: &ModelConfig, config: &EngineConfig) -> EngineHandle {
    tch::set_num_threads(1);
    Engine::spawn(model(shape), shape.clone(), NEVER.to_vec(), config).unwrap()
}

/// A prompt of its own for each sequence, of lengths 1 to 29.
fn generation(index: usize, temperature: f64) -> Generation {
    let prompt = (0..1 + (index * 5) % 29).map(|at| (4 + (index * 31 + at * 17 + at * at) % (VOCABULARY - 4)) as u32).collect();
    let sampling =
        Sampling { temperature, top_p: 0.95, top_k: 0, seed: index as u64, max_tokens: 20 + index as i64 % 9, logprobs: Some(2) };
    Generation { prompt, sampling, stop_tokens: vec![EOS], prompt_logprobs: None }
}

fn submit(engine: &EngineHandle, generation: Generation) -> (Ticket, Receiver<Event>) {
    let (sender, receiver) = channel();
    (engine.submit(generation, Box::new(move |event| sender.send(event).is_ok())).unwrap(), receiver)
}

#[derive(Debug, Default, PartialEq)]
struct Answer {
    scores: Vec<Sampled>,
    tokens: Vec<Sampled>,
    finish: Option<Finish>,
}

impl Answer {
    fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|sampled| sampled.token).collect()
    }
}

fn collect((ticket, events): (Ticket, Receiver<Event>)) -> Answer {
    let mut answer = Answer::default();
    for event in events {
        match event {
            Event::Prompt(scores) => answer.scores = scores,
            Event::Token(sampled) => answer.tokens.push(sampled),
            Event::Finished { reason, completion_tokens, .. } => {
                assert_eq!(completion_tokens, answer.tokens.len());
                answer.finish = Some(reason);
                break;
            }
        }
    }
    drop(ticket);
    answer
}

/// Log probabilities of every position by one forward pass over the whole sequence.
fn whole(shape: &ModelConfig, ids: &[u32]) -> Vec<Vec<f32>> {
    let _no_grad = tch::no_grad_guard();
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let tokens_bt = Tensor::from_slice(&ids).unsqueeze(0);
    let positions_bt = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let logits = model(shape).forward(&tokens_bt, &positions_bt, &mut AttentionPlan::Causal).squeeze_dim(0);
    (0..ids.len() as i64).map(|row| Vec::try_from(logits.get(row).log_softmax(-1, Kind::Float)).unwrap()).collect()
}

#[test]
fn decoding_with_the_cache_equals_the_whole_forward_pass() {
    for shape in [shape(Positions::Learned, 4), shape(Positions::Rotary, 2), shape(Positions::Rotary, 1)] {
        let engine = start(&shape, &config());
        let generation = Generation { prompt_logprobs: Some(1), stop_tokens: vec![], ..generation(5, 0.0) };
        let prompt = generation.prompt.clone();
        assert!(prompt.len() > 2 * config().prefill_chunk, "several chunks");
        let answer = collect(submit(&engine, generation));
        assert_eq!((answer.tokens.len(), answer.finish), (25, Some(Finish::Length)));
        let expected = whole(&shape, &[prompt.clone(), answer.ids()].concat());
        assert_eq!(answer.scores.len(), prompt.len() - 1);
        for (position, sampled) in answer.scores.iter().chain(&answer.tokens).enumerate() {
            let row = &expected[position];
            assert!((sampled.logprob.unwrap() - row[sampled.token as usize]).abs() < 1e-4);
            for &(id, logprob) in &sampled.top {
                assert!((logprob - row[id as usize]).abs() < 1e-4);
            }
        }
        for (sampled, row) in answer.tokens.iter().zip(&expected[prompt.len() - 1..]) {
            let allowed = (0..VOCABULARY as u32).filter(|id| !NEVER.contains(id));
            let best = allowed.map(|id| row[id as usize]).fold(f32::NEG_INFINITY, f32::max);
            assert!(row[sampled.token as usize] > best - 1e-4, "greedy takes the likeliest");
        }
    }
}

#[test]
fn streams_together_equal_the_same_one_by_one() {
    let shape = shape(Positions::Rotary, 2);
    for temperature in [0.0, 1.0] {
        let engine = start(&shape, &config());
        let alone: Vec<Answer> = (0..32).map(|index| collect(submit(&engine, generation(index, temperature)))).collect();
        let open: Vec<_> = (0..32).map(|index| submit(&engine, generation(index, temperature))).collect();
        let together: Vec<Answer> = open.into_iter().map(collect).collect();
        let mut tokens = 0;
        for (alone, together) in alone.iter().zip(&together) {
            for (a, b) in alone.tokens.iter().zip(&together.tokens) {
                if a.token != b.token {
                    // Rounding decides only between neighbours that are as likely.
                    assert!(temperature > 0.0 || (a.logprob.unwrap() - b.logprob.unwrap()).abs() < 1e-4);
                    break;
                }
                assert!((a.logprob.unwrap() - b.logprob.unwrap()).abs() < 1e-4);
                tokens += 1;
            }
        }
        assert!(tokens > 500, "{tokens} tokens were compared");
    }
}

#[test]
fn deterministic_decoding_is_the_same_to_the_bit() {
    let shape = shape(Positions::Learned, 2);
    let engine = start(&shape, &EngineConfig { deterministic_decode: true, ..config() });
    let alone: Vec<Answer> = (0..32).map(|index| collect(submit(&engine, generation(index, 0.8)))).collect();
    let open: Vec<_> = (0..32).rev().map(|index| submit(&engine, generation(index, 0.8))).collect();
    let mut together: Vec<Answer> = open.into_iter().map(collect).collect();
    together.reverse();
    assert_eq!(alone, together);
}

#[test]
fn what_is_gone_makes_room_at_once() {
    let shape = shape(Positions::Learned, 4);
    let engine = start(&shape, &EngineConfig { max_sequences: 1, max_waiting: 1, ..config() });
    let endless = || Generation {
        stop_tokens: vec![],
        sampling: Sampling { max_tokens: 90, ..generation(0, 1.0).sampling },
        ..generation(0, 1.0)
    };
    let (gate, opened) = channel::<()>();
    let (entered, entry) = channel();
    let (running, events) = {
        let (sender, receiver) = channel();
        let sink = move |event| {
            // Holds the engine in its first step until the queue has been looked at.
            let _ = entered.send(());
            let _ = opened.recv();
            sender.send(event).is_ok()
        };
        (engine.submit(endless(), Box::new(sink)).unwrap(), receiver)
    };
    entry.recv().unwrap();
    let waiting = submit(&engine, endless());
    let refused = engine.submit(endless(), Box::new(|_| true)).unwrap_err();
    assert_eq!(refused, SubmitError::Refused(Refusal::QueueFull { waiting: 1 }));
    // An explicit cancel: the step in progress ends, no other follows.
    drop(running);
    drop(gate);
    let heard: Vec<Event> = events.iter().collect();
    assert!(
        matches!(heard[..], [Event::Token(_), Event::Finished { reason: Finish::Cancelled, completion_tokens: 1, .. }]),
        "{heard:?}"
    );
    // A client that hangs up: the sink says so.
    let (ticket, events) = waiting;
    assert!(matches!(events.recv().unwrap(), Event::Token(_)));
    drop(events);
    let third = collect(submit(&engine, endless()));
    assert_eq!(third.tokens.len(), 90);
    drop(ticket);
}

#[test]
fn answers_end_where_they_should() {
    let shape = shape(Positions::Learned, 4);
    let engine = start(&shape, &config());
    let free = Generation { stop_tokens: vec![], ..generation(3, 0.0) };
    let answer = collect(submit(&engine, free.clone()));
    let stop = answer.ids()[4];
    let first = answer.ids().iter().position(|&id| id == stop).unwrap();
    let stopped = collect(submit(&engine, Generation { stop_tokens: vec![stop], ..free.clone() }));
    assert_eq!(stopped.ids(), answer.ids()[..first]);
    assert_eq!(stopped.finish, Some(Finish::Stop));
    let to_the_context = Generation { sampling: Sampling { max_tokens: i64::MAX, ..free.sampling.clone() }, ..free.clone() };
    assert_eq!(collect(submit(&engine, to_the_context)).tokens.len(), 96 - free.prompt.len());
    let scored =
        Generation { sampling: Sampling { max_tokens: 0, ..free.sampling.clone() }, prompt_logprobs: Some(0), ..free.clone() };
    let scored = collect(submit(&engine, scored));
    assert_eq!((scored.scores.len(), scored.tokens.len(), scored.finish), (free.prompt.len() - 1, 0, Some(Finish::Length)));
    assert!(answer.ids().iter().all(|id| !NEVER.contains(id)));
}

#[test]
fn bad_requests_are_refused_with_both_numbers() {
    let engine = start(&shape(Positions::Learned, 4), &config());
    let try_prompt =
        |prompt: Vec<u32>| engine.submit(Generation { prompt, ..generation(0, 0.0) }, Box::new(|_| true)).unwrap_err();
    assert_eq!(try_prompt(vec![]), SubmitError::Refused(Refusal::EmptyPrompt));
    assert_eq!(try_prompt(vec![4; 200]), SubmitError::Refused(Refusal::PromptTooLong { prompt: 200, context: 96 }));
    assert_eq!(try_prompt(vec![4, 97]), SubmitError::UnknownToken { index: 1, id: 97, vocabulary: VOCABULARY });
    assert_eq!(engine.load().open, 0);
    let small = EngineConfig { deterministic_decode: true, cache_bytes: 1000, ..config() };
    let shape = shape(Positions::Learned, 4);
    assert!(matches!(
        Engine::spawn(model(&shape), shape.clone(), vec![], &small),
        Err(StartError::CacheTooSmall { allowed: 1000, .. })
    ));
}

#[test]
fn a_broken_sequence_harms_no_other() {
    let shape = shape(Positions::Learned, 4);
    let mut parameters = Parameters::trainable(Device::Cpu, 5);
    let gpt = Model::new(&shape, &mut parameters);
    let poison: u32 = 50;
    {
        let _no_grad = tch::no_grad_guard();
        let embedding = &parameters.pieces().find(|(piece, _)| piece.name == "embedding.weight").unwrap().1.tensor;
        let _ = embedding.get(i64::from(poison)).fill_(f64::NAN);
    }
    let never = (0..VOCABULARY as u32).filter(|&id| id == poison).collect();
    let engine = Engine::spawn(gpt, shape, never, &EngineConfig { max_sequences: 2, ..config() }).unwrap();
    let good = || Generation { prompt: vec![5, 6, 7], stop_tokens: vec![], ..generation(1, 0.0) };
    let before = collect(submit(&engine, good()));
    let neighbour = submit(&engine, good());
    let broken = collect(submit(&engine, Generation { prompt: vec![poison; 20], ..good() }));
    assert_eq!((broken.finish, broken.tokens.len()), (Some(Finish::Error), 0));
    let (neighbour, after) = (collect(neighbour), collect(submit(&engine, good())));
    for answer in [neighbour, after] {
        assert_eq!(answer.ids(), before.ids());
    }
    assert!(engine.is_alive());
}

/// A folder as training writes it, with a tokenizer of bytes alone.
fn folder(shape: &ModelConfig) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::create(&folder.path().join("dataset")).unwrap();
    writer.push(&Row::Text { text: "a".into() }).unwrap();
    writer.finish().unwrap();
    tokenizer::train(&folder.path().join("dataset"), tokenizer::MIN_VOCABULARY, folder.path()).unwrap();
    let mut parameters = Parameters::trainable(Device::Cpu, 5);
    Model::new(shape, &mut parameters);
    let weights: Vec<(&str, Tensor)> = parameters.logical().into_iter().collect();
    Tensor::write_safetensors(&weights, folder.path().join("weights.safetensors")).unwrap();
    std::fs::write(folder.path().join("config.json"), serde_json::json!({"model": shape}).to_string()).unwrap();
    folder
}

#[test]
fn a_model_starts_from_its_folder() {
    let shape = ModelConfig { vocabulary: tokenizer::MIN_VOCABULARY, ..shape(Positions::Learned, 4) };
    let folder = folder(&shape);
    for dtype in [Dtype::Fp32, Dtype::Bf16] {
        let engine = Engine::start(folder.path(), EngineConfig { dtype, ..config() }).unwrap();
        let answer = collect(submit(&engine, Generation { stop_tokens: vec![], ..generation(5, 1.0) }));
        assert_eq!((answer.tokens.len(), answer.finish), (25, Some(Finish::Length)));
        assert!(answer.ids().iter().all(|&id| id == EOS || id >= 16), "a reserved token was said");
    }
    let other = ModelConfig { vocabulary: 300, ..shape };
    std::fs::write(folder.path().join("config.json"), serde_json::json!({"model": other}).to_string()).unwrap();
    let Err(StartError::Model(reason)) = Engine::start(folder.path(), config()) else { panic!("it started") };
    assert!(reason.contains("272") && reason.contains("300"), "{reason}");
    assert!(matches!(Engine::start(&folder.path().join("none"), config()), Err(StartError::Io(_))));
}

#[test]
fn the_engine_ends_with_its_last_handle() {
    let engine = start(&shape(Positions::Learned, 4), &config());
    let endless = Generation {
        stop_tokens: vec![],
        sampling: Sampling { max_tokens: 90, ..generation(0, 1.0).sampling },
        ..generation(0, 1.0)
    };
    let open = submit(&engine, endless);
    engine.stop();
    assert_eq!(collect(open).finish, Some(Finish::Cancelled));
    let shared = std::sync::Arc::downgrade(&engine.shared);
    drop(engine);
    // The thread holds the last reference until it has ended.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while shared.upgrade().is_some() {
        assert!(std::time::Instant::now() < deadline, "the engine's thread did not end");
        std::thread::yield_now();
    }
}
