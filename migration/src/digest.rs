//! Comparing all of RAM on both sides, on request.
//!
//! A digest that is the same for memory that was never touched and for memory that holds zeros
//! (the destination may have one where the source has the other), and that threads can compute in
//! any order: the wrapping sum over all non-zero pages of a keyed hash of (region, page, content).

use crate::memory::{PAGE_SIZE, Ram};
use crate::scan;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Digest of all RAM of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest {
    /// Sum of the pages' hashes.
    pub sum: u128,
    /// Number of non-zero pages.
    pub pages: u64,
}

/// The digest of `ram`, which must not be changing. Reads at memory speed on one thread; never
/// makes untouched memory exist.
pub fn of(ram: &Ram) -> Digest {
    let mut digest = Digest { sum: 0, pages: 0 };
    for (index, region) in ram.regions().iter().enumerate() {
        scan::existing(region, 0, region.pages(), |first, pages| {
            for page in first..first + pages {
                let address = region.address().wrapping_add((page * PAGE_SIZE) as usize);
                // SAFETY: `existing` reports only pages inside the region, whose mapping is
                // page-aligned and lives as long as `region`. The machine is paused, so nobody
                // writes while the slice exists.
                let content = unsafe { std::slice::from_raw_parts(address, PAGE_SIZE as usize) };
                // SAFETY: as above.
                if !unsafe { scan::is_zero(address) } {
                    let place = (index as u64) << 52 | page;
                    digest.sum = digest.sum.wrapping_add(xxh3_128_with_seed(content, place));
                    digest.pages += 1;
                }
            }
        });
    }
    digest
}
