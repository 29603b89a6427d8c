//! Parameters by name.
//!
//! What is one tensor in memory may be several logical tensors: the queries', keys' and values'
//! projections are fused so that one product computes all three, and the vocabulary is padded. Where a layer is shared
//! by several ranks, each has a part of it. A [`Parameter`] is a tensor in memory with its [`Piece`]s, which have names of
//! their own. Files, counts and initial values know pieces only; what is outside all of them is padding and stays zero.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::Piece;
use crate::{
    parallel::{Stage, TensorAxis},
    pulse, random,
};

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    /// Mean 0 and this deviation, from (seed, name).
    Normal(f64),
}

/// How a parameter is shared by the ranks of the tensor axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Each rank has all of it.
    Whole,
    /// Each has as many rows of every part.
    Rows,
    /// Each has as many columns.
    Columns,
    /// The rows of a vocabulary, padded so that each rank has as many.
    Vocabulary,
}

/// Which of two equal parameters it is, where the first stage of a pipeline and the last have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twin {
    /// The first stage's, which counts.
    Original,
    Copy,
}

#[derive(Debug)]
pub struct Parameter {
    pub tensor: Tensor,
    pub pieces: Vec<Piece>,
    pub cut: Cut,
    pub twin: Option<Twin>,
}

impl Parameter {
    /// Matrices decay, vectors (biases and norms) do not.
    pub fn is_matrix(&self) -> bool {
        self.tensor.dim() > 1
    }

    /// Whether other ranks of the tensor axis have other numbers.
    pub fn is_cut(&self) -> bool {
        self.cut != Cut::Whole
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
    axis: TensorAxis,
    /// What is built now; `None`: all.
    stage: Option<Stage>,
}

impl Parameters {
    /// To be trained: fp32 with gradients, initial values from `seed`.
    pub fn trainable(device: Device, seed: u64) -> Parameters {
        let axis = TensorAxis::alone();
        Parameters { entries: Vec::new(), device, kind: Kind::Float, seed: Some(seed), trainable: true, axis, stage: None }
    }

    /// To be read from a file and only used.
    pub fn frozen(device: Device, kind: Kind) -> Parameters {
        let axis = TensorAxis::alone();
        Parameters { entries: Vec::new(), device, kind, seed: None, trainable: false, axis, stage: None }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// Of this rank, of those that share every layer. Before the first parameter.
    pub fn over(self, axis: TensorAxis) -> Parameters {
        Parameters { axis, ..self }
    }

    /// The ranks that share every layer.
    pub fn axis(&self) -> &TensorAxis {
        &self.axis
    }

    /// What is built from now on is of this part of the model.
    pub fn begin(&mut self, stage: Stage) {
        self.stage = Some(stage);
    }

    /// The part of a model of so many layers that is being built.
    pub fn stage(&self, layers: i64) -> Stage {
        self.stage.clone().unwrap_or_else(|| Stage::whole(layers))
    }

    /// The newest parameter is one that the first stage and the last both have.
    pub fn tie(&mut self) {
        let is_first = self.stage.as_ref().is_some_and(|stage| stage.is_first);
        if let Some(entry) = self.entries.last_mut().filter(|_| self.stage.as_ref().is_some_and(|stage| !stage.is_whole())) {
            entry.twin = Some(if is_first { Twin::Original } else { Twin::Copy });
        }
    }

    /// A new parameter of one logical tensor, all of it.
    pub fn add(&mut self, name: String, shape: &[i64], init: Init) -> Tensor {
        self.add_cut(&[(name, shape[0])], &shape[1..], Cut::Whole, init)
    }

    /// A new parameter of several logical tensors, whose rows follow one another: each of so many, of shape `inner`, over all
    /// ranks. The cut must divide them.
    ///
    /// # Panics
    /// If a name is taken: architectures name their own parameters.
    pub fn add_cut(&mut self, parts: &[(String, i64)], inner: &[i64], cut: Cut, init: Init) -> Tensor {
        pulse::beat();
        let (mut pieces, mut rows) = (Vec::with_capacity(parts.len()), 0);
        let mut local_inner = inner.to_vec();
        for (name, whole_rows) in parts {
            assert!(!self.pieces().any(|(piece, _)| piece.name == *name), "two parameters are named {name}");
            let whole = [&[*whole_rows], inner].concat();
            let (offset, shape, padded_rows) = self.share(&whole, cut);
            local_inner = shape[1..].to_vec();
            let start = rows * local_inner.iter().product::<i64>();
            pieces.push(Piece { name: name.clone(), whole, offset, shape, start });
            rows += padded_rows;
        }
        let tensor = Tensor::zeros([&[rows], local_inner.as_slice()].concat(), (Kind::Float, Device::Cpu));
        pieces.iter().for_each(|piece| self.initialize(piece, &tensor, init));
        let tensor = tensor.to_device(self.device).to_kind(self.kind).set_requires_grad(self.trainable);
        self.entries.push(Parameter { tensor: tensor.shallow_clone(), pieces, cut, twin: None });
        tensor
    }

    /// Where this rank's part of a tensor starts, its shape, and its rows with padding.
    fn share(&self, whole: &[i64], cut: Cut) -> (Vec<i64>, Vec<i64>, i64) {
        let (rank, size) = (self.axis.rank(), self.axis.size());
        let (mut offset, mut shape) = (vec![0; whole.len()], whole.to_vec());
        match cut {
            Cut::Whole => {}
            Cut::Rows | Cut::Columns => {
                let dimension = usize::from(cut == Cut::Columns);
                shape[dimension] /= size;
                offset[dimension] = rank * shape[dimension];
            }
            Cut::Vocabulary => {
                let (own, padded) = self.axis.vocabulary(whole[0]);
                (offset[0], shape[0]) = (own.start, own.end - own.start);
                return (offset, shape, padded);
            }
        }
        let rows = shape[0];
        (offset, shape, rows)
    }

    fn initialize(&self, piece: &Piece, tensor: &Tensor, init: Init) {
        let Some(seed) = self.seed else { return };
        let mut view = piece.view(tensor);
        match init {
            Init::Zeros => {}
            Init::Ones => _ = view.fill_(1.0),
            Init::Normal(std) => {
                let mut values = vec![0f32; view.numel()];
                for (first, range) in piece.runs() {
                    random::normal(seed, &piece.name, std, first, &mut values[range]);
                }
                view.copy_(&Tensor::from_slice(&values).view_as(&view));
            }
        }
    }

    pub fn entries(&self) -> &[Parameter] {
        &self.entries
    }

    /// Every piece with its parameter, in the order of building.
    pub fn pieces(&self) -> impl Iterator<Item = (&Piece, &Parameter)> {
        self.entries.iter().flat_map(|entry| entry.pieces.iter().map(move |piece| (piece, entry)))
    }

    /// Views of the logical tensors in name order, as far as they are here, without gradient tracking.
    pub fn logical(&self) -> BTreeMap<&str, Tensor> {
        self.pieces().map(|(piece, entry)| (piece.name.as_str(), piece.view(&entry.tensor))).collect()
    }

    /// Numbers in all logical tensors of which a part is here: padding does not count.
    pub fn count(&self) -> u64 {
        self.pieces().map(|(piece, _)| piece.whole.iter().product::<i64>() as u64).sum()
    }
}
