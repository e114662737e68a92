//! The memory map that firmware would report.

use super::mptable;
use crate::memory::GuestMemory;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// E820 type of memory that may be used.
pub const USABLE: u32 = 1;
/// E820 type of memory that may not.
pub const RESERVED: u32 = 2;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub len: u64,
    pub kind: u32,
}

/// The machine's memory map: RAM, but for the MP table and the legacy area up to 1 MiB.
pub fn ranges(memory: &GuestMemory) -> Vec<Range> {
    let mut ranges = Vec::new();
    for region in memory.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        if start == 0 {
            let legacy = mptable::TABLE.0;
            ranges.push(Range { start: 0, len: legacy, kind: USABLE });
            ranges.push(Range { start: legacy, len: super::HIGH_MEMORY - legacy, kind: RESERVED });
            ranges.push(Range { start: super::HIGH_MEMORY, len: len - super::HIGH_MEMORY, kind: USABLE });
        } else {
            ranges.push(Range { start, len, kind: USABLE });
        }
    }
    ranges
}
