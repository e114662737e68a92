//! The CPUID words that promise features, and what their bits are called.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A word of feature bits.
pub struct Word {
    leaf: u32,
    index: u32,
    register: Register,
    /// Bits that promise nothing: they mirror control registers or topology.
    ignored: u32,
    names: &'static [(u32, &'static str)],
}

impl Word {
    /// The word's value in a CPUID table; 0 where the leaf is absent.
    pub fn read(&self, entries: &[kvm_cpuid_entry2]) -> u32 {
        let Some(e) = entries.iter().find(|e| e.function == self.leaf && e.index == self.index) else {
            return 0;
        };
        let value = match self.register {
            Register::Eax => e.eax,
            Register::Ebx => e.ebx,
            Register::Ecx => e.ecx,
            Register::Edx => e.edx,
        };
        value & !self.ignored
    }

    /// A bit's name, or where to look it up.
    pub fn name(&self, bit: u32) -> String {
        if let Some((_, name)) = self.names.iter().find(|(b, _)| *b == bit) {
            return (*name).to_string();
        }
        let register = format!("{:?}", self.register).to_uppercase();
        match self.index {
            0 => format!("CPUID {:#x} {register} bit {bit}", self.leaf),
            index => format!("CPUID {:#x}.{index} {register} bit {bit}", self.leaf),
        }
    }
}

const fn word(leaf: u32, index: u32, register: Register, names: &'static [(u32, &'static str)]) -> Word {
    Word { leaf, index, register, ignored: 0, names }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// All words that are compared.
#[rustfmt::skip]
pub const WORDS: &[Word] = &[
    Word { leaf: 0x1, index: 0, register: Ecx, ignored: 1 << 27, names: &[
        (0, "sse3"), (1, "pclmulqdq"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (17, "pcid"),
        (19, "sse4.1"), (20, "sse4.2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"),
        (24, "tsc-deadline"), (25, "aes"), (26, "xsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"),
        (31, "hypervisor"),
    ] },
    Word { leaf: 0x1, index: 0, register: Edx, ignored: 1 << 28, names: &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"),
        (8, "cx8"), (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"),
        (16, "pat"), (17, "pse36"), (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"),
        (26, "sse2"), (27, "ss"),
    ] },
    word(0x6, 0, Eax, &[(2, "arat")]),
    word(0x7, 0, Ebx, &[
        (0, "fsgsbase"), (1, "tsc-adjust"), (3, "bmi1"), (4, "hle"), (5, "avx2"), (7, "smep"),
        (8, "bmi2"), (9, "erms"), (10, "invpcid"), (11, "rtm"), (14, "mpx"), (16, "avx512f"),
        (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"), (21, "avx512ifma"),
        (23, "clflushopt"), (24, "clwb"), (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"),
        (29, "sha-ni"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    Word { leaf: 0x7, index: 0, register: Ecx, ignored: 1 << 4, names: &[
        (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"), (6, "avx512vbmi2"), (7, "cet-ss"),
        (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512vnni"), (12, "avx512bitalg"),
        (14, "avx512-vpopcntdq"), (16, "la57"), (22, "rdpid"), (24, "bus-lock-detect"),
        (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"),
    ] },
    word(0x7, 0, Edx, &[
        (2, "avx512-4vnniw"), (3, "avx512-4fmaps"), (4, "fsrm"), (8, "avx512-vp2intersect"),
        (10, "md-clear"), (14, "serialize"), (16, "tsxldtrk"), (20, "cet-ibt"), (23, "avx512-fp16"),
        (26, "spec-ctrl"), (27, "stibp"), (28, "flush-l1d"), (29, "arch-capabilities"),
        (30, "core-capabilities"), (31, "ssbd"),
    ]),
    word(0x7, 1, Eax, &[
        (4, "avx-vnni"), (5, "avx512-bf16"), (7, "cmpccxadd"), (10, "fzrm"), (11, "fsrs"),
        (12, "fsrc"), (23, "avx-ifma"), (26, "lam"),
    ]),
    word(0x7, 1, Edx, &[(4, "avx-vnni-int8"), (5, "avx-ne-convert"), (14, "prefetchiti"), (19, "avx10")]),
    word(0x7, 2, Edx, &[
        (0, "psfd"), (1, "ipred-ctrl"), (2, "rrsba-ctrl"), (3, "ddpd-u"), (4, "bhi-ctrl"), (5, "mcdt-no"),
    ]),
    word(0xd, 0, Eax, &[
        (0, "xsave x87"), (1, "xsave sse"), (2, "xsave avx"), (3, "xsave bndregs"), (4, "xsave bndcsr"),
        (5, "xsave opmask"), (6, "xsave zmm-hi256"), (7, "xsave hi16-zmm"), (9, "xsave pkru"),
    ]),
    word(0xd, 0, Edx, &[]),
    word(0xd, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")]),
    word(0xd, 1, Ecx, &[(11, "xsaves cet-u"), (12, "xsaves cet-s")]),
    word(0x4000_0001, 0, Eax, &[
        (0, "kvmclock"), (1, "kvm-nopiodelay"), (3, "kvmclock2"), (4, "kvm-asyncpf"),
        (5, "kvm-steal-time"), (6, "kvm-pv-eoi"), (7, "kvm-pv-unhalt"), (9, "kvm-pv-tlb-flush"),
        (10, "kvm-asyncpf-vmexit"), (11, "kvm-pv-send-ipi"), (12, "kvm-poll-control"),
        (13, "kvm-pv-sched-yield"), (14, "kvm-asyncpf-int"), (15, "kvm-msi-ext-dest-id"),
        (24, "kvmclock-stable"),
    ]),
    word(0x8000_0001, 0, Ecx, &[
        (0, "lahf-lm"), (4, "cr8-legacy"), (5, "abm"), (6, "sse4a"), (7, "misalignsse"),
        (8, "3dnowprefetch"), (9, "osvw"), (11, "xop"), (15, "lwp"), (16, "fma4"), (21, "tbm"),
        (22, "topoext"),
    ]),
    word(0x8000_0001, 0, Edx, &[
        (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr-opt"), (26, "pdpe1gb"), (27, "rdtscp"),
        (29, "lm"), (30, "3dnowext"), (31, "3dnow"),
    ]),
    word(0x8000_0007, 0, Edx, &[(8, "invtsc")]),
    word(0x8000_0008, 0, Ebx, &[
        (0, "clzero"), (2, "xsaveerptr"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"),
        (15, "amd-stibp"), (24, "amd-ssbd"), (25, "virt-ssbd"), (26, "amd-ssb-no"), (28, "amd-psfd"),
    ]),
    word(0x8000_0021, 0, Eax, &[
        (0, "no-nested-data-bp"), (2, "lfence-always-serializing"), (6, "null-sel-clr-base"),
        (8, "auto-ibrs"),
    ]),
];
