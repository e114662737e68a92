//! Comparing all of RAM on both sides, on request.
//!
//! A digest that is the same for memory that was never touched and for memory that holds zeros
//! (the destination may have one where the source has the other), and that threads can compute in
//! any order: the wrapping sum over all non-zero pages of a keyed hash of (region, page, content).
//!
//! Memory that differs is a grave fault, and which pages do is the first thing to know of it. So the source
//! sends a digest of each chunk as well. The destination answers with the hashes of all pages in the first
//! chunks that differ, and the source names the pages.

use crate::memory::{PAGE_SIZE, Ram, RamRegion};
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

/// Most chunks that memory is cut into: more memory makes them longer.
pub const MAX_CHUNKS: usize = 1 << 16;

/// Fewest pages in a chunk.
const CHUNK_PAGES: u64 = 512;

/// Most pages that are named when memory differs.
const MAX_NAMED: usize = 16;

/// Most chunks whose pages are looked at when memory differs.
pub const MAX_SUSPECTS: usize = 8;

/// The environment variable that names a folder in which both sides leave their content of pages that differ.
pub const SAVE_TO: &str = "WHIMBREL_SAVE_DIFFERING";

/// The hashes of the destination's pages in a chunk that differs; 0 for one of zeros.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageHashes {
    /// Number of the region.
    pub region: u32,
    /// The first page.
    pub first_page: u64,
    /// Of it and those that follow.
    #[serde(deserialize_with = "crate::bounded::at_most::<{ CHUNK_PAGES as usize }, _, _>")]
    pub hashes: Vec<u64>,
}

/// Pages in a chunk of `ram`.
fn chunk_pages(ram: &Ram) -> u64 {
    let chunks = |pages| ram.regions().iter().map(|region| region.pages().div_ceil(pages)).sum::<u64>();
    let mut pages = CHUNK_PAGES;
    while chunks(pages) > MAX_CHUNKS as u64 {
        pages *= 2;
    }
    pages
}

/// The digest of `ram`, which must not be changing, and one for each of its chunks. Reads at memory speed on
/// one thread; never makes untouched memory exist.
pub fn of(ram: &Ram) -> (Digest, Vec<u64>) {
    let mut digest = Digest { sum: 0, pages: 0 };
    let (per_chunk, mut chunks) = (chunk_pages(ram), Vec::new());
    for (index, region) in ram.regions().iter().enumerate() {
        let first_chunk = chunks.len();
        chunks.resize(first_chunk + region.pages().div_ceil(per_chunk) as usize, 0u64);
        each_hash(index, region, 0, region.pages(), |page, hash| {
            digest.sum = digest.sum.wrapping_add(hash);
            digest.pages += 1;
            let chunk = &mut chunks[first_chunk + (page / per_chunk) as usize];
            *chunk = chunk.wrapping_add(hash as u64);
        });
    }
    (digest, chunks)
}

/// The hashes of the pages in the chunks of `ram` that differ from `theirs`, of the first few of them.
pub fn suspects(ram: &Ram, ours: &[u64], theirs: &[u64]) -> Vec<PageHashes> {
    let per_chunk = chunk_pages(ram);
    let mut suspects = Vec::new();
    let mut both = ours.iter().zip(theirs);
    for (index, region) in ram.regions().iter().enumerate() {
        for first in (0..region.pages()).step_by(per_chunk as usize) {
            if both.next().is_none_or(|(ours, theirs)| ours == theirs) {
                continue;
            }
            let end = region.pages().min(first + per_chunk);
            for first_page in (first..end).step_by(CHUNK_PAGES as usize) {
                if suspects.len() == MAX_SUSPECTS {
                    return suspects;
                }
                let pages = CHUNK_PAGES.min(end - first_page);
                let mut hashes = vec![0; pages as usize];
                each_hash(index, region, first_page, pages, |page, hash| {
                    hashes[(page - first_page) as usize] = hash as u64;
                });
                save("destination", region, first_page, pages);
                suspects.push(PageHashes { region: index as u32, first_page, hashes });
            }
        }
    }
    suspects
}

/// Adds to `named` the guest addresses of those pages of `ram` whose hashes are not `theirs`.
pub fn name_differing(ram: &Ram, theirs: &PageHashes, named: &mut Vec<u64>) {
    let (index, first) = (theirs.region as usize, theirs.first_page);
    let Some(region) = ram.regions().get(index) else { return };
    let pages = theirs.hashes.len() as u64;
    if first.checked_add(pages).is_none_or(|end| end > region.pages()) {
        return;
    }
    let mut ours = vec![0; theirs.hashes.len()];
    each_hash(index, region, first, pages, |page, hash| ours[(page - first) as usize] = hash as u64);
    let differing =
        (first..).zip(ours.iter().zip(&theirs.hashes)).filter(|(_, (ours, theirs))| ours != theirs);
    for (page, _) in differing {
        if named.len() == MAX_NAMED {
            return;
        }
        save("source", region, page, 1);
        named.push(region.layout().guest_address + page * PAGE_SIZE);
    }
}

/// Leaves the content of some pages in the folder that the environment names, if it names one.
fn save(side: &str, region: &RamRegion, first_page: u64, pages: u64) {
    let Some(folder) = std::env::var_os(SAVE_TO) else { return };
    let address = region.layout().guest_address + first_page * PAGE_SIZE;
    let path = std::path::Path::new(&folder).join(format!("{side}-{address:#x}"));
    let mut bytes = vec![0; (pages * PAGE_SIZE) as usize];
    // The migration's own failure is what matters, not that of its record.
    let _ = region.read(first_page * PAGE_SIZE, &mut bytes).and_then(|()| std::fs::write(path, bytes));
}

/// Calls `each` with number and hash of every page in a range that is not zero.
fn each_hash(index: usize, region: &RamRegion, first: u64, pages: u64, mut each: impl FnMut(u64, u128)) {
    scan::existing(region, first, pages, |first, pages| {
        for page in first..first + pages {
            let address = region.address().wrapping_add((page * PAGE_SIZE) as usize);
            // SAFETY: `existing` reports only pages inside the range, which is inside the region, whose
            // mapping is page-aligned and lives as long as `region`. The machine is paused, so nobody
            // writes while the slice exists.
            let content = unsafe { std::slice::from_raw_parts(address, PAGE_SIZE as usize) };
            // SAFETY: as above.
            if !unsafe { scan::is_zero(address) } {
                each(page, xxh3_128_with_seed(content, (index as u64) << 52 | page));
            }
        }
    });
}
