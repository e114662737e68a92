//! The CPU that a guest sees.
//!
//! The baseline is what KVM can do on this host, less what cannot move: features whose state KVM
//! cannot save without special permission (AMX), that hand out host hardware (PMU, SGX, processor
//! trace), or that would need nested state. It is a pure function of the host and the number of
//! vCPUs, so that two equal hosts give equal CPUs, and a destination can compare bit by bit.

mod compare;
mod names;
mod topology;

pub use compare::{Incompatible, missing_features};

use crate::ioctl::{self, KvmContext, KvmError};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// XCR0 components that a guest never gets: AMX tile configuration and data.
const XCR0_AMX: u64 = 1 << 17 | 1 << 18;

/// The baseline of this host, before vCPUs get their identities.
///
/// # Errors
/// [`KvmError`] if KVM cannot say what it supports.
pub fn baseline(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let supported =
        ioctl::retried!("KVM_GET_SUPPORTED_CPUID", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
    let deadline_timer = ioctl::capability(kvm, Cap::TscDeadlineTimer as u32)? != 0;
    Ok(stabilise(supported.as_slice(), deadline_timer))
}

/// A vCPU's view of `baseline`: its APIC ID, and a topology of `vcpus` single-threaded cores in one
/// package.
///
/// # Errors
/// [`KvmError`] for more entries than KVM takes.
pub fn for_vcpu(baseline: &[kvm_cpuid_entry2], index: u8, vcpus: u8) -> Result<CpuId, KvmError> {
    let mut entries = baseline.to_vec();
    topology::apply(&mut entries, index, vcpus);
    CpuId::from_entries(&entries)
        .map_err(|_| std::io::Error::from_raw_os_error(libc::E2BIG))
        .context("the CPUID table, which is too long")
}

/// Width in bits of a guest-physical address; 36 where the CPU does not say.
pub fn physical_address_bits(entries: &[kvm_cpuid_entry2]) -> u8 {
    entries.iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax as u8)
}

fn stabilise(supported: &[kvm_cpuid_entry2], deadline_timer: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported.iter().filter_map(|e| stable(*e, deadline_timer)).collect();
    fix_xsave_sizes(&mut entries);
    entries.sort_by_key(|e| (e.function, e.index));
    entries.dedup_by_key(|e| (e.function, e.index));
    entries
}

/// One entry without what cannot move; `None` for a leaf that goes as a whole.
fn stable(mut e: kvm_cpuid_entry2, deadline_timer: bool) -> Option<kvm_cpuid_entry2> {
    let bits = |numbers: &[u32]| numbers.iter().fold(0u32, |mask, bit| mask | 1 << bit);
    match (e.function, e.index) {
        (0x1, _) => {
            // VMX (nested state), PDCM (PMU) and OSXSAVE (mirrors CR4, the kernel's business).
            e.ecx &= !bits(&[5, 15, 27]);
            // The in-kernel APIC has x2APIC; the hypervisor bit leads guests to KVM's own leaves.
            e.ecx |= bits(&[21, 31]);
            // KVM emulates the deadline timer but leaves it to the VMM to announce it.
            e.ecx = if deadline_timer { e.ecx | bits(&[24]) } else { e.ecx & !bits(&[24]) };
            // The APIC ID of whichever host CPU answered.
            e.ebx &= 0x0000_ff00;
        }
        // Thermal and power: only "the APIC timer always runs" holds for a vCPU.
        (0x6, _) => {
            (e.eax, e.ebx, e.ecx, e.edx) = (e.eax & bits(&[2]), 0, 0, 0);
        }
        (0x7, 0) => {
            e.ebx &= !bits(&[2, 25]); // SGX, processor trace
            e.ecx &= !bits(&[4, 30]); // OSPKE (mirrors CR4), SGX launch control
            e.edx &= !bits(&[19, 22, 24, 25]); // architectural LBRs, AMX
        }
        (0x7, 1) => {
            e.eax &= !bits(&[21]); // AMX-FP16
            e.edx &= !bits(&[8]); // AMX-COMPLEX
        }
        (0xd, 0) => {
            let mask = u64::from(e.eax) | u64::from(e.edx) << 32;
            let mask = mask & !XCR0_AMX;
            (e.eax, e.edx) = (mask as u32, (mask >> 32) as u32);
        }
        (0xd, 1) => e.eax &= !bits(&[4]), // XFD exists for AMX only
        (0xd, 17 | 18) => return None,
        // PMU, SGX, processor trace, LBRs, AMX, nested SVM, AMD's PMU.
        (0xa | 0x12 | 0x14 | 0x1c | 0x1d | 0x1e | 0x8000_000a | 0x8000_0022, _) => return None,
        // The host's own topology, replaced for each vCPU.
        (0xb | 0x1f, index) if index > 0 => return None,
        (0x8000_0001, _) => e.ecx &= !bits(&[2, 10, 23, 24, 28]), // SVM, IBS, PMU extensions
        _ => {}
    }
    Some(e)
}

/// Makes leaf 0xD's sizes agree with the components that are left.
fn fix_xsave_sizes(entries: &mut [kvm_cpuid_entry2]) {
    const LEGACY_AND_HEADER: u32 = 512 + 64;
    let Some(main) = entries.iter().position(|e| e.function == 0xd && e.index == 0) else { return };
    let components = u64::from(entries[main].eax) | u64::from(entries[main].edx) << 32;
    let size = entries
        .iter()
        .filter(|e| e.function == 0xd && (2..63).contains(&e.index) && components >> e.index & 1 == 1)
        .map(|e| e.ebx.saturating_add(e.eax))
        .fold(LEGACY_AND_HEADER, u32::max);
    // EBX is the size for the current XCR0, which at reset has only x87; KVM keeps it up to date.
    entries[main].ebx = LEGACY_AND_HEADER;
    entries[main].ecx = size;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn amx_goes_and_sizes_follow() {
        let host = [
            entry(0xd, 0, [0x6_0007, 0x340, 0x2b00, 0]),
            entry(0xd, 2, [0x100, 0x240, 0, 0]),
            entry(0xd, 17, [0x40, 0xac0, 0, 0]),
            entry(0xd, 18, [0x2000, 0xb00, 0, 0]),
            entry(0x7, 0, [2, 0, 0, 1 << 24 | 1 << 26]),
        ];
        let guest = stabilise(&host, false);
        let main = guest.iter().find(|e| e.function == 0xd && e.index == 0).unwrap();
        assert_eq!((main.eax, main.ebx, main.ecx, main.edx), (7, 576, 0x340, 0));
        assert!(!guest.iter().any(|e| e.function == 0xd && e.index > 2));
        assert_eq!(guest.iter().find(|e| e.function == 7).unwrap().edx, 1 << 26);
    }

    #[test]
    fn the_order_and_the_cpu_that_answered_do_not_matter() {
        let a = entry(0x1, 0, [1, 0x0502_0800, 1 << 5 | 1 << 27, 7]);
        let b = entry(0x1, 0, [1, 0x0002_0800, 1 << 5, 7]);
        let leaf = entry(0x0, 0, [0x16, 1, 2, 3]);
        assert_eq!(stabilise(&[a, leaf], true), stabilise(&[leaf, b], true));
    }

    #[test]
    fn the_host_gives_the_same_baseline_twice() {
        let kvm = ioctl::retried!("open", Kvm::new()).unwrap();
        let baseline = baseline(&kvm).unwrap();
        assert_eq!(baseline, super::baseline(&kvm).unwrap());
        assert_eq!(missing_features(&baseline, &baseline), Vec::<String>::new());
    }
}
