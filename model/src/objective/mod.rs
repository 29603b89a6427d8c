//! Objectives: what a model reads and what it is to predict. One file each, and one line in the list below.
//!
//! An objective is a function `pose(&mut Example, key)`. It gets a sequence as it lies in the data, where every
//! supervised place has the token after it as its target, and changes tokens and targets in place. What it
//! draws comes from [`crate::random`] under the key, which is the sequence's own: the same sequence is posed the
//! same way in any micro-batch and after a resume. Shapes stay as they are.

use crate::{
    data::batch::Example,
    random::{self, Stream},
};

mod causal_lm;

/// Each `Name: module`; a request calls it by the name in snake case.
macro_rules! objectives {
    ($($(#[$meta:meta])* $name:ident: $module:ident,)+) => {
        listed_enum! {
            /// Which of the objectives below.
            Objective { $($(#[$meta])* $name,)+ }
        }

        impl Objective {
            fn pose(self, example: &mut Example, key: u64) {
                match self { $(Objective::$name => $module::pose(example, key)),+ }
            }
        }
    };
}

objectives! {
    CausalLm: causal_lm,
}

/// An objective in a run.
#[derive(Clone, Copy, Debug)]
pub struct Posing {
    pub objective: Objective,
    pub seed: u64,
}

impl Posing {
    pub fn pose(self, example: &mut Example) {
        let key = random::key(self.seed, Stream::Masking, &example.sequence.to_le_bytes());
        self.objective.pose(example, key);
    }
}
