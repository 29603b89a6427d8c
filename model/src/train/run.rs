//! A run in memory, and the parts of the loop: what is read of a step later, saving.

use std::{
    collections::VecDeque,
    path::PathBuf,
    time::{Duration, Instant},
};

use tch::{Device, Tensor};

use super::{gang::Gang, halt::Halt, state::TrainState};
use crate::{
    arch::Model,
    checkpoint::{self, Held, Share, Trained},
    config::JobSpec,
    control::{Control, Reporter},
    data::{packing::Packing, shards::Shard},
    failure,
    nn::Parameters,
    objective::Posing,
    optim::Optimizer,
    protocol::{Level, MetricRow, Numerics, Report, TaskResult},
    tokenizer::Tokenizer,
};

/// Time between checkpoints where no number of steps is given.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(60);
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// The training set and the validation set.
#[derive(Debug)]
pub struct Data {
    pub shard: Shard,
    pub train: Packing,
    /// `None`: validation is a part of `shard`.
    pub validation_shard: Option<Shard>,
    pub validation: Packing,
}

impl Data {
    pub fn validation(&self) -> Option<(&Shard, &Packing)> {
        let shard = self.validation_shard.as_ref().unwrap_or(&self.shard);
        (!self.validation.is_empty()).then_some((shard, &self.validation))
    }
}

/// A finished step whose numbers still lie on the device.
pub struct Pending {
    pub step: u64,
    pub loss: Tensor,
    pub grad_norm: Tensor,
    pub learning_rate: f64,
    pub supervised: u64,
    /// Inputs that are no padding.
    pub tokens: u64,
    pub begun: Instant,
    /// The step itself and the wait for the one before it: no evaluation, no checkpoint. Known once
    /// the loop has come round.
    pub took: Option<Duration>,
}

pub struct Run {
    pub spec: JobSpec,
    pub device: Device,
    pub numerics: Numerics,
    pub tokenizer: Tokenizer,
    pub data: Data,
    pub model: Model,
    pub parameters: Parameters,
    pub optimizer: Optimizer,
    pub state: TrainState,
    pub folders: Folders,
    pub ledger: Ledger,
    pub gang: Gang,
}

/// Where a run reads its tokenizer and writes what it makes.
pub struct Folders {
    pub tokenizer: PathBuf,
    pub staging: PathBuf,
    pub disk_low_bytes: u64,
}

/// What this process has done of a run, and told.
pub struct Ledger {
    /// Oldest first.
    pub pending: VecDeque<Pending>,
    saved: (u64, Instant),
    /// Where this process began.
    begun: (u64, Instant),
    /// When it last told how far it is.
    progress: Instant,
}

impl Ledger {
    /// Of a process that begins after `step`, which is saved.
    pub fn begin(step: u64) -> Ledger {
        let now = Instant::now();
        Ledger { pending: VecDeque::new(), saved: (step, now), begun: (step, now), progress: now }
    }
}

impl Run {
    pub fn steps(&self) -> u64 {
        self.spec.train.steps.unwrap_or(1)
    }

    pub fn micro_batch_size(&self) -> u64 {
        self.spec.train.micro_batch_size.unwrap_or(1)
    }

    pub fn posing(&self) -> Posing {
        Posing { objective: self.spec.method.objective(), seed: self.spec.train.seed }
    }

    pub fn is_done(&self) -> bool {
        self.state.step >= self.steps()
    }

    /// Whether to stop in the middle of something. Ranks stop where they agree on it.
    pub fn stops(&self, control: &Control) -> bool {
        control.is_stopping() && self.gang.is_alone()
    }

    /// Reads the numbers of every finished step but the newest `newer`, reports them and looks for
    /// divergence. A validation loss belongs to the newest step.
    pub fn observe(&mut self, newer: usize, validation_loss: Option<f32>, report: &mut Reporter) -> Result<(), Halt> {
        while self.ledger.pending.len() > newer {
            let Some(finished) = self.ledger.pending.pop_front() else { break };
            let (loss, norm) = (finished.loss.double_value(&[]), finished.grad_norm.double_value(&[]));
            let (step, finite) = (finished.step, loss.is_finite() && norm.is_finite());
            self.state.loss = finite.then_some(loss as f32);
            if finite {
                let took = finished.took.unwrap_or_else(|| finished.begun.elapsed());
                let row = MetricRow {
                    step,
                    loss,
                    learning_rate: finished.learning_rate,
                    grad_norm: norm,
                    tokens: finished.supervised,
                    tokens_per_second: finished.tokens as f64 / took.as_secs_f64().max(1e-9),
                    validation_loss: validation_loss.filter(|_| self.ledger.pending.is_empty()).map(f64::from),
                };
                self.state.newest = Some(row.clone());
                report.send(Report::Metric { row });
            } else {
                let message = format!("step {step} changed nothing: its gradient norm is not finite");
                let data = serde_json::json!({ "step": step, "loss": loss.to_string(), "grad_norm": norm.to_string() });
                report.event(Level::Warn, "step.skipped", &message, data);
            }
            let rule = &self.spec.train.divergence;
            self.state.divergence.observe(rule, step, loss as f32, norm as f32).inspect_err(|failure| {
                let data = serde_json::json!({ "step": step, "loss": loss.to_string(), "grad_norm": norm.to_string() });
                report.event(Level::Error, "diverged", &failure.message, data);
            })?;
        }
        if let Some(newest) = self.ledger.pending.back_mut().filter(|newest| newest.took.is_none()) {
            newest.took = Some(newest.begun.elapsed());
        }
        if self.ledger.progress.elapsed() >= PROGRESS_INTERVAL || self.state.step == 1 {
            self.ledger.progress = Instant::now();
            report.send(Report::Progress { step: self.state.step, seconds_per_step: self.seconds_per_step() });
        }
        Ok(())
    }

    /// Wall time of a step in this process so far, with its share of evaluations and checkpoints.
    fn seconds_per_step(&self) -> Option<f64> {
        let (first, begun) = self.ledger.begun;
        let steps = self.state.step.saturating_sub(first);
        (steps > 0).then(|| begun.elapsed().as_secs_f64() / steps as f64)
    }

    pub fn evaluation_is_due(&self) -> bool {
        self.is_due(self.spec.train.evaluate_every, self.state.evaluated) && self.data.validation().is_some()
    }

    pub fn samples_are_due(&self) -> bool {
        self.is_due(self.spec.train.sample_every, self.state.sampled) && !self.spec.train.sample_prompts.is_empty()
    }

    /// Whether what happens `every` so many steps, and at the last, is still to be done at this one.
    fn is_due(&self, every: Option<u64>, done: u64) -> bool {
        self.state.step > done && every.is_some_and(|every| self.state.step.is_multiple_of(every.max(1)) || self.is_done())
    }

    pub fn checkpoint_is_due(&self) -> bool {
        match self.spec.train.checkpoint_every {
            Some(every) => self.state.step.is_multiple_of(every.max(1)),
            None => self.ledger.saved.1.elapsed() >= CHECKPOINT_INTERVAL,
        }
    }

    /// Saves and reports the last finished step, unless that was done already.
    pub fn save(&mut self, best: bool, report: &mut Reporter) -> Result<(), Halt> {
        if self.state.step == self.ledger.saved.0 {
            return Ok(());
        }
        self.observe(0, None, report)?;
        // The low mark is kept free for this: what has been trained is saved as long as it fits.
        let begun = Instant::now();
        let folder = self.write(&self.state.step.to_string(), 0)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.ledger.saved = (self.state.step, Instant::now());
        let (loss, validation_loss) = (self.state.loss.map(f64::from), self.state.validation_loss.map(f64::from));
        report.send(Report::Checkpoint { step: self.state.step, folder, loss, validation_loss, best, seconds });
        Ok(())
    }

    /// Saves once before the first step and reads it back, so that a disk that cannot hold a
    /// checkpoint is met before the work and not after it.
    pub fn rehearse_saving(&mut self, report: &mut Reporter) -> Result<(), Halt> {
        let begun = Instant::now();
        let folder = self.write("rehearsal", self.folders.disk_low_bytes)?;
        self.gang.lead(|| checkpoint::verify(&folder))?;
        self.gang.each(|| checkpoint::load(&folder, &self.weights(), &self.optimizer.held()))?;
        self.gang.lead(|| std::fs::remove_dir_all(&folder).map_err(failure::io))?;
        let data = serde_json::json!({ "duration_ms": begun.elapsed().as_millis() as u64 });
        report.event(Level::Info, "checkpoint.verified", "a checkpoint was saved and read back", data);
        Ok(())
    }

    fn weights(&self) -> Vec<Held> {
        self.gang.weights(&self.parameters, &self.optimizer)
    }

    fn write(&self, name: &str, reserve_bytes: u64) -> Result<PathBuf, Halt> {
        let (gang, folder) = (&self.gang, self.folders.staging.join(name));
        // Weights, averages and squares.
        gang.lead(|| checkpoint::stage(&folder, Model::parameter_count(&self.spec.model) * 4 * 3, reserve_bytes))?;
        gang.each(|| {
            let (staged, mut share) = (checkpoint::staged(&folder), Share::default());
            share.add(&staged, checkpoint::WEIGHTS, gang.writer(false), &gang.weights_to_write(self.weights()))?;
            share.add(&staged, checkpoint::OPTIMIZER, gang.writer(true), &gang.states_to_write(self.optimizer.held()))?;
            share.note(&staged, gang.rank())
        })?;
        let (spec, state, numerics) = (&self.spec, &self.state, &self.numerics);
        let trained = Trained { spec, state, numerics, tokenizer: &self.folders.tokenizer };
        gang.lead(|| checkpoint::conclude(&folder, &trained, gang.ranks()))?;
        Ok(folder)
    }

    /// Writes the model's folder.
    pub fn publish(&self) -> Result<TaskResult, Halt> {
        let (gang, folder) = (&self.gang, self.folders.staging.join("model"));
        gang.lead(|| checkpoint::stage(&folder, Model::parameter_count(&self.spec.model) * 4 * 2, 0))?;
        gang.each(|| {
            let (staged, mut share) = (checkpoint::staged(&folder), Share::default());
            share.add(&staged, checkpoint::WEIGHTS, gang.writer(false), &gang.weights_to_write(self.weights()))?;
            share.note(&staged, gang.rank())
        })?;
        let conclude = || checkpoint::conclude_model(&folder, &self.spec, &self.folders.tokenizer, gang.ranks());
        let Some(weights_sha256) = gang.lead(conclude)? else { return Ok(TaskResult::Rank) };
        let template = self.spec.method.template().map(|template| template.name().to_owned());
        let (parameters, trained_tokens) = (Model::parameter_count(&self.spec.model), self.state.tokens);
        Ok(TaskResult::Model { folder, parameters, weights_sha256, trained_tokens, template })
    }
}
