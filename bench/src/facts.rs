//! The properties of the machine that figures depend on.

use serde::{Deserialize, Serialize};
use std::fs;
use std::process::Command;

/// The properties that are saved with every measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// This program's version.
    pub version: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// The CPU as the kernel names it.
    pub cpu_model: Option<String>,
    /// Whether the machine is itself a virtual one.
    pub virtual_machine: bool,
    /// Memory in bytes.
    pub memory: Option<u64>,
    /// The kernel's release.
    pub kernel: Option<String>,
    /// Transparent huge pages for memfds: the choice in brackets.
    pub shmem_huge_pages: Option<String>,
    /// Receive buffer of TCP sockets: minimum, default and maximum in bytes.
    pub tcp_rmem: Option<String>,
    /// Send buffer of TCP sockets: minimum, default and maximum in bytes.
    pub tcp_wmem: Option<String>,
    /// TCP's default congestion control.
    pub tcp_congestion: Option<String>,
    /// First line of `iperf3 --version`.
    pub iperf3: Option<String>,
    /// First line of `qemu-system-x86_64 --version`.
    pub qemu: Option<String>,
}

impl Facts {
    /// Gathers the properties. Those that cannot be determined are `None`.
    pub fn gather() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Facts {
            version: env!("CARGO_PKG_VERSION").into(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_model: field(&cpuinfo, "model name").map(String::from),
            virtual_machine: field(&cpuinfo, "flags")
                .is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor")),
            memory: field(&meminfo, "MemTotal").and_then(kibibytes),
            kernel: line_of("/proc/sys/kernel/osrelease"),
            shmem_huge_pages: line_of("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            tcp_rmem: line_of("/proc/sys/net/ipv4/tcp_rmem"),
            tcp_wmem: line_of("/proc/sys/net/ipv4/tcp_wmem"),
            tcp_congestion: line_of("/proc/sys/net/ipv4/tcp_congestion_control"),
            iperf3: version_of("iperf3"),
            qemu: version_of("qemu-system-x86_64"),
        }
    }
}

/// The value of the first `name : value` line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn kibibytes(value: &str) -> Option<u64> {
    value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Resident bytes of a process, shared memory included.
pub fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    field(&status, "VmRSS").and_then(kibibytes)
}

fn line_of(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn version_of(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "VmRSSx:\t 1 kB\nVmRSS:\t  2048 kB\nflags\t\t: fpu hypervisor\n";
        assert_eq!(field(text, "VmRSS").and_then(kibibytes), Some(2 << 20));
        assert_eq!(field(text, "flags"), Some("fpu hypervisor"));
        assert_eq!(field(text, "Vm"), None);
        assert_eq!(kibibytes("many kB"), None);
    }

    #[test]
    fn this_process_is_resident() {
        assert!(resident(std::process::id()).is_some_and(|bytes| bytes > 0));
    }
}
