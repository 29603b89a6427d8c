//! What accompanies the tokens through a forward pass.

use tch::Tensor;

use super::{AttentionPlan, Dropout, Site};

#[derive(Debug)]
pub struct Pass<'a> {
    pub plan: &'a mut AttentionPlan,
    /// `None` outside training and where the model has none.
    pub dropout: Option<&'a Dropout>,
}

impl Pass<'_> {
    /// What dropout leaves of `x_btc` at this place.
    pub fn dropped(&self, x_btc: Tensor, layer: usize, site: Site) -> Tensor {
        match self.dropout {
            Some(dropout) => dropout.apply(&x_btc, layer, site),
            None => x_btc,
        }
    }
}
