//! The demo on its built-in tasks: datasets by rule, training, and an honest score.
//!
//! The score is that of greedy answers to rows that were never trained on: by a family's key, no
//! held-out row's variables occur together in a training row, whatever the wording. Beside it stand
//! the scores of the pretrained model before tuning and of each family's commonest answer.

use futures_util::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    DemoError, Outcome,
    client::{Client, ClientError},
    display::{Stage, say},
    families::{self, Family},
    score::{Question, Score, commonest_answer, exact_match},
    stream_answers,
    training::{make, train},
};

/// The least score in all, in percent, and of any one family.
pub const WANTED: f64 = 95.0;
const WANTED_OF_A_FAMILY: f64 = 85.0;

/// The most that the pretrained model, or always one answer, may score.
const BASELINE_LIMIT: f64 = 10.0;

/// Longer than every expected answer, and with the longest question within the context.
const MAX_TOKENS: u32 = 24;

const TRAIN_ROWS: u64 = 36_000;
const HELD_OUT_ROWS: u64 = 1_080;
const VOCABULARY: u64 = 1_024;
const PRETRAIN_STEPS: u64 = 150;
const TUNE_STEPS: u64 = 4_000;

/// Questions that are asked at the same time.
const CONCURRENCY: usize = 32;

/// Rows of one page.
const PAGE: u64 = 100;

/// The data and the weights follow from `seed`, which is at least 1.
pub async fn run(client: &Client, seed: u64) -> Result<Outcome, DemoError> {
    let families = families::load()?;
    let mut stage = Stage::begin("Datasets by rule");
    let held_out = make(
        client,
        &mut stage,
        "/v1/datasets",
        &families::dataset("demo held out", &families, HELD_OUT_ROWS, 2 * seed - 1, &[]),
    )
    .await?;
    let train_set =
        make(client, &mut stage, "/v1/datasets", &families::dataset("demo train", &families, TRAIN_ROWS, 2 * seed, &[&held_out]))
            .await?;
    let questions = questions(client, &families, &held_out).await?;
    stage.finish(&format!("{TRAIN_ROWS} rows to learn from, {} held out, {} families", questions.len(), families.len()));

    let mut stage = Stage::begin("Training a tokenizer");
    let tokenizer = make(client, &mut stage, "/v1/tokenizers", &tokenizer_body("demo", &train_set, VOCABULARY)).await?;
    stage.finish(&format!("{VOCABULARY} tokens of byte-level BPE"));

    let pretrained = train(client, "Pretraining a GPT", &pretrain_body(&train_set, &tokenizer, seed)).await?;
    let tuned = train(client, "Tuning to instructions", &tune_body(&train_set, &pretrained.model, seed)).await?;

    let before = ask("Asking it untuned", &questions, |question| {
        let prompt = format!("{}\n", question.instruction);
        let model = &pretrained.model;
        async move { Ok(client.complete_line(model, &prompt, MAX_TOKENS).await?.trim().to_owned()) }
    })
    .await?;
    let after =
        ask("Asking it tuned", &questions, |question| client.chat(&tuned.model, &question.instruction, MAX_TOKENS)).await?;

    let before = exact_match(families.len(), questions.iter().zip(before.iter().map(String::as_str)));
    let score = exact_match(families.len(), questions.iter().zip(after.iter().map(String::as_str)));
    let commonest = commonest_answer(families.len(), &questions);
    show_scores(&families, &score, &before, &commonest);
    check(&families, &score, &before, &commonest)?;

    let shown = examples(&questions);
    stream_answers(client, tuned.model, &shown, MAX_TOKENS).await
}

pub fn tokenizer_body(name: &str, dataset: &str, vocabulary: u64) -> Value {
    json!({"name": name, "type": "bpe", "dataset": dataset, "vocab_size": vocabulary})
}

fn pretrain_body(dataset: &str, tokenizer: &str, seed: u64) -> Value {
    json!({
        "name": "demo pretraining", "method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64},
        "dataset": dataset, "tokenizer": tokenizer, "hyperparameters": hyperparameters(PRETRAIN_STEPS, 32, seed)
    })
}

fn tune_body(dataset: &str, base_model: &str, seed: u64) -> Value {
    json!({
        "name": "demo tuning", "method": {"type": "instruction", "template": "ins"},
        "base_model": base_model, "dataset": dataset, "hyperparameters": hyperparameters(TUNE_STEPS, 12, seed)
    })
}

/// `batch_size` counts sequences of 64 tokens, of which each holds two or three rows.
fn hyperparameters(steps: u64, batch_size: u64, seed: u64) -> Value {
    json!({
        "steps": steps, "batch_size": batch_size, "seed": seed,
        "schedule": {"type": "cosine", "peak": 3e-3, "warmup_steps": steps / 20, "floor": 1.5e-4},
        "keep_checkpoints": 1
    })
}

/// All rows of the held-out dataset.
async fn questions(client: &Client, families: &[Family], dataset: &str) -> Result<Vec<Question>, DemoError> {
    #[derive(Deserialize)]
    struct Turn {
        instruction: String,
        output: String,
    }
    #[derive(Deserialize)]
    struct Row {
        index: u64,
        turns: Vec<Turn>,
    }
    #[derive(Deserialize)]
    struct Rows {
        data: Vec<Row>,
        has_more: bool,
    }
    let mut questions = Vec::new();
    let mut page: Rows = client.get(&format!("/v1/datasets/{dataset}/rows?limit={PAGE}")).await?;
    loop {
        let last = page.data.last().map(|row| row.index);
        for turn in page.data.into_iter().flat_map(|row| row.turns) {
            let family = families::recognise(families, &turn.instruction)
                .ok_or_else(|| DemoError::UnknownFamily(turn.instruction.clone()))?;
            questions.push(Question { family, instruction: turn.instruction, expected: turn.output });
        }
        let (true, Some(last)) = (page.has_more, last) else { return Ok(questions) };
        page = client.get(&format!("/v1/datasets/{dataset}/rows?limit={PAGE}&after={last}")).await?;
    }
}

/// The answers to all questions, in their order, [`CONCURRENCY`] at a time.
async fn ask<'a, F>(
    title: &'static str,
    questions: &'a [Question],
    answer: impl Fn(&'a Question) -> F,
) -> Result<Vec<String>, DemoError>
where
    F: Future<Output = Result<String, ClientError>>,
{
    let mut stage = Stage::begin(title);
    let mut answers = futures_util::stream::iter(questions).map(answer).buffered(CONCURRENCY);
    let mut all = Vec::with_capacity(questions.len());
    while let Some(answer) = answers.try_next().await? {
        all.push(answer);
        stage.progress(all.len() as u64, Some(questions.len() as u64), "answers");
    }
    stage.finish(&format!("{} held-out questions, {CONCURRENCY} at a time", all.len()));
    Ok(all)
}

/// The table of scores; the score in all is its last line.
fn show_scores(families: &[Family], score: &Score, before: &Score, commonest: &Score) {
    say(&format!("\n{:<18}{:>9}{:>10}{:>18}", "exact match", "tuned", "untuned", "commonest answer"));
    for (index, family) in families.iter().enumerate() {
        let percent = |score: &Score| format!("{:.1} %", score.families[index].percent());
        say(&format!("{:<18}{:>9}{:>10}{:>18}", family.name, percent(score), percent(before), percent(commonest)));
    }
    say(&format!(
        "{:<18}{:>9}{:>10}{:>18}",
        "in all",
        "",
        format!("{:.1} %", before.all.percent()),
        format!("{:.1} %", commonest.all.percent())
    ));
    say(&format!("exact match {:.1} %", score.all.percent()));
}

fn check(families: &[Family], score: &Score, before: &Score, commonest: &Score) -> Result<(), DemoError> {
    for (baseline, measured) in [("the pretrained model", before), ("always giving the commonest answer", commonest)] {
        let got = measured.all.percent();
        if got > BASELINE_LIMIT {
            return Err(DemoError::TooEasy { baseline, got, allowed: BASELINE_LIMIT });
        }
    }
    let got = score.all.percent();
    if got < WANTED {
        return Err(DemoError::ScoreTooLow { of: "in all".to_owned(), got, wanted: WANTED });
    }
    let lowest = families.iter().zip(&score.families).min_by(|(_, a), (_, b)| a.percent().total_cmp(&b.percent()));
    match lowest {
        Some((family, tally)) if tally.percent() < WANTED_OF_A_FAMILY => Err(DemoError::ScoreTooLow {
            of: format!("in the family “{}”", family.name),
            got: tally.percent(),
            wanted: WANTED_OF_A_FAMILY,
        }),
        _ => Ok(()),
    }
}

/// One question of each of three families that are far apart.
fn examples(questions: &[Question]) -> Vec<(String, String)> {
    let families = questions.iter().map(|question| question.family + 1).max().unwrap_or(0);
    let wanted = [0, families / 2, families.saturating_sub(2)];
    let first = |family: usize| questions.iter().find(|question| question.family == family);
    wanted.into_iter().filter_map(first).map(|question| (question.instruction.clone(), question.expected.clone())).collect()
}
