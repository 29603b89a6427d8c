//! The `model` of a pretraining request: a preset or a shape, and the defaults of what it leaves out.

use lathe_model::config::{Activation, Architecture, ModelConfig, Norm, Positions};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, schema::Schema},
};

use super::contradiction;
use crate::{names::names, problem::ApiError, schema};

/// The default width of a swiglu layer is a multiple of this.
const SWIGLU_MULTIPLE: i64 = 64;

/// Shapes known by name. GPT-2's are those of Radford et al. 2019, table 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[allow(clippy::enum_variant_names, reason = "the family is part of each name, and other families follow")]
pub enum Preset {
    #[serde(rename = "gpt2-small")]
    Gpt2Small,
    #[serde(rename = "gpt2-medium")]
    Gpt2Medium,
    #[serde(rename = "gpt2-large")]
    Gpt2Large,
    #[serde(rename = "gpt2-xl")]
    Gpt2Xl,
}

/// A whole set of fields by name.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"preset": "gpt2-small"}))]
pub struct PresetModel {
    pub preset: Preset,
}

names! {
    ArchitectureName(Architecture),
    PositionsName(Positions),
    NormName(Norm),
    ActivationName(Activation),
}

/// A model's shape.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64}))]
pub struct ShapeFields {
    pub architecture: ArchitectureName,
    /// Blocks.
    #[schema(minimum = 1, maximum = 512)]
    pub layers: i64,
    /// Query heads.
    #[schema(minimum = 1, maximum = 512)]
    pub heads: i64,
    /// Key and value heads; divides `heads`. Default: `heads`.
    #[schema(minimum = 1, maximum = 512)]
    pub kv_heads: Option<i64>,
    /// Default: `width` ÷ `heads`, which must then divide.
    #[schema(minimum = 1, maximum = 1024)]
    pub head_dim: Option<i64>,
    /// Width of the residual stream.
    #[schema(minimum = 1, maximum = 65536)]
    pub width: i64,
    /// Default: 4 × `width` for gelu; 8/3 × `width`, up to the next multiple of 64, for swiglu.
    #[schema(minimum = 1, maximum = 262144)]
    pub mlp_width: Option<i64>,
    /// Longest sequence in tokens.
    #[schema(minimum = 2, maximum = 1048576)]
    pub context: i64,
    /// Default: learned.
    pub positions: Option<PositionsName>,
    /// Default: layer.
    pub norm: Option<NormName>,
    /// Default: gelu (the tanh approximation).
    pub activation: Option<ActivationName>,
    /// Whether linear layers and LayerNorm have biases. Default: true.
    pub bias: Option<bool>,
    /// Whether the output layer is the embedding. Default: true.
    pub tie_embeddings: Option<bool>,
    /// Default: 0.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub dropout: Option<f64>,
    /// Base of the rotary angles; only with `positions` rotary. Default: 10000.
    #[schema(exclusive_minimum = 0, maximum = 1e12)]
    pub rope_theta: Option<f64>,
    /// Default: 1e-5.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub norm_eps: Option<f64>,
}

/// A model's shape.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(transparent)]
pub struct ShapeBody(pub ShapeFields);

impl ToSchema for ShapeBody {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ShapeFields::schemas(schemas);
    }
}

impl PartialSchema for ShapeBody {
    /// The fields, of which `rope_theta` exists with rotary positions only.
    fn schema() -> RefOr<Schema> {
        let with_learned_positions = json!({
            "properties": {"positions": {"enum": ["learned", null]}, "rope_theta": {"type": "number"}},
            "required": ["rope_theta"],
        });
        schema::never(ShapeFields::schema(), with_learned_positions)
    }
}

/// What to train: a shape, or the name of one.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ModelBody {
    Shape(ShapeBody),
    Preset(PresetModel),
}

impl ModelBody {
    /// Every field, except the vocabulary (0 until the tokenizer is known).
    pub fn resolve(self) -> Result<ModelConfig, ApiError> {
        match self {
            ModelBody::Preset(PresetModel { preset }) => Ok(preset.config()),
            ModelBody::Shape(ShapeBody(fields)) => fields.resolve(),
        }
    }
}

impl ShapeFields {
    fn resolve(self) -> Result<ModelConfig, ApiError> {
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        if self.heads % kv_heads != 0 {
            return Err(contradiction("model.kv_heads", "`model.kv_heads` must divide `model.heads`."));
        }
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None if self.width % self.heads == 0 => self.width / self.heads,
            None => {
                let message = "`model.width` is not a multiple of `model.heads`: change either, or state `model.head_dim`.";
                return Err(contradiction("model.width", message));
            }
        };
        let positions = self.positions.map_or(Positions::Learned, |name| name.0);
        if positions == Positions::Rotary && head_dim % 2 != 0 {
            let message = format!(
                "Rotary positions need an even head dimension, and it is {head_dim}: change `model.width`, `model.heads` or `model.head_dim`."
            );
            return Err(contradiction("model.positions", &message));
        }
        let activation = self.activation.map_or(Activation::Gelu, |name| name.0);
        let mlp_width = self.mlp_width.unwrap_or(match activation {
            Activation::Gelu => 4 * self.width,
            Activation::Swiglu => {
                let multiples = (8 * self.width + 3 * SWIGLU_MULTIPLE - 1) / (3 * SWIGLU_MULTIPLE);
                multiples * SWIGLU_MULTIPLE
            }
        });
        Ok(ModelConfig {
            architecture: self.architecture.0,
            layers: self.layers,
            heads: self.heads,
            kv_heads,
            head_dim,
            width: self.width,
            mlp_width,
            context: self.context,
            vocabulary: 0,
            positions,
            norm: self.norm.map_or(Norm::Layer, |name| name.0),
            norm_eps: self.norm_eps.unwrap_or(1e-5),
            activation,
            bias: self.bias.unwrap_or(true),
            tie_embeddings: self.tie_embeddings.unwrap_or(true),
            dropout: self.dropout.unwrap_or(0.0),
            rope_theta: self.rope_theta.unwrap_or(10_000.0),
        })
    }
}

impl Preset {
    fn config(self) -> ModelConfig {
        let (layers, heads, width) = match self {
            Preset::Gpt2Small => (12, 12, 768),
            Preset::Gpt2Medium => (24, 16, 1024),
            Preset::Gpt2Large => (36, 20, 1280),
            Preset::Gpt2Xl => (48, 25, 1600),
        };
        ModelConfig {
            architecture: Architecture::Gpt,
            layers,
            heads,
            kv_heads: heads,
            head_dim: width / heads,
            width,
            mlp_width: 4 * width,
            context: 1024,
            vocabulary: 0,
            positions: Positions::Learned,
            norm: Norm::Layer,
            norm_eps: 1e-5,
            activation: Activation::Gelu,
            bias: true,
            tie_embeddings: true,
            dropout: 0.1,
            rope_theta: 10_000.0,
        }
    }
}
