//! A training request becomes a valid [`JobSpec`] once, at POST; nobody checks it again.
//!
//! Three steps: the schema (types, bounds, unknown fields: [`crate::schema`], before a [`TrainBody`]
//! exists), the contradictions that no schema expresses (422), the defaults that need neither data
//! nor a device. What needs those stays open in the spec and is written into the row by the first attempt. Nothing here reads the
//! database; ids are returned for the caller to look up.

mod hyperparameters;
mod model;
mod parallelism;

use std::collections::BTreeMap;

use lathe_model::config::{JobSpec, Layout, Method, ModelConfig, Objective, SPEC_VERSION, Template, TrainConfig, Validation};
use lathe_model::parallel::{Misfit, layout::Divided};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use hyperparameters::{HyperparametersBody, MAX_ATTEMPTS};
pub use model::ModelBody;
pub use parallelism::{CoordinatesObject, ParallelismBody};

use crate::{metadata::Metadata, names::names, problem::ApiError};

/// 422: every field is valid, together they are not.
fn contradiction(param: &str, message: &str) -> ApiError {
    ApiError::unprocessable("contradiction", param, message)
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PretrainType {
    Pretrain,
}

names! {
    ObjectiveName(Objective),
    TemplateName(Template),
}

/// Next-token loss on every token.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PretrainMethod {
    pub r#type: PretrainType,
    /// Default: causal_lm.
    pub objective: Option<ObjectiveName>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstructionType {
    Instruction,
}

/// Loss on the output and its end token only.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstructionMethod {
    pub r#type: InstructionType,
    /// Default: ins.
    pub template: Option<TemplateName>,
}

/// A method, as answers show it.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum MethodBody {
    Pretrain(PretrainMethod),
    Instruction(InstructionMethod),
}

/// A share of the training rows, chosen by a seeded hash of their content.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidationFraction {
    #[schema(exclusive_minimum = 0, maximum = 0.5)]
    pub fraction: f64,
}

/// Another dataset.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidationDataset {
    pub dataset: String,
}

/// What to validate on. An evaluation reads all of it up to 1,024 sequences of the model's context; of
/// more it reads as many, evenly spaced and the same ones each time.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ValidationBody {
    Fraction(ValidationFraction),
    Dataset(ValidationDataset),
}

/// A body: the fields of its method, then those that every method has.
macro_rules! train_body {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)+ }) => {
        #[derive(Debug, Deserialize, Serialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        $(#[$meta])*
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)+
            /// Absent: nothing is validated on.
            pub validation: Option<ValidationBody>,
            pub hyperparameters: Option<HyperparametersBody>,
            pub parallelism: Option<ParallelismBody>,
            /// The job's name and the model's.
            #[schema(min_length = 1, max_length = 256)]
            pub name: Option<String>,
            /// Higher is claimed sooner. Default: 0.
            #[schema(minimum = -1000, maximum = 1000)]
            pub priority: Option<i32>,
            /// Jobs that must succeed first.
            #[schema(max_items = 64)]
            pub after: Option<Vec<String>>,
            pub metadata: Option<Metadata>,
        }

        impl $name {
            fn request(self, method: Method, origin: Origin) -> Result<TrainRequest, ApiError> {
                let hyperparameters = self.hyperparameters.unwrap_or_default();
                Ok(TrainRequest {
                    origin,
                    dataset: self.dataset,
                    max_attempts: hyperparameters.max_attempts.unwrap_or(MAX_ATTEMPTS),
                    train: hyperparameters.resolve(&method, self.validation.is_some())?,
                    validation: self.validation.map(ValidationBody::resolve),
                    layout: self.parallelism.unwrap_or_default().resolve(),
                    method,
                    name: self.name,
                    priority: self.priority.unwrap_or(0),
                    after: self.after.unwrap_or_default(),
                    metadata: self.metadata.unwrap_or_default().0,
                })
            }
        }
    };
}

train_body! {
    /// Trains a new model on every token of a dataset.
    #[schema(example = json!({
        "method": {"type": "pretrain", "objective": "causal_lm"},
        "model": {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64},
        "dataset": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "tokenizer": "tok_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "validation": {"fraction": 0.05},
        "hyperparameters": {"steps": 2000, "batch_size": 12, "micro_batch_size": 12, "precision": "bf16", "seed": 1, "clip": 1.0,
            "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1},
            "schedule": {"type": "cosine", "peak": 1e-3, "warmup_steps": 100, "floor": 1e-4},
            "checkpoint_every": 200, "evaluate_every": 200, "keep_checkpoints": 2},
        "parallelism": {"data": 1}, "name": "small", "priority": 0, "after": [], "metadata": {}
    }))]
    PretrainBody {
        method: PretrainMethod,
        model: ModelBody,
        /// Id of a dataset. One that is not ready is waited for.
        dataset: String,
        /// Id of a tokenizer. One that is not ready is waited for.
        tokenizer: String,
    }
}

train_body! {
    /// Tunes a model of the project to follow instructions. The shape is the base's.
    #[schema(example = json!({
        "method": {"type": "instruction", "template": "ins"}, "base_model": "model-01J9ZQ4M7K3T5W8X2Y6C0V1B4N",
        "dataset": "ds_01J9ZQ4M7K3T5W8X2Y6C0V1B4N", "hyperparameters": {"epochs": 3, "batch_size": 32}, "name": "sums"
    }))]
    InstructionBody {
        method: InstructionMethod,
        /// Id of a model. One that is not ready is waited for.
        base_model: String,
        /// Id of a dataset of conversations. One that is not ready is waited for.
        dataset: String,
        /// Id of a tokenizer that only adds tokens to the base's; the embedding grows by them, and its
        /// new rows start at the mean of the others. Default: the base's own.
        tokenizer: Option<String>,
    }
}

/// A training job to create.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum TrainBody {
    Pretrain(PretrainBody),
    Instruction(InstructionBody),
}

/// What the new model starts from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// Fresh weights of this shape over this tokenizer.
    Fresh { model: ModelConfig, tokenizer: String },
    /// A model's weights and shape, and its tokenizer unless another one is named.
    Base { model: String, tokenizer: Option<String> },
}

/// A valid request: only the ids are unchecked.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainRequest {
    pub method: Method,
    pub origin: Origin,
    pub dataset: String,
    pub validation: Option<Validation>,
    pub train: TrainConfig,
    pub layout: Layout,
    pub max_attempts: i32,
    pub name: Option<String>,
    pub priority: i32,
    pub after: Vec<String>,
    pub metadata: BTreeMap<String, String>,
}

impl TrainRequest {
    /// The spec, once the shape (the base's, for tuning) is known.
    ///
    /// # Errors
    /// Where the layout does not divide it.
    pub fn spec(&self, model: ModelConfig) -> Result<JobSpec, Misfit> {
        let &TrainConfig { batch_size, micro_batch_size, .. } = &self.train;
        self.layout.check(Divided { model: &model, batch_size, micro_batch_size })?;
        Ok(JobSpec {
            spec_version: SPEC_VERSION,
            method: self.method.clone(),
            model,
            validation: self.validation.clone(),
            train: self.train.clone(),
            layout: self.layout,
        })
    }
}

impl TrainBody {
    /// Checks what the schema cannot, and applies the defaults.
    pub fn resolve(self) -> Result<TrainRequest, ApiError> {
        match self {
            TrainBody::Pretrain(body) => {
                let objective = body.method.objective.map_or(Objective::CausalLm, |name| name.0);
                let origin = Origin::Fresh { model: body.model.resolve()?, tokenizer: body.tokenizer.clone() };
                body.request(Method::Pretrain { objective }, origin)
            }
            TrainBody::Instruction(body) => {
                let template = body.method.template.map_or(Template::Ins, |name| name.0);
                let origin = Origin::Base { model: body.base_model.clone(), tokenizer: body.tokenizer.clone() };
                body.request(Method::Instruction { template }, origin)
            }
        }
    }
}

impl ValidationBody {
    fn resolve(self) -> Validation {
        match self {
            ValidationBody::Fraction(ValidationFraction { fraction }) => Validation::Fraction { fraction },
            ValidationBody::Dataset(ValidationDataset { dataset }) => Validation::Dataset { dataset },
        }
    }
}

#[cfg(test)]
mod tests;
