//! `lathe demo`: a newcomer's first run, from nothing to a model that answers.
//!
//! It starts `lathe serve` and is from then on an ordinary client of the HTTP API, never a way
//! around it. The flow, in [`tasks`] for the built-in tasks and in [`own_files`] for the user's:
//!
//! 1. datasets;
//! 2. a tokenizer;
//! 3. a GPT pretrained;
//! 4. the same model tuned to instructions;
//! 5. its answers scored (built-in tasks only);
//! 6. three answers streamed; then it serves on until it is stopped.
//!
//! Every training runs for a fixed number of steps, so a slow machine shows the same model later.
//! A stage that fails, or a score under [`tasks::WANTED`], ends the run with an error.

mod client;
mod display;
mod families;
mod own_files;
mod score;
mod server;
mod tasks;
mod training;

use std::{path::PathBuf, pin::pin, process::ExitStatus};

use futures_util::StreamExt;

use self::{
    client::{Client, ClientError, chat_body},
    display::{Stage, piece, say},
    server::Server,
};
use crate::config::DemoConfig;

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(
        "port {port} is in use, so the demo cannot start a server there: stop what listens on it, or choose another address with --listen"
    )]
    PortTaken { port: u16 },
    #[error("the server was not ready within {seconds} seconds; its log is {}", .log.display())]
    NotReady { seconds: u64, log: PathBuf },
    #[error("the server ended ({status}): {last}; its log is {}", .log.display())]
    ServerEnded { status: ExitStatus, last: String, log: PathBuf },
    #[error("the server's key cannot be read from {}: {source}; set LATHE_API_KEY to choose one", .file.display())]
    NoKey { file: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{what} failed: {message}")]
    Failed { what: String, message: String },
    #[error("{phase} did not lower the loss: it went from {first:.3} to {last:.3}")]
    LossRose { phase: &'static str, first: f64, last: f64 },
    #[error(
        "{baseline} answers {got:.1} % of the held-out questions, and at most {allowed:.0} % would show that the tasks have to be learned"
    )]
    TooEasy { baseline: &'static str, got: f64, allowed: f64 },
    #[error("the tuned model answers too few held-out questions: {got:.1} % {of}, where {wanted:.0} % were expected")]
    ScoreTooLow { of: String, got: f64, wanted: f64 },
    #[error("a held-out row is of no known family: {0}")]
    UnknownFamily(String),
    #[error("the demo's families cannot be read: {0}")]
    Families(#[from] serde_json::Error),
    #[error("the HTTP client cannot be built: {0}")]
    Http(#[from] reqwest::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What the last part of a run shows.
struct Outcome {
    /// The tuned model's id.
    model: String,
    /// A question that it can be asked.
    question: String,
    /// Room for an answer, as the streamed ones had.
    max_tokens: u32,
}

/// Runs the demo and goes on serving until `shutdown`.
pub async fn run(config: DemoConfig, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), DemoError> {
    let mut shutdown = pin!(shutdown);
    let stage = Stage::begin("Starting the server");
    let mut server = tokio::select! {
        server = Server::start(&config.serve) => server?,
        () = &mut shutdown => return Ok(()),
    };
    stage.finish(&server.base);
    let client = Client::new(server.base.clone(), server.key.clone())?;
    let outcome = tokio::select! {
        outcome = show(&client, &config) => outcome,
        error = server.end() => return Err(error),
        () = &mut shutdown => return server.stop().await,
    };
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            server.stop().await?;
            return Err(error);
        }
    };
    say(&invitation(&server.base, &server.key, &outcome));
    tokio::select! {
        error = server.end() => Err(error),
        () = shutdown => server.stop().await,
    }
}

async fn show(client: &Client, config: &DemoConfig) -> Result<Outcome, DemoError> {
    match (&config.corpus, &config.instructions) {
        (Some(corpus), Some(instructions)) => own_files::run(client, corpus, instructions, config.seed).await,
        _ => tasks::run(client, config.seed).await,
    }
}

/// How to go on from here.
fn invitation(base: &str, key: &str, outcome: &Outcome) -> String {
    let body = quoted(&chat_body(&outcome.model, &outcome.question, outcome.max_tokens).to_string());
    format!(
        "\nServing until Ctrl-C.\n  address  {base}/v1\n  key      {key}\n  docs     {base}/docs\n\nTry it:\n  \
         curl {base}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n    -d '{body}'"
    )
}

/// For single quotes in a shell.
fn quoted(text: &str) -> String {
    text.replace('\'', r"'\''")
}

/// Shows questions and their answers as they are made; the first may be asked again.
async fn stream_answers(
    client: &Client,
    model: String,
    questions: &[(String, String)],
    max_tokens: u32,
) -> Result<Outcome, DemoError> {
    for (question, expected) in questions {
        say(&format!("\n  > {}", question.replace('\n', "\n    ")));
        piece("    ");
        let mut answer = client.chat_stream(&model, question, max_tokens).await?;
        let mut whole = String::new();
        while let Some(text) = answer.next().await.transpose()? {
            piece(&text.replace('\n', "\n    "));
            whole.push_str(&text);
        }
        let verdict =
            if whole == *expected { String::new() } else { format!("\n    (expected: {})", expected.replace('\n', "\n    ")) };
        say(&verdict);
    }
    Ok(Outcome { model, question: questions.first().map(|(question, _)| question.clone()).unwrap_or_default(), max_tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curl_line_asks_what_was_asked() {
        let outcome = Outcome { model: "m".into(), question: "What's up".into(), max_tokens: 80 };
        let text = invitation("http://a", "k", &outcome);
        let body = text.rsplit_once("-d '").and_then(|(_, rest)| rest.strip_suffix('\'')).unwrap();
        let body: serde_json::Value = serde_json::from_str(&body.replace(r"'\''", "'")).unwrap();
        assert_eq!(body, chat_body("m", "What's up", 80));
        assert!(text.contains(r"What'\''s up"), "a quote survives the shell: {text}");
    }
}
