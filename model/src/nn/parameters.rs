//! Parameters by name.
//!
//! What is one tensor in memory may be several logical tensors: the queries', keys' and values'
//! projections are fused so that one product computes all three, and the vocabulary is padded. A
//! [`Parameter`] is such a tensor with its [`Part`]s, ranges of rows with names of their own. Files,
//! counts and initial values know parts only; rows outside every part are padding and stay zero.

use std::{collections::BTreeMap, ops::Range};

use tch::{Device, Kind, Tensor};

use crate::{pulse, random};

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    /// Mean 0 and this deviation, from (seed, name).
    Normal(f64),
}

/// A logical tensor: rows of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub name: String,
    pub rows: Range<i64>,
}

#[derive(Debug)]
pub struct Parameter {
    pub tensor: Tensor,
    pub parts: Vec<Part>,
}

impl Parameter {
    /// The part's rows of any tensor shaped like this parameter, such as an optimiser's state.
    pub fn view(of: &Tensor, part: &Part) -> Tensor {
        of.narrow(0, part.rows.start, part.rows.end - part.rows.start)
    }

    /// Matrices decay, vectors (biases and norms) do not.
    pub fn is_matrix(&self) -> bool {
        self.tensor.dim() > 1
    }
}

/// Every parameter of a model in the order in which it was built.
#[derive(Debug)]
pub struct Parameters {
    entries: Vec<Parameter>,
    device: Device,
    kind: Kind,
    /// `None`: initial values are zero, because they will be read from a file.
    seed: Option<u64>,
    trainable: bool,
}

impl Parameters {
    /// To be trained: fp32 with gradients, initial values from `seed`.
    pub fn trainable(device: Device, seed: u64) -> Parameters {
        Parameters { entries: Vec::new(), device, kind: Kind::Float, seed: Some(seed), trainable: true }
    }

    /// To be read from a file and only used.
    pub fn frozen(device: Device, kind: Kind) -> Parameters {
        Parameters { entries: Vec::new(), device, kind, seed: None, trainable: false }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// A new parameter of one part.
    pub fn add(&mut self, name: String, shape: &[i64], init: Init) -> Tensor {
        self.add_parts(&[(name, shape[0])], &shape[1..], 0, init)
    }

    /// A new parameter whose parts follow one another, each so many rows of shape `inner`, and then
    /// `padding` rows of zeros.
    ///
    /// # Panics
    /// If a name is taken: architectures name their own parameters.
    pub fn add_parts(&mut self, names: &[(String, i64)], inner: &[i64], padding: i64, init: Init) -> Tensor {
        pulse::beat();
        let mut parts: Vec<Part> = Vec::with_capacity(names.len());
        for (name, rows) in names {
            assert!(!self.parts().any(|(part, _)| part.name == *name), "two parameters are named {name}");
            let start = parts.last().map_or(0, |part| part.rows.end);
            parts.push(Part { name: name.clone(), rows: start..start + rows });
        }
        let rows = parts.last().map_or(0, |part| part.rows.end) + padding;
        let shape = [&[rows], inner].concat();
        let tensor = Tensor::zeros(&shape, (Kind::Float, Device::Cpu));
        for part in &parts {
            self.initialize(&Parameter::view(&tensor, part), &part.name, init);
        }
        let tensor = tensor.to_device(self.device).to_kind(self.kind).set_requires_grad(self.trainable);
        self.entries.push(Parameter { tensor: tensor.shallow_clone(), parts });
        tensor
    }

    fn initialize(&self, view: &Tensor, name: &str, init: Init) {
        let Some(seed) = self.seed else { return };
        let mut view = view.shallow_clone();
        match init {
            Init::Zeros => {}
            Init::Ones => _ = view.fill_(1.0),
            Init::Normal(std) => {
                let mut values = vec![0f32; view.numel()];
                random::normal(seed, name, std, &mut values);
                view.copy_(&Tensor::from_slice(&values).view_as(&view));
            }
        }
    }

    pub fn entries(&self) -> &[Parameter] {
        &self.entries
    }

    /// Every part with its parameter, in the order of building.
    pub fn parts(&self) -> impl Iterator<Item = (&Part, &Parameter)> {
        self.entries.iter().flat_map(|entry| entry.parts.iter().map(move |part| (part, entry)))
    }

    /// Views of the logical tensors in name order, without gradient tracking.
    pub fn logical(&self) -> BTreeMap<&str, Tensor> {
        self.parts().map(|(part, entry)| (part.name.as_str(), Parameter::view(&entry.tensor.detach(), part))).collect()
    }

    /// Numbers in all parts: padding does not count.
    pub fn count(&self) -> u64 {
        self.logical().values().map(|view| view.numel() as u64).sum()
    }
}
