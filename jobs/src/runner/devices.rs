//! What a runner has to offer: which devices were found, and why those.

use lathe_model::protocol::DeviceChoice;
use serde::Serialize;
use serde_json::Value;

/// One device, as `runners.devices` shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Device {
    #[serde(flatten)]
    pub choice: DeviceChoice,
    pub name: String,
    /// CPU threads that work on this device may use.
    pub threads: usize,
    /// Why it is offered.
    pub why: String,
}

impl Device {
    pub fn describe(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

/// The CUDA devices of this machine, or all its cores as one. Loads libtorch's CUDA half, so it blocks.
pub fn find() -> Vec<Device> {
    let found = lathe_model::device::find();
    let why = found.reasons.join("; ");
    if found.cuda_devices == 0 {
        return vec![cpu(&why)];
    }
    let threads = (found.cpu_cores / found.cuda_devices).max(1);
    let device =
        |index| Device { choice: DeviceChoice::Cuda { index }, name: format!("CUDA device {index}"), threads, why: why.clone() };
    (0..found.cuda_devices).map(device).collect()
}

/// All cores as one device.
pub fn cpu(why: &str) -> Device {
    let threads = cores();
    Device { choice: DeviceChoice::Cpu, name: processor_name(), threads, why: why.to_owned() }
}

/// Cores that this process may run on.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn processor_name() -> String {
    let described = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = described
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned()));
    named.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}
