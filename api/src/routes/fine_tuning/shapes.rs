//! OpenAI's shapes of fine-tuning jobs, their events and checkpoints. Every key is always there.

use lathe_jobs::{checkpoints, metrics::METRICS_EVENT, state::JobState};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};

use crate::{
    metadata::Metadata,
    problem::ApiError,
    resource::{self, FailureDetail},
    routes::training::{JobRow, JobStateName, events::EventRow, outputs::CheckpointRow},
};

/// A word that leaves a number to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    Auto,
}

/// Passes over the training data.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
#[schema(minimum = 1, maximum = 1000)]
pub struct Epochs(pub u64);

/// Sequences per optimiser step.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
#[schema(minimum = 1, maximum = 65536)]
pub struct BatchSize(pub u64);

/// Times the default peak of the learning rate, 1e-4.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
#[schema(exclusive_minimum = 0, maximum = 10000)]
pub struct Multiplier(pub f64);

/// `"auto"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum AutoEpochs {
    Auto(Auto),
    Number(Epochs),
}

/// `"auto"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum AutoBatchSize {
    Auto(Auto),
    Number(BatchSize),
}

/// `"auto"` or a number.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum AutoMultiplier {
    Auto(Auto),
    Number(Multiplier),
}

impl AutoEpochs {
    pub fn number(self) -> Option<u64> {
        match self {
            AutoEpochs::Auto(Auto::Auto) => None,
            AutoEpochs::Number(Epochs(number)) => Some(number),
        }
    }
}

impl AutoBatchSize {
    pub fn number(self) -> Option<u64> {
        match self {
            AutoBatchSize::Auto(Auto::Auto) => None,
            AutoBatchSize::Number(BatchSize(number)) => Some(number),
        }
    }
}

impl AutoMultiplier {
    pub fn number(self) -> Option<f64> {
        match self {
            AutoMultiplier::Auto(Auto::Auto) => None,
            AutoMultiplier::Number(Multiplier(number)) => Some(number),
        }
    }
}

/// Each `"auto"` or a number; auto: 1 epoch, batches of 32, multiplier 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FineTuningHyperparameters {
    pub n_epochs: Option<AutoEpochs>,
    pub batch_size: Option<AutoBatchSize>,
    pub learning_rate_multiplier: Option<AutoMultiplier>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FineTuningMethodType {
    Supervised,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FineTuningMethod {
    pub r#type: FineTuningMethodType,
    pub supervised: Option<Supervised>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Supervised {
    pub hyperparameters: Option<FineTuningHyperparameters>,
}

#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"model": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "training_file": "file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "suffix": "sums",
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}}}))]
pub struct CreateFineTuningJob {
    /// Any causal model of the project.
    pub model: String,
    /// A file of conversations or instructions.
    pub training_file: String,
    pub validation_file: Option<String>,
    pub method: Option<FineTuningMethod>,
    /// The older place of what `method.supervised.hyperparameters` holds.
    pub hyperparameters: Option<FineTuningHyperparameters>,
    /// Shows in the new model's id.
    #[schema(min_length = 1, max_length = 64)]
    pub suffix: Option<String>,
    #[schema(minimum = 0, maximum = 18446744073709551615u64, format = "uint64")]
    pub seed: Option<u64>,
    pub metadata: Option<Metadata>,
}

impl CreateFineTuningJob {
    /// From whichever of the two places holds them.
    pub fn hyperparameters(&self) -> Result<FineTuningHyperparameters, ApiError> {
        let newer = self.method.and_then(|method| method.supervised).and_then(|supervised| supervised.hyperparameters);
        match (newer, self.hyperparameters) {
            (Some(newer), Some(older)) if newer != older => Err(ApiError::unprocessable(
                "contradiction",
                "hyperparameters",
                "`hyperparameters` and `method.supervised.hyperparameters` differ: give one of them.",
            )),
            (newer, older) => Ok(newer.or(older).unwrap_or_default()),
        }
    }
}

/// OpenAI's words for where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FineTuningStatus {
    ValidatingFiles,
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl FineTuningStatus {
    fn of(state: JobState, phase: Option<&str>) -> FineTuningStatus {
        match state {
            JobState::Running if phase == Some("preparing") => FineTuningStatus::ValidatingFiles,
            JobState::Running | JobState::Pausing | JobState::Cancelling => FineTuningStatus::Running,
            JobState::Blocked | JobState::Queued | JobState::Paused => FineTuningStatus::Queued,
            JobState::Succeeded => FineTuningStatus::Succeeded,
            JobState::Failed => FineTuningStatus::Failed,
            JobState::Cancelled => FineTuningStatus::Cancelled,
        }
    }
}

/// A fine-tuning job.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "fine_tuning.job", "created_at": 1767225600, "error": null,
    "fine_tuned_model": "ft:model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N:default:sums:8x2y6c0v1b4n", "finished_at": 1767225900,
    "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}, "model": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N",
    "organization_id": "proj_default", "result_files": [], "seed": 0, "status": "succeeded", "trained_tokens": 183600,
    "training_file": "file-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "validation_file": null, "integrations": [], "estimated_finish": null,
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}}},
    "metadata": {}, "user_provided_suffix": "sums", "state": "succeeded"}))]
pub struct FineTuningJobObject {
    #[schema(examples("ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N"))]
    pub id: String,
    #[schema(examples("fine_tuning.job"))]
    object: &'static str,
    created_at: i64,
    error: Option<FailureDetail>,
    /// Once it has succeeded.
    fine_tuned_model: Option<String>,
    finished_at: Option<i64>,
    hyperparameters: ResolvedHyperparameters,
    /// The model that it starts from.
    model: String,
    organization_id: String,
    /// Always empty: results are in `metrics` of `/v1/training/jobs`.
    result_files: Vec<String>,
    seed: u64,
    status: FineTuningStatus,
    trained_tokens: Option<i64>,
    /// The first file of its dataset, else the dataset's id.
    training_file: String,
    validation_file: Option<String>,
    /// Always empty.
    integrations: Vec<String>,
    /// Unix seconds; once its speed is known.
    estimated_finish: Option<i64>,
    method: ResolvedMethod,
    metadata: Metadata,
    user_provided_suffix: Option<String>,
    /// Lathe's own word for `status`, which has no word for `paused`.
    state: JobStateName,
}

/// As asked for; `"auto"` where nothing was.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ResolvedHyperparameters {
    n_epochs: AutoEpochs,
    batch_size: AutoBatchSize,
    learning_rate_multiplier: AutoMultiplier,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ResolvedMethod {
    r#type: FineTuningMethodType,
    supervised: ResolvedSupervised,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ResolvedSupervised {
    hyperparameters: ResolvedHyperparameters,
}

impl FineTuningJobObject {
    pub fn new(row: JobRow, project_id: &str) -> FineTuningJobObject {
        // A job made on the native route was not asked for in these words.
        let request: Option<CreateFineTuningJob> = serde_json::from_value(row.request.clone()).ok();
        let asked = request.as_ref().and_then(|request| request.hyperparameters().ok()).unwrap_or_default();
        let hyperparameters = ResolvedHyperparameters {
            n_epochs: asked.n_epochs.unwrap_or(AutoEpochs::Auto(Auto::Auto)),
            batch_size: asked.batch_size.unwrap_or(AutoBatchSize::Auto(Auto::Auto)),
            learning_rate_multiplier: asked.learning_rate_multiplier.unwrap_or(AutoMultiplier::Auto(Auto::Auto)),
        };
        let spec = row.spec();
        let left = row.eta_seconds(spec.as_ref());
        FineTuningJobObject {
            object: "fine_tuning.job",
            created_at: resource::seconds(row.created_at),
            fine_tuned_model: row.model_id.filter(|_| row.state == JobState::Succeeded),
            finished_at: row.finished_at.map(resource::seconds),
            hyperparameters,
            model: row.base_model_id.unwrap_or_default(),
            organization_id: project_id.to_owned(),
            result_files: Vec::new(),
            seed: spec.as_ref().map_or(0, |spec| spec.train.seed),
            status: FineTuningStatus::of(row.state, row.phase.as_deref()),
            trained_tokens: row.trained_tokens,
            training_file: row.training_file.or(row.dataset_id).unwrap_or_default(),
            validation_file: row.validation_file,
            integrations: Vec::new(),
            estimated_finish: left
                .map(|left| (OffsetDateTime::now_utc() + time::Duration::seconds_f64(left.min(1e9))).unix_timestamp()),
            method: ResolvedMethod {
                r#type: FineTuningMethodType::Supervised,
                supervised: ResolvedSupervised { hyperparameters },
            },
            metadata: Metadata::from_row(row.metadata),
            user_provided_suffix: request.and_then(|request| request.suffix),
            state: row.state.into(),
            error: FailureDetail::from_column(row.error),
            id: row.id,
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListEvents {
    /// Id of the last event of the page before.
    #[param(min_length = 1)]
    pub after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 20)]
    pub limit: Option<i64>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListCheckpoints {
    /// Id of the last checkpoint of the page before.
    #[param(min_length = 1)]
    pub after: Option<String>,
    #[param(minimum = 1, maximum = 100, default = 10)]
    pub limit: Option<i64>,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FineTuningEventType {
    Message,
    Metrics,
}

/// An event.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "ftevent-01J9ZQ4M7K3T5W8X2Y6C0V1B4N-3", "object": "fine_tuning.job.event", "created_at": 1767225601, "level": "info",
    "message": "Everything that the job needs is there.", "type": "message", "data": {}}))]
pub struct FineTuningEventObject {
    #[schema(examples("ftevent-01J9ZQ4M7K3T5W8X2Y6C0V1B4N-3"))]
    pub id: String,
    #[schema(examples("fine_tuning.job.event"))]
    object: &'static str,
    created_at: i64,
    /// `info`, `warn` or `error`.
    level: String,
    message: String,
    r#type: FineTuningEventType,
    #[schema(value_type = Object)]
    data: Value,
}

impl FineTuningEventObject {
    pub fn new(job_id: &str, row: EventRow) -> FineTuningEventObject {
        let r#type = if row.code == METRICS_EVENT { FineTuningEventType::Metrics } else { FineTuningEventType::Message };
        FineTuningEventObject {
            id: event_id(job_id, row.id),
            object: "fine_tuning.job.event",
            created_at: resource::seconds(row.created_at),
            level: row.level,
            message: row.message,
            r#type,
            data: row.data,
        }
    }
}

/// The id of a job's event.
fn event_id(job_id: &str, number: i64) -> String {
    format!("ftevent-{}-{number}", job_id.trim_start_matches("ftjob-"))
}

/// The number in the id of an event, if it is one of this job.
pub fn event_number(job_id: &str, id: &str) -> Option<i64> {
    let number = id.rsplit('-').next()?.parse().ok()?;
    (event_id(job_id, number) == id).then_some(number)
}

/// A checkpoint.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "ftckpt_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "object": "fine_tuning.job.checkpoint", "created_at": 1767225700,
    "fine_tuned_model_checkpoint": "ft:model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N:default:sums:8x2y6c0v1b4n:ckpt-step-200",
    "fine_tuning_job_id": "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "metrics": {"step": 200, "train_loss": 0.41, "full_valid_loss": null}, "step_number": 200}))]
pub struct FineTuningCheckpointObject {
    #[schema(examples("ftckpt_01J9ZQ4M7K3T5W8X2Y6C0V1B4N"))]
    pub id: String,
    #[schema(examples("fine_tuning.job.checkpoint"))]
    object: &'static str,
    created_at: i64,
    /// The model's id with `:ckpt-step-` and the step: it answers, and serves as a `model` to tune.
    fine_tuned_model_checkpoint: String,
    fine_tuning_job_id: String,
    metrics: FineTuningCheckpointMetrics,
    step_number: i64,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct FineTuningCheckpointMetrics {
    step: i64,
    train_loss: Option<f64>,
    full_valid_loss: Option<f64>,
}

impl FineTuningCheckpointObject {
    pub fn new(job_id: &str, model: &str, row: CheckpointRow) -> FineTuningCheckpointObject {
        FineTuningCheckpointObject {
            id: row.id,
            object: "fine_tuning.job.checkpoint",
            created_at: resource::seconds(row.created_at),
            fine_tuned_model_checkpoint: checkpoints::model_name(model, row.step),
            fine_tuning_job_id: job_id.to_owned(),
            metrics: FineTuningCheckpointMetrics { step: row.step, train_loss: row.loss, full_valid_loss: row.validation_loss },
            step_number: row.step,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_map_to_openai_s() {
        let status = |state, phase| FineTuningStatus::of(state, phase);
        assert_eq!(status(JobState::Running, Some("preparing")), FineTuningStatus::ValidatingFiles);
        assert_eq!(status(JobState::Running, Some("training")), FineTuningStatus::Running);
        for (state, expected) in [
            (JobState::Blocked, FineTuningStatus::Queued),
            (JobState::Queued, FineTuningStatus::Queued),
            (JobState::Paused, FineTuningStatus::Queued),
            (JobState::Pausing, FineTuningStatus::Running),
            (JobState::Cancelling, FineTuningStatus::Running),
            (JobState::Cancelled, FineTuningStatus::Cancelled),
            (JobState::Succeeded, FineTuningStatus::Succeeded),
            (JobState::Failed, FineTuningStatus::Failed),
        ] {
            assert_eq!(status(state, None), expected);
        }
    }

    #[test]
    fn an_event_s_number_is_in_its_id() {
        let job = "ftjob-01J9ZQ4M7K3T5W8X2Y6C0V1B4N";
        assert_eq!(event_number(job, &event_id(job, 17)), Some(17));
        for other in ["ftevent-x", "ftevent-01J9ZQ4M7K3T5W8X2Y6C0V1B4X-17", "ftevent-01J9ZQ4M7K3T5W8X2Y6C0V1B4N-017", "17"] {
            assert_eq!(event_number(job, other), None, "{other}");
        }
    }
}
