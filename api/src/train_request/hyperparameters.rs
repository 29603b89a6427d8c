//! `hyperparameters` of a training request: bounds in the schema, defaults and contradictions here.

use lathe_model::config::{Divergence, Method, Optimizer, Precision, Schedule, TrainConfig};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, schema::Schema},
};

use super::contradiction;
use crate::{names::names, problem::ApiError, schema};

/// Default `hyperparameters.max_attempts`.
pub const MAX_ATTEMPTS: i32 = 3;

/// How to train. Every field has a default; null stands for it.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"steps": 2000, "batch_size": 12, "schedule": {"type": "cosine", "peak": 1e-3, "warmup_steps": 100}}))]
pub struct HyperparametersBody {
    /// Optimiser steps. Either this or `epochs`; default: one epoch.
    #[schema(minimum = 1, maximum = 10000000)]
    pub steps: Option<u64>,
    /// Passes over the training data.
    #[schema(minimum = 1, maximum = 1000)]
    pub epochs: Option<f64>,
    /// Sequences per optimiser step over all ranks. Default: 32.
    #[schema(minimum = 1, maximum = 65536)]
    pub batch_size: Option<u64>,
    /// Sequences per forward pass; divides `batch_size`. Default: the largest that fits.
    #[schema(minimum = 1, maximum = 65536)]
    pub micro_batch_size: Option<u64>,
    /// Default: bf16 where the device has it, else fp32.
    pub precision: Option<PrecisionName>,
    pub optimizer: Option<OptimizerBody>,
    pub schedule: Option<ScheduleBody>,
    /// Global gradient norm above which gradients are scaled down to it. Default: 1.
    #[schema(exclusive_minimum = 0, maximum = 1e9)]
    pub clip: Option<f64>,
    /// Decides weights, data order and dropout. Default: 0.
    #[schema(minimum = 0, maximum = 18446744073709551615u64, format = "uint64")]
    pub seed: Option<u64>,
    /// Steps between checkpoints. Default: one every 60 seconds.
    #[schema(minimum = 1, maximum = 10000000)]
    pub checkpoint_every: Option<u64>,
    /// Steps between evaluations. Default: a twentieth of the steps.
    #[schema(minimum = 1, maximum = 10000000)]
    pub evaluate_every: Option<u64>,
    /// Newest checkpoints to keep; the best one is kept too. Default: 2.
    #[schema(minimum = 1, maximum = 1000)]
    pub keep_checkpoints: Option<u64>,
    /// Steps between samples. Default: with every evaluation.
    #[schema(minimum = 1, maximum = 10000000)]
    pub sample_every: Option<u64>,
    /// Prompts that the model continues while it trains. Default: none.
    #[schema(max_items = 8)]
    pub sample_prompts: Option<Vec<SamplePrompt>>,
    pub divergence: Option<DivergenceBody>,
    /// Attempts that may fail before the job does; interruptions do not count. Default: 3.
    #[schema(minimum = 1, maximum = 100)]
    pub max_attempts: Option<i32>,
}

/// One prompt.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[schema(min_length = 1, max_length = 10000)]
pub struct SamplePrompt(pub String);

names! {
    PrecisionName(Precision),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerType {
    #[default]
    Adamw,
    Sgd,
}

/// AdamW, or stochastic gradient descent with momentum; the decay acts on matrices only.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"type": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1}))]
pub struct OptimizerBody {
    /// Default: adamw.
    pub r#type: Option<OptimizerType>,
    /// Of AdamW. Default: 0.9 and 0.95.
    #[schema(min_items = 2, max_items = 2)]
    pub betas: Option<Vec<Beta>>,
    /// Of AdamW. Default: 1e-8.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub eps: Option<f64>,
    /// Of SGD. Default: 0.9.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub momentum: Option<f64>,
    /// Default: 0.1 for AdamW, 0 for SGD.
    #[schema(minimum = 0, maximum = 10)]
    pub weight_decay: Option<f64>,
}

/// Decay rate of a moving average.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[schema(minimum = 0, exclusive_maximum = 1)]
pub struct Beta(pub f64);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleType {
    #[default]
    Cosine,
    Linear,
    Constant,
}

/// A linear warm-up to `peak`, then down to `floor` along a half cosine or a line, or `peak` to the end.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScheduleFields {
    /// Default: cosine.
    pub r#type: Option<ScheduleType>,
    /// Highest learning rate. Default: 1e-3; 1e-4 for tuning.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    pub peak: Option<f64>,
    /// Default: 2 % of the steps.
    #[schema(minimum = 0, maximum = 10000000)]
    pub warmup_steps: Option<u64>,
    /// Learning rate at the last step; not with a constant schedule. Default: a tenth of the peak.
    #[schema(minimum = 0, maximum = 10)]
    pub floor: Option<f64>,
}

/// The learning rate over the steps.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(transparent)]
pub struct ScheduleBody(pub ScheduleFields);

impl ToSchema for ScheduleBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ScheduleFields::schemas(schemas);
    }
}

impl PartialSchema for ScheduleBody {
    /// The fields, of which `floor` exists on the schedules that fall.
    fn schema() -> RefOr<Schema> {
        let on_a_constant_schedule = json!({
            "properties": {"type": {"enum": ["constant"]}, "floor": {"type": "number"}},
            "required": ["type", "floor"],
        });
        schema::never(ScheduleFields::schema(), on_a_constant_schedule)
    }
}

/// When a job counts as diverged: the moving average of the loss over `window` steps stands above
/// `factor` × its minimum for `patience` steps, or the gradient norm is not finite
/// `non_finite_steps` steps running.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DivergenceBody {
    /// Default: 50.
    #[schema(minimum = 1, maximum = 100000)]
    pub window: Option<u64>,
    /// Default: 3.
    #[schema(exclusive_minimum = 1, maximum = 1e6)]
    pub factor: Option<f64>,
    /// Default: 200.
    #[schema(minimum = 1, maximum = 10000000)]
    pub patience: Option<u64>,
    /// Default: 3.
    #[schema(minimum = 1, maximum = 1000)]
    pub non_finite_steps: Option<u64>,
}

impl HyperparametersBody {
    /// With the defaults that need neither data nor a device. `validated`: the job names something
    /// to validate on.
    pub fn resolve(self, method: &Method, validated: bool) -> Result<TrainConfig, ApiError> {
        if self.steps.is_some() && self.epochs.is_some() {
            let message = "`hyperparameters.steps` and `hyperparameters.epochs` say the same thing twice: give one of them.";
            return Err(contradiction("hyperparameters.epochs", message));
        }
        let batch_size = self.batch_size.unwrap_or(32);
        if self.micro_batch_size.is_some_and(|micro| !batch_size.is_multiple_of(micro)) {
            let message = format!("`hyperparameters.micro_batch_size` must divide the batch size, {batch_size}.");
            return Err(contradiction("hyperparameters.micro_batch_size", &message));
        }
        let sample_prompts: Vec<String> = self.sample_prompts.unwrap_or_default().into_iter().map(|prompt| prompt.0).collect();
        if self.sample_every.is_some() && sample_prompts.is_empty() {
            let message = "`hyperparameters.sample_every` needs `hyperparameters.sample_prompts`.";
            return Err(contradiction("hyperparameters.sample_every", message));
        }
        if self.evaluate_every.is_some() && !validated && sample_prompts.is_empty() {
            let message = "`hyperparameters.evaluate_every` needs `validation`, the data to evaluate on.";
            return Err(contradiction("hyperparameters.evaluate_every", message));
        }
        Ok(TrainConfig {
            steps: self.steps,
            epochs: self.epochs.or(if self.steps.is_none() { Some(1.0) } else { None }),
            batch_size,
            micro_batch_size: self.micro_batch_size,
            precision: self.precision.map(|name| name.0),
            optimizer: self.optimizer.unwrap_or_default().resolve()?,
            schedule: self.schedule.unwrap_or_default().0.resolve(method, self.steps)?,
            clip: self.clip.unwrap_or(1.0),
            seed: self.seed.unwrap_or(0),
            checkpoint_every: self.checkpoint_every,
            evaluate_every: self.evaluate_every,
            keep_checkpoints: self.keep_checkpoints.unwrap_or(2),
            sample_every: self.sample_every,
            sample_prompts,
            divergence: self.divergence.unwrap_or_default().resolve(),
        })
    }
}

impl OptimizerBody {
    fn resolve(self) -> Result<Optimizer, ApiError> {
        let r#type = self.r#type.unwrap_or_default();
        let foreign = match r#type {
            OptimizerType::Adamw => self.momentum.map(|_| "momentum"),
            OptimizerType::Sgd => self.betas.as_ref().map(|_| "betas").or(self.eps.map(|_| "eps")),
        };
        if let Some(field) = foreign {
            let param = format!("hyperparameters.optimizer.{field}");
            let message = format!("`{param}` is of the other type of optimizer: leave it out, or change `type`.");
            return Err(contradiction(&param, &message));
        }
        let betas = match self.betas.as_deref() {
            Some([first, second]) => [first.0, second.0],
            _ => [0.9, 0.95],
        };
        let (eps, momentum) = (self.eps.unwrap_or(1e-8), self.momentum.unwrap_or(0.9));
        Ok(match r#type {
            OptimizerType::Adamw => Optimizer::Adamw { betas, eps, weight_decay: self.weight_decay.unwrap_or(0.1) },
            OptimizerType::Sgd => Optimizer::Sgd { momentum, weight_decay: self.weight_decay.unwrap_or(0.0) },
        })
    }
}

impl ScheduleFields {
    fn resolve(self, method: &Method, steps: Option<u64>) -> Result<Schedule, ApiError> {
        let peak = self.peak.unwrap_or(match method {
            Method::Pretrain { .. } => 1e-3,
            Method::Instruction { .. } => 1e-4,
        });
        let floor = self.floor.unwrap_or(peak / 10.0);
        if floor > peak {
            let message = format!("`hyperparameters.schedule.floor` is above the peak, {peak}.");
            return Err(contradiction("hyperparameters.schedule.floor", &message));
        }
        let warmup_steps = self.warmup_steps;
        if let (Some(warmup), Some(steps)) = (warmup_steps, steps)
            && warmup > steps
        {
            let message = format!("The warm-up of {warmup} steps is longer than the job's {steps} steps.");
            return Err(contradiction("hyperparameters.schedule.warmup_steps", &message));
        }
        Ok(match self.r#type.unwrap_or_default() {
            ScheduleType::Cosine => Schedule::Cosine { peak, warmup_steps, floor },
            ScheduleType::Linear => Schedule::Linear { peak, warmup_steps, floor },
            ScheduleType::Constant => Schedule::Constant { peak, warmup_steps },
        })
    }
}

impl DivergenceBody {
    fn resolve(self) -> Divergence {
        let default = Divergence::default();
        Divergence {
            window: self.window.unwrap_or(default.window),
            factor: self.factor.unwrap_or(default.factor),
            patience: self.patience.unwrap_or(default.patience),
            non_finite_steps: self.non_finite_steps.unwrap_or(default.non_finite_steps),
        }
    }
}
