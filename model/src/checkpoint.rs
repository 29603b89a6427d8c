//! Checkpoints and models on disk.
//!
//! A checkpoint is a folder with `weights.safetensors`, `optimizer.safetensors` and `manifest.json`,
//! written last: a folder without a manifest is not a checkpoint. Ranks of which none has all write files of their own,
//! such as `weights-1.safetensors`. The manifest lists every logical tensor with its shards, so any ranks can read what any
//! others have written. A model is a folder with `weights.safetensors`, `config.json` and its tokenizer's files. A checkpoint
//! holds these too, so it is served and tuned as it lies, without a copy of its weights. Names are
//! logical (see [`crate::nn::Parameters`]); padding is never written.

mod share;
mod stored;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    config::{JobSpec, Method, ModelConfig, Template},
    failure,
    nn::Parameters,
    protocol::{Failure, FailureCode, Numerics},
    pulse,
    tokenizer::Tokenizer,
    train::state::TrainState,
};
pub use share::{Held, Share};
use share::{bytes_in, dtype_name};
use stored::Stored;

const FORMAT: u32 = 1;
/// Stems of files.
pub const WEIGHTS: &str = "weights";
pub const OPTIMIZER: &str = "optimizer";
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

impl ShardEntry {
    /// Its name in its file.
    fn key(&self, name: &str, whole: &[i64]) -> String {
        if self.shape == whole { name.to_owned() } else { format!("{name}{:?}", self.offset) }
    }
}

/// What training has in memory besides tensors.
pub struct Trained<'a> {
    pub spec: &'a JobSpec,
    pub state: &'a TrainState,
    pub numerics: &'a Numerics,
    /// The folder of the tokenizer's files.
    pub tokenizer: &'a Path,
}

/// Makes an empty folder beside `folder`, into which ranks write what is to stand there.
///
/// # Errors
/// `disk_full` if fewer than `reserve_bytes` would stay free beside `bytes`.
pub fn stage(folder: &Path, bytes: u64, reserve_bytes: u64) -> Result<(), Failure> {
    let parent = folder.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(failure::io)?;
    let free = free_bytes(parent).map_err(failure::io)?;
    if free < bytes.saturating_add(reserve_bytes) {
        let message = format!(
            "a checkpoint needs {bytes} bytes and {reserve_bytes} must stay free, but the disk has only {free}: free some space, then resume the job"
        );
        return Err(Failure { retryable: true, ..failure::new(FailureCode::DiskFull, message) });
    }
    let staged = staged(folder);
    if staged.exists() {
        fs::remove_dir_all(&staged).map_err(failure::io)?;
    }
    fs::create_dir(&staged).map_err(failure::io)
}

/// Where [`stage`] makes a folder.
pub fn staged(folder: &Path) -> PathBuf {
    folder.with_extension("tmp")
}

/// Makes a checkpoint of what `ranks` ranks have staged, replacing one that is there.
pub fn conclude(folder: &Path, trained: &Trained, ranks: usize) -> Result<(), Failure> {
    let staged = staged(folder);
    let Share { mut files, tensors } = Share::collect(&staged, ranks)?;
    write_model_files(&staged, trained.spec, trained.tokenizer, None)?;
    for name in Tokenizer::FILES.into_iter().chain([CONFIG]) {
        files.insert(name.into(), file_entry(&staged.join(name)).map_err(failure::io)?);
    }
    let manifest = Manifest {
        format: FORMAT,
        step: trained.state.step,
        spec: trained.spec.clone(),
        state: trained.state.clone(),
        numerics: trained.numerics.clone(),
        files,
        tensors,
    };
    write_json(&staged.join(MANIFEST), &manifest).map_err(failure::io)?;
    publish(&staged, folder).map_err(failure::io)
}

/// Whether the folder is a whole checkpoint: every file has its size and its hash.
pub fn verify(folder: &Path) -> Result<Manifest, Failure> {
    let manifest = read_manifest(folder)?;
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

fn read_manifest(folder: &Path) -> Result<Manifest, Failure> {
    let bytes = fs::read(folder.join(MANIFEST)).map_err(|error| unreadable(folder, &error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| unreadable(folder, &error.to_string()))
}

/// Reads of a verified checkpoint what this rank holds of its weights and of its optimiser's state.
pub fn load(folder: &Path, weights: &[Held], optimizer: &[Held]) -> Result<(), Failure> {
    read(folder, WEIGHTS)?.fill(weights, |_| false)?;
    read(folder, OPTIMIZER)?.fill(optimizer, |_| false)
}

/// What lies in the file with this stem, or in several.
fn read(folder: &Path, stem: &str) -> Result<Stored, Failure> {
    let alone = folder.join(file_name(stem));
    if alone.exists() {
        return Stored::open(&alone);
    }
    let in_parts = |entry: &TensorEntry| entry.shards.iter().all(|shard| shard.file.starts_with(stem));
    let tensors = read_manifest(folder)?.tensors.into_iter().filter(|(_, entry)| in_parts(entry)).collect();
    Stored::of(folder, tensors)
}

fn file_name(stem: &str) -> String {
    format!("{stem}.safetensors")
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

/// Makes a model's folder of the weights that `ranks` ranks have staged for it; the hash of its weights.
pub fn conclude_model(folder: &Path, spec: &JobSpec, tokenizer: &Path, ranks: usize) -> Result<String, Failure> {
    let staged = staged(folder);
    let Share { files, tensors } = Share::collect(&staged, ranks)?;
    if files.len() > 1 {
        share::merge(&Stored::of(&staged, tensors)?, &staged.join(file_name(WEIGHTS)))?;
        files.keys().try_for_each(|file| fs::remove_file(staged.join(file))).map_err(failure::io)?;
    }
    let weights_sha256 = weights_sha256(&Stored::open(&staged.join(file_name(WEIGHTS)))?)?;
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
    let (stored, weights) = (read(folder, WEIGHTS)?, Held::all(parameters));
    let found = stored.tensors().count();
    if found != weights.len() {
        return Err(unreadable(folder, &format!("it holds {found} tensors, the model has {}", weights.len())));
    }
    stored.fill(&weights, |_| false)
}

/// Reads a base model's weights into parameters whose vocabulary may be larger. The new rows of the
/// embedding and of the output are the mean of the old ones, so that a new token is at first as likely
/// as an average one and takes nothing from the others (Hewitt, *Initializing new word embeddings for
/// pretrained language models*, 2021).
pub fn load_base(folder: &Path, weights: &[Held]) -> Result<(), Failure> {
    read(folder, WEIGHTS)?.fill(weights, |name| ["embedding.weight", "head.weight"].contains(&name))
}

/// SHA-256 over the logical weights in name order: each one's name, dtype, shape and bytes.
fn weights_sha256(stored: &Stored) -> Result<String, Failure> {
    let mut digest = Sha256::new();
    for (name, entry) in stored.tensors() {
        let tensor = stored.whole(name)?;
        let shape = entry.shape.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        digest.update(format!("{name}\n{}\n{shape}\n", dtype_name(tensor.kind())));
        digest.update(bytes_in(&tensor));
    }
    Ok(hex::encode(digest.finalize()))
}

fn unreadable(folder: &Path, reason: &str) -> Failure {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    failure::new(FailureCode::CheckpointUnreadable, format!("{name} cannot be read: {reason}"))
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
