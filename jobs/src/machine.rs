//! The machine that this process runs on, or the part of it that its container may use.

use std::fs;

/// Its name; a container's is its id.
pub(crate) fn host() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "unknown".into())
}

/// Bytes of memory: the machine's, or the limit of the control group where that is less. Zero where
/// nothing tells.
pub(crate) fn memory_bytes() -> u64 {
    // Version 2 of control groups, then version 1; inside a container its own group is the root.
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = limits.iter().find_map(|file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok());
    let total = total(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    limit.map_or(total, |limit| limit.min(total))
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
fn total(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_in_bytes() {
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       16384 kB\n"), 16 << 20);
        assert_eq!(total(""), 0);
        assert!(memory_bytes() > 1 << 20);
    }
}
