//! Following what the server makes: resources until they are ready, jobs until they end.

use std::time::Duration;

use serde_json::Value;

use super::{
    DemoError,
    client::{Client, Job, List, Metric, Resource},
    display::{Stage, seconds},
};

/// Time between two looks.
const PERIOD: Duration = Duration::from_millis(250);

/// Rows of the metrics that are averaged at either end of a training.
const AVERAGED: usize = 5;

/// A finished training.
#[derive(Debug)]
pub struct Trained {
    pub model: String,
    pub first_loss: f64,
    pub last_loss: f64,
}

/// Creates a dataset or a tokenizer at `path` and waits until it is ready. Returns its id.
pub async fn make(client: &Client, stage: &mut Stage, path: &str, body: &Value) -> Result<String, DemoError> {
    let mut resource: Resource = client.create(path, body).await?;
    loop {
        match resource.state.as_str() {
            "ready" => return Ok(resource.id),
            "failed" => {
                return Err(DemoError::Failed {
                    what: resource.id,
                    message: resource.error.map(|error| error.message).unwrap_or_default(),
                });
            }
            state => stage.progress(0, None, state),
        }
        tokio::time::sleep(PERIOD).await;
        resource = client.get(&format!("{path}/{}", resource.id)).await?;
    }
}

/// Creates a training job and waits until it has succeeded.
pub async fn train(client: &Client, title: &'static str, body: &Value) -> Result<Trained, DemoError> {
    let mut stage = Stage::begin(title);
    let mut job: Job = client.create("/v1/training/jobs", body).await?;
    let path = format!("/v1/training/jobs/{}", job.id);
    while !matches!(job.state.as_str(), "succeeded" | "failed" | "cancelled") {
        // The bar begins with the first step; before it, `note` says what is prepared.
        stage.progress(job.step, job.steps.filter(|_| job.step > 0), &note(&job));
        tokio::time::sleep(PERIOD).await;
        job = client.get(&path).await?;
    }
    let (Some(model), "succeeded") = (job.model, job.state.as_str()) else {
        return Err(DemoError::Failed {
            what: job.id,
            message: job.error.map_or_else(|| format!("it was {}", job.state), |error| error.message),
        });
    };
    let metrics: List<Metric> = client.get(&format!("{path}/metrics")).await?;
    let steps = metrics.data.last().map_or(0, |row| row.step);
    let losses: Vec<f64> = metrics.data.iter().map(|row| row.loss).collect();
    let (first_loss, last_loss) = ends(&losses);
    let validation_loss = metrics.data.iter().rev().find_map(|row| row.validation_loss);
    let validation = validation_loss.map_or(String::new(), |loss| format!(", {loss:.2} on rows held back"));
    stage.finish(&format!("{steps} steps, loss {first_loss:.2} → {last_loss:.2}{validation}"));
    Ok(Trained { model, first_loss, last_loss })
}

/// Loss, speed and the time that is left, as far as they are known.
fn note(job: &Job) -> String {
    let mut parts = Vec::new();
    match (&job.phase, job.loss) {
        (_, Some(loss)) => parts.push(format!("loss {loss:.3}")),
        (Some(phase), None) => parts.push(phase.clone()),
        (None, None) => parts.push(job.state.clone()),
    }
    parts.extend(job.tokens_per_second.map(|speed| format!("{speed:.0} tokens/s")));
    parts.extend(job.eta_seconds.map(|left| format!("{} left", seconds(left))));
    parts.join(" · ")
}

/// The mean loss of the first and the last few rows.
fn ends(losses: &[f64]) -> (f64, f64) {
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    let some = AVERAGED.min(losses.len() / 2).max(1).min(losses.len());
    (mean(&losses[..some]), mean(&losses[losses.len() - some..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_a_loss_are_averaged() {
        assert_eq!(ends(&[4.0, 2.0, 9.0, 9.0, 1.0, 3.0, 2.0]), (5.0, 2.0));
        assert_eq!(ends(&[4.0, 2.0]), (4.0, 2.0));
        assert_eq!(ends(&[4.0]), (4.0, 4.0));
        assert_eq!(ends(&[]), (0.0, 0.0));
    }
}
