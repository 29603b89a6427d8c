//! Resolved specifications: one shape in the request, the row, the worker and the checkpoint.
//!
//! A request is parsed once, at POST, into these types with every default that needs neither data
//! nor device applied. What does need them (`steps`, the warm-up, the precision, …) is an
//! `Option` that the first attempt's `preparing` phase fills (see [`crate::train`]); it is then written
//! into the row once and never changes. These types hold no defaults that depend on
//! the machine and never read the environment.

use serde::{Deserialize, Serialize};

pub use crate::{arch::Architecture, objective::Objective, parallel::Layout};

/// Version of [`JobSpec`] as stored in rows and checkpoints. Readers accept every earlier one.
pub const SPEC_VERSION: u32 = 1;

/// The vocabulary is padded to a multiple of this on each rank, in memory. Padded rows are zero, their logits −∞.
pub const VOCABULARY_MULTIPLE: i64 = 64;

listed_enum! {
    Positions {
        /// A trained table, one row a position (GPT, GPT-2).
        Learned,
        /// Rotary embedding of queries and keys (Su et al., arXiv 2104.09864), half-split layout.
        Rotary,
    }
}

listed_enum! {
    Norm {
        Layer,
        Rms,
    }
}

listed_enum! {
    Activation {
        /// The tanh approximation, as GPT-2 uses it.
        Gelu,
        /// `silu(gate(x)) * up(x)` (Shazeer, arXiv 2002.05202).
        Swiglu,
    }
}

/// The shape of a model, every field resolved except what comes from the tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub layers: i64,
    pub heads: i64,
    /// Key/value heads; divides `heads`.
    pub kv_heads: i64,
    pub head_dim: i64,
    pub width: i64,
    pub mlp_width: i64,
    /// Longest sequence in tokens.
    pub context: i64,
    /// Rows of the embedding in files and counts, unpadded. 0 until the tokenizer is known.
    pub vocabulary: i64,
    pub positions: Positions,
    pub norm: Norm,
    pub norm_eps: f64,
    pub activation: Activation,
    pub bias: bool,
    pub tie_embeddings: bool,
    pub dropout: f64,
    pub rope_theta: f64,
}

listed_enum! {
    Precision {
        /// fp32 parameters, bf16 autocast in the forward pass.
        Bf16,
        Fp32,
    }
}

listed_enum! {
    Template {
        /// `[INS] instruction [INS] output EOS`, see [`crate::template`].
        Ins,
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Method {
    /// A new model, on every token.
    Pretrain { objective: Objective },
    /// Loss on the output and its end token only.
    Instruction { template: Template },
}

impl Method {
    pub fn objective(&self) -> Objective {
        match self {
            Method::Pretrain { objective } => *objective,
            Method::Instruction { .. } => Objective::CausalLm,
        }
    }

    /// What renders conversations, where they are trained on.
    pub fn template(&self) -> Option<Template> {
        match self {
            Method::Pretrain { .. } => None,
            Method::Instruction { template } => Some(*template),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// Loshchilov & Hutter, arXiv 1711.05101. Decay acts on matrices only.
    Adamw { betas: [f64; 2], eps: f64, weight_decay: f64 },
    /// The decay is added to the gradient, of matrices only.
    Sgd { momentum: f64, weight_decay: f64 },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Linear warm-up to `peak`, then a half cosine to `floor` at the last step.
    Cosine { peak: f64, warmup_steps: Option<u64>, floor: f64 },
    /// Linear warm-up to `peak`, then a line to `floor` at the last step.
    Linear { peak: f64, warmup_steps: Option<u64>, floor: f64 },
    /// Linear warm-up to `peak`, then `peak`.
    Constant { peak: f64, warmup_steps: Option<u64> },
}

/// When a job counts as diverged: the moving average of the loss over `window` steps stands above
/// `factor` times its minimum for `patience` steps, or the gradient norm is not finite
/// `non_finite_steps` steps running.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Divergence {
    pub window: u64,
    pub factor: f64,
    pub patience: u64,
    pub non_finite_steps: u64,
}

impl Default for Divergence {
    fn default() -> Self {
        Divergence { window: 50, factor: 3.0, patience: 200, non_finite_steps: 3 }
    }
}

/// What may be validated on. Absent: nothing is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Validation {
    /// A share of the training set, chosen by a seeded hash of each row's content.
    Fraction { fraction: f64 },
    /// Another dataset's id.
    Dataset { dataset: String },
}

/// Hyperparameters of a training job. `None` means: decided in `preparing`, then written once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    pub steps: Option<u64>,
    /// Used to find `steps` where those are not given.
    pub epochs: Option<f64>,
    /// Sequences per optimiser step over all ranks.
    pub batch_size: u64,
    /// Sequences per forward pass; divides `batch_size`.
    pub micro_batch_size: Option<u64>,
    pub precision: Option<Precision>,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    /// Global gradient norm above which gradients are scaled down to it.
    pub clip: f64,
    pub seed: u64,
    /// Steps between checkpoints; `None`: every 60 seconds.
    pub checkpoint_every: Option<u64>,
    pub evaluate_every: Option<u64>,
    /// Newest checkpoints to keep besides the best one.
    pub keep_checkpoints: u64,
    pub sample_every: Option<u64>,
    pub sample_prompts: Vec<String>,
    pub divergence: Divergence,
}

/// A training job as its row, its worker and its checkpoints hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    pub spec_version: u32,
    pub method: Method,
    /// The shape to train. For instruction tuning it is the base model's.
    pub model: ModelConfig,
    /// Validation as asked for; ids are resolved to folders by the runner.
    pub validation: Option<Validation>,
    pub train: TrainConfig,
    /// One rank where it is absent, as in what earlier versions stored.
    #[serde(default, skip_serializing_if = "Layout::is_default")]
    pub layout: Layout,
}

impl JobSpec {
    /// Whether `preparing` has something to decide.
    pub fn is_open(&self) -> bool {
        let (Schedule::Cosine { warmup_steps, .. }
        | Schedule::Linear { warmup_steps, .. }
        | Schedule::Constant { warmup_steps, .. }) = &self.train.schedule;
        let train = &self.train;
        let evaluates = self.validation.is_some() || !train.sample_prompts.is_empty();
        self.model.vocabulary == 0
            || train.steps.is_none()
            || train.micro_batch_size.is_none()
            || train.precision.is_none()
            || warmup_steps.is_none()
            || evaluates && (train.evaluate_every.is_none() || train.sample_every.is_none())
    }
}

/// How one sequence is continued. The same for the API, the engine and samples in training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus: the smallest set of tokens whose probability reaches this.
    pub top_p: f64,
    /// 0: no bound.
    pub top_k: i64,
    /// Seed of this sequence's own random stream; it never depends on its neighbours.
    pub seed: u64,
    pub max_tokens: i64,
    /// Alternatives to report for each token besides the chosen one; `None`: no log probabilities.
    pub logprobs: Option<i64>,
}
