//! A run in memory, and the parts of the loop: one step, what is read of it later, saving.

use std::{
    collections::VecDeque,
    path::PathBuf,
    time::{Duration, Instant},
};

use tch::{Device, Kind, Tensor};

use super::{gang::Gang, halt::Halt, state::TrainState};
use crate::{
    arch::Model,
    checkpoint::{self, Trained},
    config::{JobSpec, Precision},
    control::{Control, Reporter},
    data::{
        batch::{Batch, Example, Order},
        packing::Packing,
        shards::Shard,
    },
    failure,
    nn::{Dropout, Parameters, Pass},
    objective::Posing,
    optim::{Adamw, schedule},
    protocol::{Level, MetricRow, Numerics, Report, TaskResult},
    random::{self, Stream},
    shim::{self, Autocast},
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
struct Pending {
    step: u64,
    loss: Tensor,
    grad_norm: Tensor,
    learning_rate: f64,
    supervised: u64,
    /// Inputs that are no padding.
    tokens: u64,
    begun: Instant,
    /// The step itself and the wait for the one before it: no evaluation, no checkpoint. Known once
    /// the loop has come round.
    took: Option<Duration>,
}

pub struct Run {
    pub spec: JobSpec,
    pub device: Device,
    pub numerics: Numerics,
    pub tokenizer: Tokenizer,
    pub data: Data,
    pub model: Model,
    pub parameters: Parameters,
    pub optimizer: Adamw,
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
    pending: VecDeque<Pending>,
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

    /// The summed fp32 cross-entropy over a batch's supervised targets.
    pub fn loss_sum(&self, batch: &mut Batch, dropout: Option<&Dropout>) -> Result<Tensor, Halt> {
        let bf16 = self.spec.train.precision == Some(Precision::Bf16);
        let autocast = bf16.then(|| Autocast::bf16(self.device)).transpose()?;
        let mut pass = Pass { plan: &mut batch.plan, dropout };
        let hidden_btc = self.model.hidden(&batch.tokens_bt, &batch.positions_bt, &mut pass);
        let width = *hidden_btc.size().last().unwrap_or(&0);
        let hidden_tc = hidden_btc.view([-1, width]);
        // Where all positions are supervised there is nothing to choose.
        let hidden_nc = match &batch.chosen {
            None => hidden_tc,
            Some(chosen) => shim::move_rows(&hidden_tc, &chosen.places, &chosen.back, &chosen.unused)?,
        };
        let logits_nv = self.model.logits(&hidden_nc).to_kind(Kind::Float);
        drop(autocast);
        Ok(logits_nv.cross_entropy_loss(&batch.targets_n, None::<Tensor>, tch::Reduction::Sum, -100, 0.0))
    }

    /// Whether to stop in the middle of something. Ranks stop where they agree on it.
    pub fn stops(&self, control: &Control) -> bool {
        control.is_stopping() && self.gang.is_alone()
    }

    /// One optimiser step over `batch_size` sequences, this rank's part of them in micro-batches. Nothing here waits for
    /// the device: the loss and the norm are read by [`Run::observe`] after the next step was begun.
    pub fn step(&mut self, control: &Control) -> Result<(), Halt> {
        let begun = Instant::now();
        let train = &self.spec.train;
        let (first, step) = (self.state.cursor, self.state.step + 1);
        let last = first + train.batch_size;
        let order = Order { shard: &self.data.shard, packing: &self.data.train, posing: self.posing() };
        let examples: Vec<Example> = order.examples(first..last).collect();
        let supervised: u64 = examples.iter().map(Example::supervised).sum();
        let tokens = examples.iter().map(|example| example.tokens.len() as u64).sum();
        let own = self.gang.part(0..train.batch_size);
        let parts = examples[own.start as usize..own.end as usize].chunks(self.micro_batch_size() as usize);
        let mut loss = Tensor::zeros([], (Kind::Float, self.device));
        self.gang.begin_step()?;
        for (number, part) in (1..).zip(parts.clone()) {
            if self.stops(control) {
                self.optimizer.zero_gradients()?;
                return Err(Halt::Stopped);
            }
            let mut batch = Batch::of(part, self.device);
            let dropout = self.dropout(step, &batch.sequences);
            let part = self.loss_sum(&mut batch, dropout.as_ref())? / supervised.max(1) as f64;
            self.gang.backward(&part, number == parts.len())?;
            loss += part.detach();
        }
        self.gang.finish_step()?;
        self.gang.sum(&loss)?;
        let learning_rate = schedule::learning_rate(&train.schedule, step, self.steps());
        let grad_norm = self.optimizer.step(learning_rate, train.clip)?;
        self.state.step = step;
        self.state.cursor = last;
        self.state.tokens += supervised;
        self.ledger.pending.push_back(Pending { step, loss, grad_norm, learning_rate, supervised, tokens, begun, took: None });
        Ok(())
    }

    fn dropout(&self, step: u64, sequences: &[u64]) -> Option<Dropout> {
        let probability = self.spec.model.dropout;
        let seed = random::key(self.spec.train.seed, Stream::Dropout, b"");
        (probability > 0.0).then(|| Dropout { probability, seed, step, sequences: sequences.to_vec() })
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
        if !self.gang.speaks() {
            self.ledger.saved = (self.state.step, Instant::now());
            return Ok(());
        }
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
        if !self.gang.speaks() {
            return Ok(());
        }
        let begun = Instant::now();
        let folder = self.write("rehearsal", self.folders.disk_low_bytes)?;
        checkpoint::verify(&folder)?;
        checkpoint::load(&folder, &self.parameters, &self.optimizer)?;
        std::fs::remove_dir_all(&folder).map_err(failure::io)?;
        let data = serde_json::json!({ "duration_ms": begun.elapsed().as_millis() as u64 });
        report.event(Level::Info, "checkpoint.verified", "a checkpoint was saved and read back", data);
        Ok(())
    }

    fn write(&self, name: &str, reserve_bytes: u64) -> Result<PathBuf, Halt> {
        let folder = self.folders.staging.join(name);
        let trained = Trained {
            spec: &self.spec,
            state: &self.state,
            numerics: &self.numerics,
            parameters: &self.parameters,
            optimizer: &self.optimizer,
            tokenizer: &self.folders.tokenizer,
        };
        checkpoint::save(&folder, &trained, reserve_bytes)?;
        Ok(folder)
    }

    /// Writes the model's folder.
    pub fn publish(&self) -> Result<TaskResult, Halt> {
        if !self.gang.speaks() {
            return Ok(TaskResult::Rank);
        }
        let folder = self.folders.staging.join("model");
        let weights_sha256 = checkpoint::save_model(&folder, &self.spec, &self.parameters, &self.folders.tokenizer, 0)?;
        let template = self.spec.method.template().map(|template| template.name().to_owned());
        let (parameters, trained_tokens) = (self.parameters.count(), self.state.tokens);
        Ok(TaskResult::Model { folder, parameters, weights_sha256, trained_tokens, template })
    }
}
