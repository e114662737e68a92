//! Who a vCPU is among its siblings: APIC IDs and core counts, in the leaves that guests read them
//! from.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Gives the entries to vCPU `index` of `vcpus`: one package of single-threaded cores, with the
/// vCPU's index as its APIC ID.
pub fn apply(entries: &mut Vec<kvm_cpuid_entry2>, index: u8, vcpus: u8) {
    let id = u32::from(index);
    let count = u32::from(vcpus);
    // Bits of an APIC ID that tell cores of one package apart.
    let core_bits = u32::from(vcpus).next_power_of_two().trailing_zeros();
    for e in entries.iter_mut() {
        match e.function {
            0x1 => {
                e.ebx = e.ebx & 0x0000_ff00 | id << 24 | (1 << core_bits.min(7)) << 16;
                // HTT: the count in EBX holds.
                e.edx = if vcpus > 1 { e.edx | 1 << 28 } else { e.edx & !(1 << 28) };
            }
            0x4 | 0x8000_001d => share_cache(e, core_bits),
            0x8000_0008 => e.ecx = e.ecx & !0xf0ff | core_bits << 12 | (count - 1),
            0x8000_001e => (e.eax, e.ebx, e.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
    for leaf in [0xb, 0x1f] {
        if entries.iter().any(|e| e.function == leaf) {
            entries.retain(|e| e.function != leaf);
            let level = |index, shift, below, kind: u32| kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: below,
                ecx: kind << 8 | index,
                edx: id,
                ..Default::default()
            };
            // Threads of a core (1), cores of a package (2), and the level that ends the list.
            entries.extend([level(0, 0, 1, 1), level(1, core_bits, count, 2), level(2, 0, 0, 0)]);
        }
    }
    entries.sort_by_key(|e| (e.function, e.index));
}

/// A cache level of leaf 4 (or its AMD twin): L1 and L2 are a core's own, others the package's.
fn share_cache(e: &mut kvm_cpuid_entry2, core_bits: u32) {
    let (kind, level) = (e.eax & 0x1f, e.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    let max = (1u32 << core_bits) - 1;
    let sharing = if level >= 3 { max } else { 0 };
    // Leaf 4 also says how many core IDs a package has, in six bits; AMD's leaf has none there.
    let cores = if e.function == 0x4 { max.min(0x3f) } else { 0 };
    e.eax = e.eax & 0x3fff | sharing.min(0xfff) << 14 | cores << 26;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vcpu_is_told_its_own_id_in_every_leaf() {
        let host: Vec<_> = [0x1, 0xb, 0x8000_001e]
            .map(|function| kvm_cpuid_entry2 { function, ..Default::default() })
            .into();
        for index in 0..4u8 {
            let mut entries = host.clone();
            apply(&mut entries, index, 4);
            let id = u32::from(index);
            assert_eq!(entries[0].ebx >> 24, id);
            assert_eq!(entries[0].ebx >> 16 & 0xff, 4);
            let levels: Vec<_> = entries.iter().filter(|e| e.function == 0xb).collect();
            assert_eq!(levels.len(), 3);
            assert!(levels.iter().all(|e| e.edx == id));
            assert_eq!((levels[1].eax, levels[1].ebx, levels[1].ecx), (2, 4, 0x201));
            assert_eq!(entries.last().unwrap().eax, id);
        }
    }
}
