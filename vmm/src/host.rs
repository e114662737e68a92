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
        let kvm = ioctl::retried!("open", Kvm::new()).map_err(|e| Error::NoKvm { source: e.source })?;
        if ioctl::api_version(&kvm)? != 12 {
            return Err(Error::Capability { what: "API version 12" });
        }
        for (cap, what) in REQUIRED {
            if ioctl::capability(&kvm, *cap as u32)? == 0 {
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
        // Kernels that have no such number allow four vCPUs, and as many identities as vCPUs.
        let [most, identities] = [Cap::MaxVcpus, Cap::MaxVcpuId]
            .map(|cap| ioctl::capability(&self.kvm, cap as u32).ok().filter(|number| *number > 0));
        let most = most.unwrap_or(4);
        // The `min` keeps it within a byte.
        most.min(identities.unwrap_or(most)).clamp(1, MAX_VCPUS.into()) as u8
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
