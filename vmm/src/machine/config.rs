//! What a machine consists of.

use super::Reboot;
use crate::cpuid;
use crate::error::Error;
use crate::host::Host;
use crate::memory::{PageSize, Thp};
use crate::serial::SerialOutput;
use crate::virtio::{DeviceConfig, LocalConfig};
use kvm_bindings::kvm_cpuid_entry2;

/// Most bytes of a machine's name.
pub const MAX_NAME: usize = 128;

/// What a machine is called that nobody gave a name.
pub const DEFAULT_NAME: &str = "vm";

/// A name that no machine can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a machine's name has 1 to {MAX_NAME} bytes, and no control characters")]
pub struct BadName;

/// Whether a machine can have this name.
///
/// # Errors
/// [`BadName`].
pub fn check_name(name: &str) -> Result<(), BadName> {
    let good = (1..=MAX_NAME).contains(&name.len()) && !name.contains(char::is_control);
    if good { Ok(()) } else { Err(BadName) }
}

/// What a machine consists of.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What its operators call it; it keeps the name when it moves. See [`check_name`].
    pub name: String,
    /// Bytes of RAM.
    pub memory: u64,
    /// What backs it.
    pub pages: PageSize,
    /// Whether it may come to lie in transparent huge pages, which this host decides for itself.
    pub thp: Thp,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The CPU all vCPUs are told they are, before each gets its identity.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The guest's TSC frequency in kHz; `None` for the host's own.
    pub tsc_khz: Option<u32>,
    /// What follows a reset that the guest asks for.
    pub reboot: Reboot,
    /// Where serial output goes.
    pub serial: SerialOutput,
    /// PCI devices, in the order of their places on the bus.
    pub devices: Vec<DeviceConfig>,
    /// What of them this host decides for itself.
    pub local: LocalConfig,
}

impl MachineConfig {
    /// A machine called `vm`, with this host's baseline CPU, 4 KiB pages, serial output to stdout and no PCI
    /// devices, which ends when its guest asks for a reset.
    ///
    /// # Errors
    /// [`Error::Kvm`] if KVM cannot say what it supports.
    pub fn new(host: &Host, memory: u64, vcpus: u32) -> Result<Self, Error> {
        Ok(MachineConfig {
            name: DEFAULT_NAME.into(),
            memory,
            pages: PageSize::Small,
            thp: Thp::default(),
            vcpus,
            cpuid: cpuid::baseline(host.kvm())?,
            tsc_khz: None,
            reboot: Reboot::Never,
            serial: SerialOutput::Stdout,
            devices: Vec::new(),
            local: LocalConfig::default(),
        })
    }
}
