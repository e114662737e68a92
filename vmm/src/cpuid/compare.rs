//! Whether one CPU can stand in for another.

use super::names;
use kvm_bindings::kvm_cpuid_entry2;

/// This host's CPU cannot stand in for the one that the guest was promised.
#[derive(Debug, thiserror::Error)]
#[error(
    "this host's CPU lacks what the guest was promised: {}; move the guest to an equal or newer CPU",
    missing.join(", ")
)]
pub struct Incompatible {
    /// What is missing, by name.
    pub missing: Vec<String>,
}

/// What `wanted` has and `host` lacks, by the names that manuals use; empty if a guest that was
/// promised `wanted` can run on `host`.
///
/// Only bits that promise something are compared. Topology, cache sizes, family and model, and
/// bits that mirror control registers may differ.
pub fn missing_features(wanted: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    let (vendor, host_vendor) = (vendor(wanted), vendor(host));
    if vendor != host_vendor {
        missing.push(format!("CPU vendor {vendor} (this host: {host_vendor})"));
    }
    for word in names::WORDS {
        let lacking = word.read(wanted) & !word.read(host);
        missing.extend((0..32).filter(|bit| lacking >> bit & 1 == 1).map(|bit| word.name(bit)));
    }
    let (bits, host_bits) = (super::physical_address_bits(wanted), super::physical_address_bits(host));
    if bits > host_bits {
        missing.push(format!("{bits} physical address bits (this host: {host_bits})"));
    }
    missing
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let Some(e) = entries.iter().find(|e| e.function == 0) else { return "unknown".into() };
    let bytes: Vec<u8> = [e.ebx, e.edx, e.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn missing_bits_are_named() {
        let wanted = [entry(7, 0, [0, 1 << 5 | 1 << 16, 0, 0]), entry(1, 0, [0, 0, 1 << 28, 1 << 31])];
        let host = [entry(7, 0, [0, 1 << 5, 0, 0])];
        let missing = missing_features(&wanted, &host);
        assert_eq!(missing, ["avx", "CPUID 0x1 EDX bit 31", "avx512f"]);
        assert!(missing_features(&host, &wanted).is_empty());
    }

    #[test]
    fn vendor_and_address_width_count() {
        let intel =
            [entry(0, 0, [1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]), entry(0x8000_0008, 0, [46, 0, 0, 0])];
        let amd =
            [entry(0, 0, [1, 0x6874_7541, 0x444d_4163, 0x6974_6e65]), entry(0x8000_0008, 0, [40, 0, 0, 0])];
        let missing = missing_features(&intel, &amd);
        assert_eq!(missing.len(), 2, "{missing:?}");
        assert!(missing[0].contains("GenuineIntel") && missing[0].contains("AuthenticAMD"));
        assert!(missing[1].contains("46"));
    }
}
