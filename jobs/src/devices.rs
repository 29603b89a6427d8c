//! What a runner has to offer: which devices were found, and why those.
//!
//! CUDA is asked about in a child (`lathe devices`): a driver that crashes or hangs takes that one along
//! and not the runner, which then offers its cores.

use std::{os::unix::process::ExitStatusExt, path::Path, process::Stdio, time::Duration};

use lathe_model::{device::Found, protocol::DeviceChoice};
use serde::Serialize;
use serde_json::Value;
use tokio::process::Command;

use crate::child;

/// How long the first question to a driver may take.
const PROBE: Duration = Duration::from_secs(60);

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

/// The CUDA devices of this machine, or its cores as so many devices.
pub async fn find(program: &Path, cpu_slots: usize) -> Vec<Device> {
    if !lathe_model::device::has_cuda_library() {
        // Without CUDA's library there is nothing to load.
        return offer(lathe_model::device::find(), cpu_slots);
    }
    offer(probe(program, PROBE).await, cpu_slots)
}

/// What `program devices` prints; where it does not, the reason and no CUDA device.
pub async fn probe(program: &Path, limit: Duration) -> Found {
    let mut command = Command::new(program);
    command.arg("devices").stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    command.env_clear().envs(child::inherited());
    let why = match tokio::time::timeout(limit, command.output()).await {
        Err(_) => format!("it did not end in {} seconds", limit.as_secs_f64()),
        Ok(Err(error)) => error.to_string(),
        Ok(Ok(output)) if !output.status.success() => match output.status.signal() {
            Some(signal) => format!("it was ended by signal {signal}"),
            None => format!("it ended with {}", output.status),
        },
        Ok(Ok(output)) => match serde_json::from_slice::<Found>(&output.stdout) {
            Ok(found) => return found,
            Err(error) => format!("its answer is not understood: {error}"),
        },
    };
    tracing::error!(why, "the child that looks for CUDA devices failed");
    let reason = format!("no CUDA: the child that looks for its devices failed ({why}); see the runner's log");
    Found { cuda_devices: 0, cpu_cores: cores(), reasons: vec![reason] }
}

fn offer(found: Found, cpu_slots: usize) -> Vec<Device> {
    let why = found.reasons.join("; ");
    if found.cuda_devices == 0 {
        let slots = cpu_slots.max(1);
        return vec![Device { threads: (cores() / slots).max(1), ..cpu(&why) }; slots];
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
