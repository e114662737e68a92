//! Which parts of memory were placed to, roughly: what tells a source that gets on from one that repeats
//! itself.

use crate::memory::{Extent, Ram};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of memory that a bit stands for.
pub const COVERAGE_UNIT: u64 = 256 << 10;

/// Bytes that a word of bits stands for.
const WORD: u64 = COVERAGE_UNIT * 64;

/// A bit for each [`COVERAGE_UNIT`] of memory, shared by all that place data there. Marking what is marked
/// already is a load.
pub struct Coverage(Vec<Vec<AtomicU64>>);

impl Coverage {
    /// Of `ram`, nothing of which has been placed to.
    pub fn new(ram: &Ram) -> Self {
        let words = |len: u64| (0..len.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect();
        Coverage(ram.regions().iter().map(|region| words(region.len())).collect())
    }

    /// An extent has been placed to, or cleared. What is outside of memory is left out.
    pub fn mark(&self, extent: &Extent) {
        let Some(region) = self.0.get(extent.region as usize) else { return };
        let (mut unit, end) =
            (extent.offset / COVERAGE_UNIT, extent.offset.saturating_add(extent.len).div_ceil(COVERAGE_UNIT));
        while unit < end {
            let Some(word) = region.get((unit / 64) as usize) else { return };
            let (first, count) = (unit % 64, (64 - unit % 64).min(end - unit));
            let bits = (u64::MAX >> (64 - count)) << first;
            if word.load(Ordering::Relaxed) & bits != bits {
                word.fetch_or(bits, Ordering::Relaxed);
            }
            unit += count;
        }
    }

    /// How many bytes have been marked since this was last called, each once. Rounded up to whole units.
    pub fn take(&self) -> u64 {
        let words = self.0.iter().flatten();
        words.map(|word| u64::from(word.swap(0, Ordering::Relaxed).count_ones())).sum::<u64>() * COVERAGE_UNIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE_SIZE;

    #[test]
    fn each_part_counts_once_however_often_it_is_placed_to() {
        let pages = (WORD + 3 * COVERAGE_UNIT) / PAGE_SIZE;
        let ram = crate::conformance::bed::ram_of(&[pages, 1]);
        let coverage = Coverage::new(&ram);
        assert_eq!(coverage.take(), 0);
        let extent = |region, offset, len| Extent { region, offset, len };
        for _ in 0..1000 {
            coverage.mark(&extent(0, 5 * PAGE_SIZE, PAGE_SIZE));
        }
        assert_eq!(coverage.take(), COVERAGE_UNIT);
        assert_eq!(coverage.take(), 0, "anew each time");
        coverage.mark(&extent(0, COVERAGE_UNIT - PAGE_SIZE, 2 * PAGE_SIZE));
        coverage.mark(&extent(1, 0, PAGE_SIZE));
        assert_eq!(coverage.take(), 3 * COVERAGE_UNIT);
        coverage.mark(&extent(0, 0, pages * PAGE_SIZE));
        assert_eq!(coverage.take(), WORD + 3 * COVERAGE_UNIT);
        // Nobody gets here with these, as they are checked before.
        coverage.mark(&extent(7, 0, PAGE_SIZE));
        coverage.mark(&extent(1, u64::MAX, u64::MAX));
        assert_eq!(coverage.take(), 0);
    }
}
