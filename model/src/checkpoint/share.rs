//! What a rank writes of a checkpoint: files of its own, and a note of what is in them.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
};

use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{FileEntry, ShardEntry, TensorEntry, file_entry, stored::Stored};
use crate::{
    failure,
    nn::{Parameter, Parameters, Piece, Twin},
    protocol::{Failure, FailureCode},
    pulse,
};

/// A piece of a logical tensor in memory.
#[derive(Debug)]
pub struct Held {
    pub piece: Piece,
    /// A view shaped like the piece.
    pub tensor: Tensor,
    /// Whether other ranks of the tensor axis hold other pieces.
    pub cut: bool,
    /// Where another stage holds the same.
    pub twin: Option<Twin>,
}

impl Held {
    /// The piece of a tensor that lies in memory as the piece says.
    pub fn new(piece: Piece, of: &Tensor, cut: bool, twin: Option<Twin>) -> Held {
        Held { tensor: piece.view(of), piece, cut, twin }
    }

    /// Every piece of a model's parameters.
    pub fn all(parameters: &Parameters) -> Vec<Held> {
        let held = |(piece, entry): (&Piece, &Parameter)| Held::new(piece.clone(), &entry.tensor, entry.is_cut(), entry.twin);
        parameters.pieces().map(held).collect()
    }
}

/// Files that a rank wrote, and the tensors in them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Share {
    pub files: BTreeMap<String, FileEntry>,
    pub tensors: BTreeMap<String, TensorEntry>,
}

impl Share {
    /// Writes `{stem}.safetensors`, or, where several ranks write one, `{stem}-{rank}.safetensors`. Nothing is written of nothing.
    pub fn add(&mut self, folder: &Path, stem: &str, rank: Option<usize>, held: &[Held]) -> Result<(), Failure> {
        let file = rank.map_or_else(|| format!("{stem}.safetensors"), |rank| format!("{stem}-{rank}.safetensors"));
        let mut keys = BTreeMap::new();
        for Held { piece, tensor, .. } in held.iter().filter(|held| held.piece.numbers() > 0) {
            let shard = ShardEntry { file: file.clone(), offset: piece.offset.clone(), shape: piece.shape.clone() };
            keys.insert(shard.key(&piece.name, &piece.whole), tensor);
            let dtype = dtype_name(tensor.kind()).into();
            let entry = || TensorEntry { dtype, shape: piece.whole.clone(), shards: Vec::new() };
            let shards = &mut self.tensors.entry(piece.name.clone()).or_insert_with(entry).shards;
            if !shards.contains(&shard) {
                shards.push(shard);
            }
        }
        if keys.is_empty() {
            return Ok(());
        }
        let never = RefCell::default();
        let views = keys.iter().map(|(key, tensor)| {
            let data = move || Ok(bytes_in(tensor));
            (key.as_str(), Lazy { kind: tensor.kind(), shape: sizes(&tensor.size()), data, failed: &never })
        });
        write(&folder.join(&file), views)?;
        self.files.insert(file.clone(), file_entry(&folder.join(file)).map_err(failure::io)?);
        Ok(())
    }

    /// Notes it beside its files, for [`Share::collect`].
    pub fn note(&self, folder: &Path, rank: usize) -> Result<(), Failure> {
        let bytes = serde_json::to_vec(self).map_err(|error| failure::new(FailureCode::Internal, error.to_string()))?;
        fs::write(folder.join(format!("share-{rank}.json")), bytes).map_err(failure::io)
    }

    /// What the first `ranks` ranks have noted in a folder, as one; the notes are removed.
    pub fn collect(folder: &Path, ranks: usize) -> Result<Share, Failure> {
        let mut all = Share::default();
        for rank in 0..ranks {
            let path = folder.join(format!("share-{rank}.json"));
            let bytes = fs::read(&path).map_err(failure::io)?;
            let share: Share =
                serde_json::from_slice(&bytes).map_err(|error| failure::new(FailureCode::Internal, error.to_string()))?;
            all.files.extend(share.files);
            for (name, entry) in share.tensors {
                match all.tensors.get_mut(&name) {
                    Some(known) => known.shards.extend(entry.shards),
                    None => _ = all.tensors.insert(name, entry),
                }
            }
            fs::remove_file(path).map_err(failure::io)?;
        }
        Ok(all)
    }
}

/// Writes whole tensors that lie in the files of several ranks as one file. One tensor at a time is in memory.
pub fn merge(stored: &Stored, path: &Path) -> Result<(), Failure> {
    let failed = RefCell::default();
    let views = stored.tensors().map(|(name, entry)| {
        let (kind, shape) = (kind_named(&entry.dtype), sizes(&entry.shape));
        (name, Lazy { kind, shape, data: move || stored.whole(name).map(|tensor| bytes_in(&tensor)), failed: &failed })
    });
    write(path, views)?;
    failed.into_inner().map_or(Ok(()), Err)
}

fn write<'a, V: View>(path: &Path, views: impl Iterator<Item = (&'a str, V)>) -> Result<(), Failure> {
    safetensors::serialize_to_file(views, None, path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => failure::io(error),
        error => failure::new(FailureCode::Internal, format!("weights cannot be written: {error}")),
    })?;
    File::open(path).and_then(|file| file.sync_all()).map_err(failure::io)
}

/// A tensor whose bytes are made when they are written.
struct Lazy<'a, D> {
    kind: Kind,
    shape: Vec<usize>,
    data: D,
    /// Why there were none; the file is worth nothing then.
    failed: &'a RefCell<Option<Failure>>,
}

impl<D: Fn() -> Result<Vec<u8>, Failure>> View for Lazy<'_, D> {
    fn dtype(&self) -> Dtype {
        if self.kind == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let data = (self.data)().map_err(|failure| *self.failed.borrow_mut() = Some(failure));
        Cow::Owned(data.unwrap_or_else(|()| vec![0; self.data_len()]))
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.kind.elt_size_in_bytes()
    }
}

fn sizes(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|&size| size as usize).collect()
}

pub fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "BF16",
        _ => "F32",
    }
}

pub fn kind_named(dtype: &str) -> Kind {
    match dtype {
        "BF16" => Kind::BFloat16,
        _ => Kind::Float,
    }
}

/// The numbers in row-major order, little-endian.
pub fn bytes_in(tensor: &Tensor) -> Vec<u8> {
    pulse::beat();
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}
