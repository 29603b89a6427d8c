//! The layers that architectures are made of, and the parameters that they share with optimisers and
//! files.
//!
//! Layers read single-device: which part of a product is this rank's, and where its results meet those of others, is in
//! [`Linear`], [`Embedding`] and [`Parameters`] alone. Methods panic where shapes disagree, as tch does: shapes are checked
//! when a model is built, and the worker and the engine catch at their borders.

pub mod attention;
mod blocks;
mod cache;
mod cached;
mod documents;
mod dropout;
mod layers;
mod masked;
mod packed;
mod parameters;
mod pass;
mod piece;
mod rotary;

pub use attention::{Attention, AttentionPlan};
pub use blocks::Blocks;
pub use cache::{CacheShape, KvCache, Placement, Row, Span};
pub use cached::CachedAttention;
pub use documents::Documents;
pub use dropout::{Dropout, Site};
pub use layers::{Embedding, Linear, Mlp, NormLayer};
pub use masked::MaskedAttention;
pub use packed::Packed;
pub use parameters::{Cut, Init, Parameter, Parameters, Twin};
pub use pass::Pass;
pub use piece::Piece;
pub use rotary::{Angles, Rotary};
