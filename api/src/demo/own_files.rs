//! The demo on a user's own corpus and instructions: there the loss has to fall, no more.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    DemoError, Outcome,
    client::{Client, List},
    display::Stage,
    stream_answers,
    tasks::tokenizer_body,
    training::{Trained, make, train},
};

const VOCABULARY: u64 = 1_024;
const CONTEXT: u64 = 256;
const PRETRAIN_STEPS: u64 = 500;
const TUNE_STEPS: u64 = 400;
const MAX_TOKENS: u32 = 80;

pub async fn run(client: &Client, corpus: &Path, instructions: &Path, seed: u64) -> Result<Outcome, DemoError> {
    let mut stage = Stage::begin("Datasets from files");
    let corpus = dataset(client, &mut stage, "corpus", corpus).await?;
    let instructions = dataset(client, &mut stage, "instructions", instructions).await?;
    stage.finish("a corpus and instructions");

    let mut stage = Stage::begin("Training a tokenizer");
    let tokenizer = make(client, &mut stage, "/v1/tokenizers", &tokenizer_body("corpus", &corpus, VOCABULARY)).await?;
    stage.finish(&format!("{VOCABULARY} tokens of byte-level BPE"));

    let body = json!({
        "name": "pretraining on a corpus", "method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": CONTEXT},
        "dataset": corpus, "tokenizer": tokenizer, "validation": {"fraction": 0.05}, "hyperparameters": hyperparameters(PRETRAIN_STEPS, 2e-3, seed)
    });
    let pretrained = fallen("pretraining", train(client, "Pretraining a GPT", &body).await?)?;
    let body = json!({
        "name": "tuning on instructions", "method": {"type": "instruction", "template": "ins"},
        "base_model": pretrained.model, "dataset": instructions, "validation": {"fraction": 0.05}, "hyperparameters": hyperparameters(TUNE_STEPS, 1e-3, seed)
    });
    let tuned = fallen("tuning", train(client, "Tuning to instructions", &body).await?)?;

    let questions = first_questions(client, &instructions).await?;
    stream_answers(client, tuned.model, &questions, MAX_TOKENS).await
}

async fn dataset(client: &Client, stage: &mut Stage, name: &str, path: &Path) -> Result<String, DemoError> {
    let file = client.upload(path).await?;
    make(client, stage, "/v1/datasets", &json!({"name": name, "source": {"type": "files", "files": [file]}})).await
}

fn hyperparameters(steps: u64, peak: f64, seed: u64) -> Value {
    json!({
        "steps": steps, "batch_size": 8, "seed": seed,
        "schedule": {"type": "cosine", "peak": peak, "warmup_steps": steps / 20, "floor": peak / 10.0},
        "evaluate_every": steps / 4, "keep_checkpoints": 1
    })
}

fn fallen(phase: &'static str, trained: Trained) -> Result<Trained, DemoError> {
    if trained.last_loss < trained.first_loss {
        return Ok(trained);
    }
    Err(DemoError::LossRose { phase, first: trained.first_loss, last: trained.last_loss })
}

/// Three instructions with the answers that the file gives.
async fn first_questions(client: &Client, dataset: &str) -> Result<Vec<(String, String)>, DemoError> {
    let rows: List<Value> = client.get(&format!("/v1/datasets/{dataset}/rows?limit=3")).await?;
    let text = |turn: &Value, field: &str| turn[field].as_str().unwrap_or_default().to_owned();
    let questions = rows.data.iter().map(|row| &row["turns"][0]).map(|turn| {
        let (instruction, input) = (text(turn, "instruction"), text(turn, "input"));
        let question = if input.is_empty() { instruction } else { format!("{instruction}\n{input}") };
        (question, text(turn, "output"))
    });
    Ok(questions.filter(|(question, _)| !question.is_empty()).collect())
}
