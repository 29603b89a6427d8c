//! Architectures: one file each, reading like the paper's figure, and one line in the list below.
//!
//! An architecture is a type with the methods that `Net` hands on. It is built from a
//! [`ModelConfig`] and says how its parameters are named; everything else (training, checkpoints, the
//! engine) knows [`Model`] alone.

use tch::Tensor;

use crate::{
    config::ModelConfig,
    nn::{Angles, AttentionPlan, Parameters, Pass},
    parallel::{Residence, Stage, TensorAxis, Unit, stages::Costs},
};

mod gpt;

/// Each `Name: type`; a request calls it by the name in snake case.
macro_rules! architectures {
    ($($(#[$meta:meta])* $name:ident: $type:ty,)+) => {
        listed_enum! {
            /// Which of the models below.
            Architecture { $($(#[$meta])* $name,)+ }
        }

        #[derive(Debug)]
        enum Net { $($name($type)),+ }

        impl Net {
            fn new(config: &ModelConfig, parameters: &mut Parameters) -> Net {
                match config.architecture { $(Architecture::$name => Net::$name(<$type>::new(config, parameters))),+ }
            }

            fn parameter_count(config: &ModelConfig) -> u64 {
                match config.architecture { $(Architecture::$name => <$type>::parameter_count(config)),+ }
            }

            fn pack(&mut self) {
                match self { $(Net::$name(net) => net.pack()),+ }
            }

            fn embed(&self, tokens_bt: &Tensor, positions_bt: &Tensor, pass: &Pass) -> Tensor {
                match self { $(Net::$name(net) => net.embed(tokens_bt, positions_bt, pass)),+ }
            }

            fn angles(&self, positions_bt: &Tensor) -> Option<Angles> {
                match self { $(Net::$name(net) => net.angles(positions_bt)),+ }
            }

            fn layer(&self, layer: i64, x_btc: &Tensor, pass: &mut Pass) -> Tensor {
                match self { $(Net::$name(net) => net.layer(layer, x_btc, pass)),+ }
            }

            fn finish(&self, x_btc: &Tensor) -> Tensor {
                match self { $(Net::$name(net) => net.finish(x_btc)),+ }
            }

            fn logits(&self, hidden: &Tensor) -> Tensor {
                match self { $(Net::$name(net) => net.logits(hidden)),+ }
            }
        }
    };
}

architectures! {
    Gpt: gpt::Gpt,
}

/// A model of any architecture; where ranks share its layers or have some of them, a rank's part of it.
#[derive(Debug)]
pub struct Model {
    /// In the order of the model, which others may lie between.
    parts: Vec<(Stage, Net)>,
    axis: TensorAxis,
    residence: Residence,
}

impl Model {
    /// Builds the model and adds its parameters, named in a fixed order, to `parameters`.
    pub fn new(config: &ModelConfig, parameters: &mut Parameters) -> Model {
        Model::of(config, parameters, vec![Stage::whole(config.layers)])
    }

    /// These parts of it.
    pub fn of(config: &ModelConfig, parameters: &mut Parameters, stages: Vec<Stage>) -> Model {
        let build = |stage: Stage| {
            parameters.begin(stage.clone());
            (stage, Net::new(config, parameters))
        };
        let parts = stages.into_iter().map(build).collect();
        Model { parts, axis: parameters.axis().clone(), residence: Residence::default() }
    }

    /// From now on parameters are where this says.
    pub fn reside(&mut self, residence: Residence) {
        self.residence = residence;
    }

    /// Numbers in a model of this shape, without building it.
    pub fn parameter_count(config: &ModelConfig) -> u64 {
        Net::parameter_count(config)
    }

    /// What computing its parts costs: weights that a token meets.
    pub fn costs(config: &ModelConfig) -> Costs {
        let head = config.vocabulary * config.width;
        let tables = head * (1 + i64::from(!config.tie_embeddings));
        let layers = Model::parameter_count(config) as i64 - tables;
        Costs { layer: layers as f64 / config.layers as f64, head: head as f64 }
    }

    /// Lays the weights out for answering alone, where the device has such a layout. Parameters are not
    /// looked at any more; training and saving are over.
    pub fn pack(&mut self) {
        self.parts.iter_mut().for_each(|(_, net)| net.pack());
    }

    /// The normed state over every position, `(b, t, width)`. Positions count within each document.
    pub fn hidden(&self, tokens_bt: &Tensor, positions_bt: &Tensor, pass: &mut Pass) -> Tensor {
        self.hidden_of(0, tokens_bt, positions_bt, pass)
    }

    /// The same for one of the parts that are here. What one that is not the last hands on is not normed, and its positions are
    /// this rank's.
    pub fn hidden_of(&self, part: usize, tokens_bt: &Tensor, positions_bt: &Tensor, pass: &mut Pass) -> Tensor {
        let (stage, net) = &self.parts[part];
        self.residence.require(Unit::Rest);
        let mut x_btc = match pass.received {
            Some(received) => received.shallow_clone(),
            None => self.residence.again(Unit::Rest, net.embed(tokens_bt, positions_bt, pass)),
        };
        pass.angles = net.angles(positions_bt);
        for layer in stage.layers.clone() {
            let next = Some(layer + 1).filter(|next| stage.layers.contains(next)).map(Unit::Layer);
            x_btc = self.residence.through(Unit::Layer(layer), next, &x_btc, |x_btc| net.layer(layer, x_btc, pass));
        }
        if !stage.is_last {
            return x_btc;
        }
        self.residence.again(Unit::Rest, self.axis.enter(&net.finish(&x_btc)))
    }

    /// Logits `(…, vocabulary)` of hidden states `(…, width)`; padded rows of the vocabulary have none. Where ranks share the
    /// vocabulary, those of this rank's rows.
    ///
    /// # Panics
    /// If the last part of the model is not here.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.residence.again(Unit::Rest, self.parts[self.parts.len() - 1].1.logits(hidden))
    }

    /// Logits of every position, without dropout.
    pub fn forward(&self, tokens_bt: &Tensor, positions_bt: &Tensor, plan: &mut AttentionPlan) -> Tensor {
        self.logits(&self.hidden(tokens_bt, positions_bt, &mut Pass::plain(plan)))
    }
}
