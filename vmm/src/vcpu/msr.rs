//! Model-specific registers: which are saved, and what to do where a host refuses one.
//!
//! KVM lists what it can save. The MTRRs, which it omits, are added to that list. These are left out:
//!
//! - performance counters, VMX capabilities and other registers of features that the CPUID
//!   baseline hides, which a guest cannot have used;
//! - IA32_TSC and IA32_TSC_DEADLINE, which are restored on their own, in order.
//!
//! Registers that KVM refuses to read are skipped: what cannot be read was never offered. A
//! register that KVM refuses to set fails the load, with two exceptions: it already has the value
//! that it should get, or it is in [`TOLERATED`].

use crate::component::Error;
use crate::ioctl::{self, KvmContext, KvmError};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// Most registers that a state may have.
pub const MAX_MSRS: usize = 4096;

pub const IA32_TSC: u32 = 0x10;
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Read-only enumeration of CPU vulnerabilities. Some hosts let nobody set it, and the destination
/// has its own true value.
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;

/// Registers that a destination may refuse to set: they describe the host, and hold nothing of the guest.
pub const TOLERATED: &[u32] = &[IA32_ARCH_CAPABILITIES];

/// MTRRs: capability (read-only, so not there), default type, fixed and variable ranges.
const MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// KVM has eight variable ranges, two registers each.
const MTRR_VARIABLE: std::ops::Range<u32> = 0x200..0x210;

/// Registers of features that the baseline hides.
fn hidden(msr: u32) -> bool {
    matches!(msr,
        // PMU: counters, selectors, fixed counters, global control, capabilities, PEBS.
        0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x345 | 0x38d..=0x390 | 0x3f1 | 0x3f2 | 0x600
        | 0x4c1..=0x4c8 | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b | 0xc000_0300..=0xc000_0303
        // VMX and SVM.
        | 0x480..=0x493 | 0xc001_0114 | 0xc001_0117
        // Hyper-V's synthetic registers, some of which count time.
        | 0x4000_0000..=0x4000_01ff
        // Processor trace, SGX launch control, AMX's XFD.
        | 0x560..=0x58f | 0x8c..=0x8f | 0x1c4 | 0x1c5)
}

/// All registers to be saved on this host.
pub fn savable(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = ioctl::retried!("KVM_GET_MSR_INDEX_LIST", kvm.get_msr_index_list())?;
    let mut msrs = list.as_slice().to_vec();
    msrs.extend(MTRR_FIXED);
    msrs.extend(MTRR_VARIABLE);
    msrs.push(MTRR_DEFAULT);
    msrs.sort_unstable();
    msrs.dedup();
    msrs.retain(|msr| !hidden(*msr) && ![IA32_TSC, IA32_TSC_DEADLINE].contains(msr));
    Ok(msrs)
}

fn table(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries)
        .map_err(|_| std::io::Error::from_raw_os_error(libc::E2BIG))
        .context("a list of MSRs, which is too long")
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// One register.
pub fn read(vcpu: &VcpuFd, msr: u32) -> Result<u64, KvmError> {
    let mut msrs = table(&[entry(msr, 0)])?;
    match ioctl::retried!("KVM_GET_MSRS", vcpu.get_msrs(&mut msrs))? {
        0 => Err(std::io::Error::from_raw_os_error(libc::EINVAL)).context("KVM_GET_MSRS"),
        _ => Ok(msrs.as_slice()[0].data),
    }
}

/// Sets one register of vCPU number `index`.
pub fn write(vcpu: &VcpuFd, index: u8, msr: u32, value: u64) -> Result<(), Error> {
    restore(vcpu, index, &[(msr, value)])
}

/// The registers of one vCPU that KVM can read, ready to be read in one call.
pub struct MsrTable(Msrs);

impl MsrTable {
    /// Finds out which of `wanted` can be read.
    pub fn probe(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Self, KvmError> {
        let mut left: Vec<_> = wanted.iter().map(|msr| entry(*msr, 0)).collect();
        let mut readable = Vec::with_capacity(left.len());
        while !left.is_empty() {
            // KVM stops at the first register that it refuses, and says how many came before.
            let mut msrs = table(&left)?;
            let read = ioctl::retried!("KVM_GET_MSRS", vcpu.get_msrs(&mut msrs))?.min(left.len());
            readable.extend(left.drain(..read));
            left.drain(..1.min(left.len()));
        }
        Ok(MsrTable(table(&readable)?))
    }

    /// Their numbers.
    pub fn indices(&self) -> Vec<u32> {
        self.0.as_slice().iter().map(|e| e.index).collect()
    }

    /// Reads all.
    pub fn save(&mut self, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, KvmError> {
        let expected = self.0.as_slice().len();
        let read = ioctl::retried!("KVM_GET_MSRS", vcpu.get_msrs(&mut self.0))?;
        if read != expected {
            // All of them could be read when the vCPU was made; only guessing could go on here.
            return Err(std::io::Error::from_raw_os_error(libc::EIO)).context("KVM_GET_MSRS");
        }
        Ok(self.0.as_slice().iter().map(|e| (e.index, e.data)).collect())
    }
}

/// Sets registers of vCPU number `index`, in the order given.
pub fn restore(vcpu: &VcpuFd, index: u8, values: &[(u32, u64)]) -> Result<(), Error> {
    let entries: Vec<_> = values.iter().map(|(msr, value)| entry(*msr, *value)).collect();
    let mut from = 0;
    while from < entries.len() {
        let msrs = table(&entries[from..])?;
        let set = ioctl::retried!("KVM_SET_MSRS", vcpu.set_msrs(&msrs))?;
        from += set;
        if let Some(&(msr, value)) = values.get(from) {
            let has_it = read(vcpu, msr).is_ok_and(|current| current == value);
            if !has_it && !TOLERATED.contains(&msr) {
                return Err(Error::Msr { vcpu: index, msr, value });
            }
            from += 1;
        }
    }
    Ok(())
}
