//! Checkpoints and models on disk.
//!
//! A checkpoint is a folder with `weights.safetensors`, `optimizer.safetensors` and `manifest.json`,
//! written last: a folder without a manifest is not a checkpoint. The manifest lists every logical
//! tensor with its shards, so that the same format holds one rank's checkpoint and many ranks'. A
//! model is a folder with `weights.safetensors`, `config.json` and its tokenizer's files. A checkpoint
//! holds these too, so it is served and tuned as it lies, without a copy of its weights. Names are
//! logical (see [`crate::nn::Parameters`]); padding is never written.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::{
    config::{JobSpec, Method, ModelConfig, Template},
    failure,
    nn::Parameters,
    optim::Adamw,
    protocol::{Failure, FailureCode, Numerics},
    pulse,
    tokenizer::Tokenizer,
    train::state::TrainState,
};

const FORMAT: u32 = 1;
const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const MANIFEST: &str = "manifest.json";
const CONFIG: &str = "config.json";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub step: u64,
    /// With nothing left open.
    pub spec: JobSpec,
    pub state: TrainState,
    pub numerics: Numerics,
    pub files: BTreeMap<String, FileEntry>,
    pub tensors: BTreeMap<String, TensorEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub bytes: u64,
    pub sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    pub dtype: String,
    /// Of the whole tensor.
    pub shape: Vec<i64>,
    pub shards: Vec<ShardEntry>,
}

/// A rectangle of the tensor, which starts at `offset` in every dimension.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    pub file: String,
    pub offset: Vec<i64>,
    pub shape: Vec<i64>,
}

/// What training has in memory.
pub struct Trained<'a> {
    pub spec: &'a JobSpec,
    pub state: &'a TrainState,
    pub numerics: &'a Numerics,
    pub parameters: &'a Parameters,
    pub optimizer: &'a Adamw,
    /// The folder of the tokenizer's files.
    pub tokenizer: &'a Path,
}

/// Writes the checkpoint of `trained.state.step` to `folder`, replacing one that is there.
///
/// # Errors
/// `disk_full` before anything is written if fewer than `reserve_bytes` would stay free.
pub fn save(folder: &Path, trained: &Trained, reserve_bytes: u64) -> Result<(), Failure> {
    let weights = owned(trained.parameters.logical());
    let optimizer: Tensors = trained.optimizer.logical(trained.parameters).into_iter().collect();
    let bytes = bytes_of(&weights) + bytes_of(&optimizer);
    let staged = fresh_folder(folder, bytes, reserve_bytes)?;
    let mut manifest = Manifest {
        format: FORMAT,
        step: trained.state.step,
        spec: trained.spec.clone(),
        state: trained.state.clone(),
        numerics: trained.numerics.clone(),
        files: BTreeMap::new(),
        tensors: BTreeMap::new(),
    };
    for (file, tensors) in [(WEIGHTS, &weights), (OPTIMIZER, &optimizer)] {
        manifest.files.insert(file.into(), write_tensors(&staged.join(file), tensors)?);
        for (name, tensor) in tensors {
            let shard = ShardEntry { file: file.into(), offset: vec![0; tensor.dim()], shape: tensor.size() };
            let entry = TensorEntry { dtype: dtype_name(tensor.kind()).into(), shape: tensor.size(), shards: vec![shard] };
            manifest.tensors.insert(name.clone(), entry);
        }
    }
    write_model_files(&staged, trained.spec, trained.tokenizer, None)?;
    for name in Tokenizer::FILES.into_iter().chain([CONFIG]) {
        manifest.files.insert(name.into(), file_entry(&staged.join(name)).map_err(failure::io)?);
    }
    write_json(&staged.join(MANIFEST), &manifest).map_err(failure::io)?;
    publish(&staged, folder).map_err(failure::io)
}

/// Whether the folder is a whole checkpoint: every file has its size and its hash.
pub fn verify(folder: &Path) -> Result<Manifest, Failure> {
    let manifest: Manifest = fs::read(folder.join(MANIFEST))
        .map_err(|error| unreadable(folder, &error.to_string()))
        .and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| unreadable(folder, &error.to_string())))?;
    if manifest.format != FORMAT {
        return Err(unreadable(folder, &format!("its format is {}, this version reads {FORMAT}", manifest.format)));
    }
    for (name, entry) in &manifest.files {
        let found = file_entry(&folder.join(name)).map_err(|error| unreadable(folder, &format!("{name}: {error}")))?;
        if found != *entry {
            return Err(unreadable(folder, &format!("{name} is not what was written")));
        }
    }
    Ok(manifest)
}

/// Reads a verified checkpoint's weights and optimiser state into memory that is already there.
pub fn load(folder: &Path, parameters: &Parameters, optimizer: &Adamw) -> Result<(), Failure> {
    read_into(&folder.join(WEIGHTS), owned(parameters.logical()), fits)?;
    read_into(&folder.join(OPTIMIZER), optimizer.logical(parameters).into_iter().collect(), fits)
}

/// What `config.json` of a model says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFile {
    pub format: u32,
    pub model: ModelConfig,
    pub template: Option<Template>,
    /// What the template was when the model learned it.
    #[serde(default)]
    pub template_sha256: Option<String>,
    pub method: Method,
    /// The job that made it.
    pub spec: JobSpec,
    /// Absent in a checkpoint, whose manifest has the hashes of its files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_sha256: Option<String>,
}

/// Writes a model's folder with a copy of its tokenizer; the hash of its weights.
pub fn save_model(
    folder: &Path,
    spec: &JobSpec,
    parameters: &Parameters,
    tokenizer: &Path,
    reserve_bytes: u64,
) -> Result<String, Failure> {
    let weights = owned(parameters.logical());
    let staged = fresh_folder(folder, bytes_of(&weights), reserve_bytes)?;
    write_tensors(&staged.join(WEIGHTS), &weights)?;
    let weights_sha256 = weights_sha256(parameters);
    write_model_files(&staged, spec, tokenizer, Some(weights_sha256.clone()))?;
    publish(&staged, folder).map_err(failure::io)?;
    Ok(weights_sha256)
}

/// What makes a folder with weights a model: its configuration and its tokenizer's files.
fn write_model_files(folder: &Path, spec: &JobSpec, tokenizer: &Path, weights_sha256: Option<String>) -> Result<(), Failure> {
    for name in Tokenizer::FILES {
        let to = folder.join(name);
        fs::copy(tokenizer.join(name), &to).and_then(|_| File::open(&to)?.sync_all()).map_err(failure::io)?;
    }
    let template = spec.method.template();
    let file = ModelFile {
        format: FORMAT,
        model: spec.model.clone(),
        template,
        template_sha256: template.map(Template::sha256),
        method: spec.method.clone(),
        spec: spec.clone(),
        weights_sha256,
    };
    write_json(&folder.join(CONFIG), &file).map_err(failure::io)
}

/// What a model's folder says of it.
///
/// # Errors
/// Also if this version renders the model's template otherwise than the one that trained it: its
/// prompts would no longer be what the model has learned.
pub fn read_model_file(folder: &Path) -> Result<ModelFile, Failure> {
    let file: ModelFile = read_config(folder)?;
    check_template(folder, file.template, file.template_sha256.as_deref())?;
    Ok(file)
}

/// The shape alone, under the same condition.
pub fn read_shape(folder: &Path) -> Result<ModelConfig, Failure> {
    #[derive(Deserialize)]
    struct Shape {
        model: ModelConfig,
        template: Option<Template>,
        template_sha256: Option<String>,
    }
    let shape: Shape = read_config(folder)?;
    check_template(folder, shape.template, shape.template_sha256.as_deref())?;
    Ok(shape.model)
}

fn read_config<T: for<'de> Deserialize<'de>>(folder: &Path) -> Result<T, Failure> {
    let bytes = fs::read(folder.join(CONFIG)).map_err(|error| unreadable(folder, &error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| unreadable(folder, &error.to_string()))
}

/// Models of versions that noted no hash pass.
fn check_template(folder: &Path, template: Option<Template>, trained: Option<&str>) -> Result<(), Failure> {
    let (Some(template), Some(trained)) = (template, trained) else { return Ok(()) };
    if template.sha256() == trained {
        return Ok(());
    }
    let reason = format!(
        "this version renders the template {} otherwise than the version that trained the model: serve it with that version, or tune it again",
        template.name()
    );
    Err(unreadable(folder, &reason))
}

/// Reads a model's weights into parameters of the same shape.
pub fn load_weights(folder: &Path, parameters: &Parameters) -> Result<(), Failure> {
    read_into(&folder.join(WEIGHTS), owned(parameters.logical()), fits)
}

/// Reads a base model's weights into parameters whose vocabulary may be larger. The new rows of the
/// embedding and of the output are the mean of the old ones, so that a new token is at first as likely
/// as an average one and takes nothing from the others (Hewitt, *Initializing new word embeddings for
/// pretrained language models*, 2021).
pub fn load_base(folder: &Path, parameters: &Parameters) -> Result<(), Failure> {
    read_into(&folder.join(WEIGHTS), owned(parameters.logical()), fits_a_base)
}

/// Whether a stored tensor of this name and shape may be read into one of that shape.
fn fits(_name: &str, stored: &[i64], wanted: &[i64]) -> bool {
    stored == wanted
}

/// The same for a base model's, whose vocabulary may be smaller.
fn fits_a_base(name: &str, stored: &[i64], wanted: &[i64]) -> bool {
    let is_vocabulary = ["embedding.weight", "head.weight"].contains(&name);
    let fits_but_for_rows = || stored.len() == 2 && stored[1..] == wanted[1..] && (1..wanted[0]).contains(&stored[0]);
    fits(name, stored, wanted) || is_vocabulary && fits_but_for_rows()
}

/// SHA-256 over the logical weights in name order: each one's name, dtype, shape and bytes.
pub fn weights_sha256(parameters: &Parameters) -> String {
    let mut digest = Sha256::new();
    for (name, tensor) in parameters.logical() {
        let shape = tensor.size().iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        digest.update(format!("{name}\n{}\n{shape}\n", dtype_name(tensor.kind())));
        digest.update(bytes_in(&tensor));
    }
    hex::encode(digest.finalize())
}

type Tensors = BTreeMap<String, Tensor>;

fn owned(tensors: BTreeMap<&str, Tensor>) -> Tensors {
    tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
}

fn bytes_of(tensors: &Tensors) -> u64 {
    tensors.values().map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
}

fn unreadable(folder: &Path, reason: &str) -> Failure {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    failure::new(FailureCode::CheckpointUnreadable, format!("{name} cannot be read: {reason}"))
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "BF16",
        _ => "F32",
    }
}

/// The numbers in row-major order, little-endian.
fn bytes_in(tensor: &Tensor) -> Vec<u8> {
    pulse::beat();
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0u8; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

struct Bytes {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn write_tensors(path: &Path, tensors: &Tensors) -> Result<FileEntry, Failure> {
    let views = tensors.iter().map(|(name, tensor)| {
        let dtype = if tensor.kind() == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 };
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        (name.as_str(), Bytes { dtype, shape, bytes: bytes_in(tensor) })
    });
    safetensors::serialize_to_file(views, None, path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => failure::io(error),
        error => failure::new(FailureCode::Internal, format!("weights cannot be written: {error}")),
    })?;
    File::open(path).and_then(|file| file.sync_all()).map_err(failure::io)?;
    file_entry(path).map_err(failure::io)
}

/// Fills tensors from a file that holds exactly these names, in shapes that `accepts` says may be read.
/// Rows that a stored tensor has not become the mean of those that it has.
fn read_into(path: &Path, tensors: Tensors, accepts: impl Fn(&str, &[i64], &[i64]) -> bool) -> Result<(), Failure> {
    let damaged = |reason: String| unreadable(path, &reason);
    let file = File::open(path).map_err(|error| damaged(error.to_string()))?;
    // SAFETY: published folders are immutable; the bytes are copied before the map is dropped.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|error| damaged(error.to_string()))?;
    let stored = SafeTensors::deserialize(&map).map_err(|error| damaged(error.to_string()))?;
    if stored.len() != tensors.len() {
        return Err(damaged(format!("it holds {} tensors, the model has {}", stored.len(), tensors.len())));
    }
    let _guard = tch::no_grad_guard();
    for (name, tensor) in tensors {
        pulse::beat();
        let view = stored.tensor(&name).map_err(|_| damaged(format!("{name} is missing")))?;
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::BF16 => Kind::BFloat16,
            other => return Err(damaged(format!("{name} is of type {other:?}"))),
        };
        let size = tensor.size();
        if !accepts(&name, &shape, &size) {
            return Err(damaged(format!("{name} has the shape {shape:?}, the model's is {size:?}")));
        }
        let read = Tensor::from_data_size(view.data(), &shape, kind);
        if shape == size {
            tensor.shallow_clone().copy_(&read);
        } else {
            tensor.narrow(0, 0, shape[0]).copy_(&read);
            tensor.narrow(0, shape[0], size[0] - shape[0]).copy_(&read.mean_dim(0, true, Kind::Float));
        }
    }
    Ok(())
}

fn file_entry(path: &Path) -> io::Result<FileEntry> {
    let mut digest = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0u8; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = io::Read::read(&mut file, &mut buffer)?;
        if read == 0 {
            return Ok(FileEntry { bytes, sha256: hex::encode(digest.finalize()) });
        }
        pulse::beat();
        digest.update(&buffer[..read]);
        bytes += read as u64;
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut file = File::create(path)?;
    serde_json::to_writer_pretty(&mut file, value)?;
    file.sync_all()
}

/// An empty folder beside `folder` to write into.
fn fresh_folder(folder: &Path, bytes: u64, reserve_bytes: u64) -> Result<PathBuf, Failure> {
    let parent = folder.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(failure::io)?;
    let free = free_bytes(parent).map_err(failure::io)?;
    if free < bytes.saturating_add(reserve_bytes) {
        let message = format!(
            "a checkpoint needs {bytes} bytes and {reserve_bytes} must stay free, but the disk has only {free}: free some space, then resume the job"
        );
        return Err(Failure { retryable: true, ..failure::new(FailureCode::DiskFull, message) });
    }
    let staged = folder.with_extension("tmp");
    if staged.exists() {
        fs::remove_dir_all(&staged).map_err(failure::io)?;
    }
    fs::create_dir(&staged).map_err(failure::io)?;
    Ok(staged)
}

fn publish(staged: &Path, folder: &Path) -> io::Result<()> {
    File::open(staged)?.sync_all()?;
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::rename(staged, folder)?;
    File::open(folder.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Bytes that this process may still write to the folder's file system.
fn free_bytes(folder: &Path) -> io::Result<u64> {
    let path = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes()).map_err(io::Error::other)?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path is NUL-terminated, and the struct is read only after a success filled it.
    let stat = unsafe {
        if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        stat.assume_init()
    };
    Ok(stat.f_bavail as u64 * stat.f_frsize as u64)
}

#[cfg(test)]
mod tests;
