//! The TSC and kvmclock.

use crate::abi::MAX_VCPUS;
use crate::cpu::{cpuid, input, out, write_msr};
use core::arch::x86_64::_rdtsc;
use core::cell::UnsafeCell;
use core::sync::atomic::{Ordering, compiler_fence};

/// The TSC.
pub fn tsc() -> u64 {
    // SAFETY: reading the counter has no effect.
    unsafe { _rdtsc() }
}

/// KVM's time record for one vCPU.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct TimeInfo {
    version: u32,
    _pad: u32,
    tsc: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
    flags: u8,
    _pad2: [u8; 2],
}

struct Record(UnsafeCell<TimeInfo>);

// SAFETY: KVM writes it; this side only reads it, with volatile loads guarded by the version.
unsafe impl Sync for Record {}

const EMPTY: TimeInfo = TimeInfo {
    version: 0,
    _pad: 0,
    tsc: 0,
    system_time: 0,
    multiplier: 0,
    shift: 0,
    flags: 0,
    _pad2: [0; 2],
};

static RECORDS: [Record; MAX_VCPUS] = [const { Record(UnsafeCell::new(EMPTY)) }; MAX_VCPUS];

const SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_FEATURES: u32 = 0x4000_0001;

/// The kvmclock of one vCPU.
#[derive(Clone, Copy)]
pub struct KvmClock(&'static Record);

impl KvmClock {
    /// Asks KVM for it; to be called by the vCPU itself. `None` where it is not offered.
    pub fn start(number: usize) -> Option<Self> {
        let (_, signature, ..) = cpuid(0x4000_0000);
        if signature != u32::from_le_bytes(*b"KVMK") || cpuid(KVM_FEATURES).0 & 1 << 3 == 0 {
            return None;
        }
        let record = &RECORDS[number];
        // SAFETY: the register exists, and the record is memory that nothing else uses.
        unsafe { write_msr(SYSTEM_TIME, record.0.get() as u64 | 1) }
        Some(KvmClock(record))
    }

    fn read(self) -> TimeInfo {
        let record = self.0.0.get();
        loop {
            // SAFETY: volatile loads of a record that only KVM writes; an odd or a changed version
            // means that it was doing so. It writes while this vCPU does not run, so that only the
            // compiler could disorder the loads.
            let (before, info, after) = unsafe {
                let before = (&raw const (*record).version).read_volatile();
                compiler_fence(Ordering::SeqCst);
                let info = record.read_volatile();
                compiler_fence(Ordering::SeqCst);
                (before, info, (&raw const (*record).version).read_volatile())
            };
            if before == after && before & 1 == 0 {
                return info;
            }
        }
    }

    /// Nanoseconds.
    pub fn nanoseconds(self) -> u64 {
        let info = self.read();
        let ticks = tsc().wrapping_sub(info.tsc);
        let scaled = if info.shift < 0 { ticks >> -info.shift } else { ticks << info.shift };
        info.system_time.wrapping_add(((u128::from(scaled) * u128::from(info.multiplier)) >> 32) as u64)
    }

    fn tsc_khz(self) -> u32 {
        let info = self.read();
        let khz = (1_000_000u64 << 32).checked_div(u64::from(info.multiplier)).unwrap_or(0);
        (if info.shift < 0 { khz << -info.shift } else { khz >> info.shift }) as u32
    }
}

/// The TSC's frequency in kHz, from the first source that knows it; 0 if none does.
pub fn tsc_khz(kvmclock: Option<KvmClock>) -> u32 {
    match kvmclock.map_or(0, KvmClock::tsc_khz) {
        0 => measure(),
        khz => khz,
    }
}

/// Measures the TSC against channel 2 of the PIT, which counts 10 ms once. Gives up where there is no
/// such channel.
fn measure() -> u32 {
    const HZ: u32 = 1_193_182;
    const SHARE: u32 = 100;
    let count = HZ / SHARE;
    let gate = input(0x61) & !2;
    out(0x61, gate & !1);
    out(0x43, 0xb0);
    out(0x42, count as u8);
    out(0x42, (count >> 8) as u8);
    out(0x61, gate | 1);
    let began = tsc();
    for _ in 0..10_000_000 {
        if input(0x61) & 0x20 != 0 {
            return ((tsc() - began) / (1000 / u64::from(SHARE))) as u32;
        }
    }
    0
}
