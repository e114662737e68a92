//! What a machine consists of.

use crate::cpuid;
use crate::error::Error;
use crate::host::Host;
use crate::memory::PageSize;
use crate::serial::SerialOutput;
use crate::virtio::{DeviceConfig, LocalConfig};
use kvm_bindings::kvm_cpuid_entry2;

/// What a machine consists of.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Bytes of RAM.
    pub memory: u64,
    /// What backs it.
    pub pages: PageSize,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The CPU all vCPUs are told they are, before each gets its identity.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The guest's TSC frequency in kHz; `None` for the host's own.
    pub tsc_khz: Option<u32>,
    /// Where serial output goes.
    pub serial: SerialOutput,
    /// PCI devices, in the order of their places on the bus.
    pub devices: Vec<DeviceConfig>,
    /// What of them this host decides for itself.
    pub local: LocalConfig,
}

impl MachineConfig {
    /// A machine with this host's baseline CPU, 4 KiB pages, serial output to stdout and no PCI devices.
    ///
    /// # Errors
    /// [`Error::Kvm`] if KVM cannot say what it supports.
    pub fn new(host: &Host, memory: u64, vcpus: u32) -> Result<Self, Error> {
        Ok(MachineConfig {
            memory,
            pages: PageSize::Small,
            vcpus,
            cpuid: cpuid::baseline(host.kvm())?,
            tsc_khz: None,
            serial: SerialOutput::Stdout,
            devices: Vec::new(),
            local: LocalConfig::default(),
        })
    }
}
