//! What this host's KVM can do.

use crate::error::Error;
use crate::ioctl;
use kvm_ioctls::{Cap, Kvm};

/// Capabilities without which no machine runs, each with its plain name.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "the in-kernel interrupt controllers"),
    (Cap::Pit2, "the in-kernel timer (PIT2)"),
    (Cap::UserMemory, "user memory slots"),
    (Cap::SignalMsi, "interrupt messages (KVM_SIGNAL_MSI)"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SetTssAddr, "KVM_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "extended CPUID"),
    (Cap::MpState, "vCPU activity states"),
    (Cap::VcpuEvents, "vCPU events"),
    (Cap::Debugregs, "debug registers"),
    (Cap::Xsave, "XSAVE state"),
    (Cap::Xcrs, "XCR state"),
    (Cap::AdjustClock, "an adjustable kvmclock"),
];

/// Most vCPUs a machine can have anywhere: local APIC IDs are eight bits in the MP table, 255 is broadcast,
/// and the IOAPIC takes one.
pub const MAX_VCPUS: u8 = 254;

/// /dev/kvm, open, with everything this crate needs.
pub struct Host {
    kvm: Kvm,
}

impl Host {
    /// Opens /dev/kvm.
    ///
    /// # Errors
    /// [`Error::NoKvm`] or [`Error::Capability`].
    pub fn open() -> Result<Self, Error> {
        let kvm = ioctl::call("open", Kvm::new).map_err(|e| Error::NoKvm { source: e.source })?;
        if kvm.get_api_version() != 12 {
            return Err(Error::Capability { what: "API version 12" });
        }
        for (cap, what) in REQUIRED {
            if !kvm.check_extension(*cap) {
                return Err(Error::Capability { what });
            }
        }
        Ok(Host { kvm })
    }

    /// The open device.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Most vCPUs a machine can have here.
    pub fn most_vcpus(&self) -> u8 {
        // The `min` keeps it within a byte.
        self.kvm.get_max_vcpus().min(self.kvm.get_max_vcpu_id()).clamp(1, MAX_VCPUS.into()) as u8
    }

    /// Checks a number of vCPUs.
    ///
    /// # Errors
    /// [`Error::VcpuCount`] for none, or more than [`most_vcpus`](Self::most_vcpus).
    pub fn check_vcpus(&self, wanted: u32) -> Result<u8, Error> {
        let most = self.most_vcpus();
        u8::try_from(wanted)
            .ok()
            .filter(|n| (1..=most).contains(n))
            .ok_or(Error::VcpuCount { wanted, most: u32::from(most) })
    }
}
