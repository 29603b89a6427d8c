//! Architectures: one file each, reading like the paper's figure, and one line in the list below.
//!
//! An architecture is a type with the methods that [`Model`] hands on. It is built from a
//! [`ModelConfig`] and says how its parameters are named; everything else (training, checkpoints, the
//! engine) knows [`Model`] alone.

use tch::Tensor;

use crate::{
    config::ModelConfig,
    nn::{AttentionPlan, Parameters, Pass},
};

mod gpt;

/// Each `Name: type`; a request calls it by the name in snake case.
macro_rules! architectures {
    ($($(#[$meta:meta])* $name:ident: $type:ty,)+) => {
        listed_enum! {
            /// Which of the models below.
            Architecture { $($(#[$meta])* $name,)+ }
        }

        /// A model of any architecture.
        #[derive(Debug)]
        pub enum Model { $($name($type)),+ }

        impl Model {
            /// Builds the model and adds its parameters, named in a fixed order, to `parameters`.
            pub fn new(config: &ModelConfig, parameters: &mut Parameters) -> Model {
                match config.architecture { $(Architecture::$name => Model::$name(<$type>::new(config, parameters))),+ }
            }

            /// Numbers in a model of this shape, without building it.
            pub fn parameter_count(config: &ModelConfig) -> u64 {
                match config.architecture { $(Architecture::$name => <$type>::parameter_count(config)),+ }
            }

            /// Lays the weights out for answering alone, where the device has such a layout. Parameters are not
            /// looked at any more; training and saving are over.
            pub fn pack(&mut self) {
                match self { $(Model::$name(model) => model.pack()),+ }
            }

            /// The normed state over every position, `(b, t, width)`. Positions count within each document.
            pub fn hidden(&self, tokens_bt: &Tensor, positions_bt: &Tensor, pass: &mut Pass) -> Tensor {
                match self { $(Model::$name(model) => model.hidden(tokens_bt, positions_bt, pass)),+ }
            }

            /// Logits `(…, vocabulary)` of hidden states `(…, width)`; padded rows of the vocabulary have none.
            pub fn logits(&self, hidden: &Tensor) -> Tensor {
                match self { $(Model::$name(model) => model.logits(hidden)),+ }
            }
        }
    };
}

architectures! {
    Gpt: gpt::Gpt,
}

impl Model {
    /// Logits of every position, without dropout.
    pub fn forward(&self, tokens_bt: &Tensor, positions_bt: &Tensor, plan: &mut AttentionPlan) -> Tensor {
        self.logits(&self.hidden(tokens_bt, positions_bt, &mut Pass { plan, dropout: None }))
    }
}
