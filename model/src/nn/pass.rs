//! What accompanies the tokens through a forward pass.

use tch::Tensor;

use super::{Angles, AttentionPlan, Dropout, Site};

#[derive(Debug)]
pub struct Pass<'a> {
    pub plan: &'a mut AttentionPlan,
    /// `None` outside training and where the model has none.
    pub dropout: Option<&'a Dropout>,
    /// `(b, t, width)`: what the part of the model before hands on; `None` where this one is the first.
    pub received: Option<&'a Tensor>,
    /// Turns of queries and keys, where positions are rotary.
    pub angles: Option<Angles>,
}

impl<'a> Pass<'a> {
    /// Through a whole model, without dropout.
    pub fn plain(plan: &'a mut AttentionPlan) -> Pass<'a> {
        Pass { plan, dropout: None, received: None, angles: None }
    }

    /// What dropout leaves of `x_btc` at this place.
    pub fn dropped(&self, x_btc: Tensor, layer: usize, site: Site) -> Tensor {
        match self.dropout {
            Some(dropout) => dropout.apply(&x_btc, layer, site),
            None => x_btc,
        }
    }
}
