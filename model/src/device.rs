//! Devices: what this host offers, and why.
//!
//! The binary links libtorch's CPU half. Where a CUDA build of the same libtorch stands in the same
//! folder, its CUDA half is loaded before the first question about CUDA, which registers it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Cuda, Device, Tensor};

use crate::{protocol::DeviceChoice, shim};

/// What was found, and the reasons in sentences, for the log and for `runners`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    pub cuda_devices: usize,
    pub cpu_cores: usize,
    pub reasons: Vec<String>,
}

/// Looks for CUDA once, then counts. Call before anything else asks about CUDA in this process.
pub fn find() -> Found {
    let cpu_cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let mut found = Found { cuda_devices: 0, cpu_cores, reasons: Vec::new() };
    let Some(library) = cuda_library() else {
        found.reasons.push("no CUDA: libtorch_cuda.so is not beside libtorch_cpu.so, so this libtorch is a CPU build".into());
        return found;
    };
    if let Err(error) = shim::load_library(&library) {
        found.reasons.push(format!("no CUDA: {} does not load: {error}", library.display()));
        return found;
    }
    found.cuda_devices = usize::try_from(Cuda::device_count()).unwrap_or(0);
    found.reasons.push(match found.cuda_devices {
        0 => "no CUDA: libtorch has its CUDA half, but there is no driver or no device".into(),
        count => format!("{count} CUDA device(s) through {}", library.display()),
    });
    found
}

/// Whether [`find`] would load CUDA's library into this process, and with it a driver that may crash.
pub fn has_cuda_library() -> bool {
    cuda_library().is_some()
}

/// The CUDA half in the folder that the CPU half was loaded from. The two must be of one build.
fn cuda_library() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let cpu = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.ends_with("/libtorch_cpu.so"))?;
    let library = Path::new(cpu).with_file_name("libtorch_cuda.so");
    library.exists().then_some(library)
}

/// The device of a task.
///
/// # Errors
/// A sentence if it is not there.
pub fn open(choice: DeviceChoice) -> Result<Device, String> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda { index } => {
            let found = find();
            if index < found.cuda_devices {
                return Ok(Device::Cuda(index));
            }
            Err(format!("CUDA device {index} is not available: {}", found.reasons.join("; ")))
        }
    }
}

/// A tensor of the host on the device. The copy to CUDA is queued behind what runs there, from pinned
/// memory, so the host does not wait for the device.
pub fn upload(tensor: Tensor, device: Device) -> Tensor {
    match device {
        Device::Cuda(_) => tensor.pin_memory(device).to_device_(device, tensor.kind(), true, false),
        _ => tensor,
    }
}

/// Whether bf16 products are native here: on the CPU by its instructions; of CUDA it is taken for granted, as it
/// holds from Ampere on.
pub fn has_bf16(device: Device) -> bool {
    if device.is_cuda() {
        return true;
    }
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    flags.split_whitespace().any(|flag| ["avx512_bf16", "amx_bf16", "bf16"].contains(&flag))
}
