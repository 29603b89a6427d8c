//! Tensors in files: read whole, or the rectangle that a rank wants, from whichever files hold it.

use std::{collections::BTreeMap, fs::File, ops::Range, path::Path};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::{Held, ShardEntry, TensorEntry, share::kind_named, unreadable};
use crate::{nn::Piece, protocol::Failure, pulse};

/// Tensors of a folder, wherever in its files they lie.
pub struct Stored {
    files: BTreeMap<String, Mapped>,
    tensors: BTreeMap<String, TensorEntry>,
}

struct Mapped {
    map: Mmap,
    /// Type, shape and place of each.
    tensors: BTreeMap<String, (Kind, Vec<i64>, Range<usize>)>,
}

impl Mapped {
    fn open(path: &Path) -> Result<Mapped, Failure> {
        let damaged = |reason: String| unreadable(path, &reason);
        let file = File::open(path).map_err(|error| damaged(error.to_string()))?;
        // SAFETY: published folders are immutable, and what is staged is read by those who wrote it; bytes are copied.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| damaged(error.to_string()))?;
        let stored = SafeTensors::deserialize(&map).map_err(|error| damaged(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in stored.iter() {
            let kind = match view.dtype() {
                Dtype::F32 => Kind::Float,
                Dtype::BF16 => Kind::BFloat16,
                other => return Err(damaged(format!("{name} is of type {other:?}"))),
            };
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            let shape = view.shape().iter().map(|&size| size as i64).collect();
            tensors.insert(name.to_owned(), (kind, shape, start..start + view.data().len()));
        }
        drop(stored);
        Ok(Mapped { map, tensors })
    }
}

impl Stored {
    /// Of one file that holds whole tensors.
    pub fn open(path: &Path) -> Result<Stored, Failure> {
        let mapped = Mapped::open(path)?;
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let entry = |(name, (kind, shape, _)): (&String, &(Kind, Vec<i64>, _))| {
            let shard = ShardEntry { file: file.clone(), offset: vec![0; shape.len()], shape: shape.clone() };
            let dtype = super::share::dtype_name(*kind).into();
            (name.clone(), TensorEntry { dtype, shape: shape.clone(), shards: vec![shard] })
        };
        let tensors = mapped.tensors.iter().map(entry).collect();
        Ok(Stored { files: BTreeMap::from([(file, mapped)]), tensors })
    }

    /// Of those of a folder's files that hold these tensors.
    pub fn of(folder: &Path, tensors: BTreeMap<String, TensorEntry>) -> Result<Stored, Failure> {
        let mut files = BTreeMap::new();
        for shard in tensors.values().flat_map(|entry| &entry.shards) {
            if !files.contains_key(&shard.file) {
                files.insert(shard.file.clone(), Mapped::open(&folder.join(&shard.file))?);
            }
        }
        Ok(Stored { files, tensors })
    }

    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Fills pieces of tensors. Where `grows` says of a tensor that it may have more rows than are stored, the others become
    /// the mean of those that are.
    pub fn fill(&self, held: &[Held], grows: impl Fn(&str) -> bool) -> Result<(), Failure> {
        let _no_grad = tch::no_grad_guard();
        for Held { piece, tensor, .. } in held {
            pulse::beat();
            let name = &piece.name;
            let entry = self.tensors.get(name).ok_or_else(|| damaged(&format!("{name} is missing")))?;
            let missing = piece.numbers() - self.copy(entry, piece, tensor)?;
            if missing == 0 && entry.shape == piece.whole {
                continue;
            }
            let (stored, wanted) = (&entry.shape, &piece.whole);
            let fits_but_for_rows =
                stored.len() == 2 && wanted.len() == 2 && stored[1] == wanted[1] && (1..=wanted[0]).contains(&stored[0]);
            if !(grows(name) && fits_but_for_rows) {
                return Err(damaged(&format!("{name} has the shape {stored:?}, the model's is {wanted:?}")));
            }
            let known = (stored[0] - piece.offset[0]).clamp(0, piece.shape[0]);
            let mean = self.whole(name)?.mean_dim(0, true, Kind::Float).narrow(1, piece.offset[1], piece.shape[1]);
            tensor.narrow(0, known, piece.shape[0] - known).copy_(&mean);
        }
        Ok(())
    }

    /// A whole tensor.
    pub fn whole(&self, name: &str) -> Result<Tensor, Failure> {
        let entry = self.tensors.get(name).ok_or_else(|| damaged(&format!("{name} is missing")))?;
        let (whole, offset) = (entry.shape.clone(), vec![0; entry.shape.len()]);
        let piece = Piece { name: name.to_owned(), shape: whole.clone(), whole, offset, start: 0 };
        let tensor = Tensor::zeros(&piece.shape, (kind_named(&entry.dtype), Device::Cpu));
        match self.copy(entry, &piece, &tensor)? == piece.numbers() {
            true => Ok(tensor),
            false => Err(damaged(&format!("parts of {name} are missing"))),
        }
    }

    /// Copies what is stored of a piece; how many numbers that is.
    fn copy(&self, entry: &TensorEntry, piece: &Piece, into: &Tensor) -> Result<i64, Failure> {
        if entry.shape.len() != piece.shape.len() {
            return Ok(0);
        }
        let mut copied = 0;
        for shard in &entry.shards {
            if copied == piece.numbers() {
                break;
            }
            let Some(common) = Common::of(shard, piece) else { continue };
            let source = self.rows(&piece.name, entry, shard, &common)?;
            let cut = |tensor: &Tensor, at: &[i64], from: usize| {
                let dimensions = from..common.shape.len();
                dimensions.fold(tensor.shallow_clone(), |cut, dimension| {
                    cut.narrow(dimension as i64, at[dimension], common.shape[dimension])
                })
            };
            cut(into, &common.in_piece, 0).copy_(&cut(&source, &common.in_shard, 1));
            copied += common.shape.iter().product::<i64>();
        }
        Ok(copied)
    }

    /// The rows of a shard that it has in common with a piece.
    fn rows(&self, name: &str, entry: &TensorEntry, shard: &ShardEntry, common: &Common) -> Result<Tensor, Failure> {
        let key = shard.key(name, &entry.shape);
        let mapped = self.files.get(&shard.file).ok_or_else(|| damaged(&format!("{} is missing", shard.file)))?;
        let found = mapped.tensors.get(&key).filter(|(_, shape, _)| *shape == shard.shape);
        let (kind, shape, range) = found.ok_or_else(|| damaged(&format!("{name} is not in {}", shard.file)))?;
        let bytes = &mapped.map[range.clone()];
        let [rows, inner @ ..] = shape.as_slice() else { return Ok(Tensor::from_data_size(bytes, &[], *kind)) };
        let row = bytes.len() / (*rows).max(1) as usize;
        let (first, count) = (common.in_shard[0] as usize, common.shape[0] as usize);
        let bytes = &bytes[first * row..(first + count) * row];
        Ok(Tensor::from_data_size(bytes, &[&[common.shape[0]], inner].concat(), *kind))
    }
}

fn damaged(reason: &str) -> Failure {
    unreadable(Path::new("a checkpoint"), reason)
}

/// What a shard and a piece have in common.
struct Common {
    in_shard: Vec<i64>,
    in_piece: Vec<i64>,
    shape: Vec<i64>,
}

impl Common {
    fn of(shard: &ShardEntry, piece: &Piece) -> Option<Common> {
        let mut common = Common { in_shard: Vec::new(), in_piece: Vec::new(), shape: Vec::new() };
        for dimension in 0..piece.shape.len() {
            let (ours, theirs) = (piece.offset[dimension], *shard.offset.get(dimension)?);
            let start = ours.max(theirs);
            let end = (ours + piece.shape[dimension]).min(theirs.checked_add(*shard.shape.get(dimension)?)?);
            if start >= end {
                return None;
            }
            common.in_shard.push(start - theirs);
            common.in_piece.push(start - ours);
            common.shape.push(end - start);
        }
        Some(common)
    }
}
