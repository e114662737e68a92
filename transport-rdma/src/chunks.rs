//! The chunks in which memory is registered.
//!
//! A chunk is large enough that the fixed cost of a registration (tens of microseconds) disappears beside the
//! cost of its pages. It is small enough that the first byte need not wait long, and that a page in use makes
//! little memory exist around it. See `docs/rdma.md` for the figures and how to get them for a device.

use migration::memory::{Extent, Ram};

/// Bytes of a chunk, unless the memory's own pages are larger or the device could not hold so many.
pub const DEFAULT_CHUNK: u64 = 16 << 20;

/// Bytes of the smallest chunk that can be asked for: a huge page.
pub const MIN_CHUNK: u64 = 1 << MIN_CHUNK_SHIFT;

/// log2 of [`MIN_CHUNK`].
pub(crate) const MIN_CHUNK_SHIFT: u8 = 21;

/// log2 of the bytes of the largest chunk: 16 GiB, a huge page of some machines.
pub(crate) const MAX_CHUNK_SHIFT: u8 = 34;

/// Of the memory regions that a device has, one session may use one in so many.
const MEMORY_REGIONS_SHARE: u64 = 4;

/// For each region of `ram`, log2 of the bytes of the smallest chunk that suits it. That is `chunk` bytes,
/// unless the memory's own pages are larger, or there would be too many chunks for a device that has `max_mr`
/// memory regions.
pub(crate) fn min_chunk_shifts(ram: &Ram, chunk: u64, max_mr: u64) -> Vec<u8> {
    let log2 = |size: u64| size.next_power_of_two().trailing_zeros() as u8;
    let mut least = log2(chunk.max(MIN_CHUNK));
    while ram.len() >> least > (max_mr / MEMORY_REGIONS_SHARE).max(1) && least < MAX_CHUNK_SHIFT {
        least += 1;
    }
    ram.regions().iter().map(|region| least.max(log2(region.backing_page()))).collect()
}

/// The chunks of a machine's RAM, numbered from 0 through all its regions.
pub(crate) struct ChunkMap {
    regions: Vec<RegionChunks>,
    count: usize,
}

/// The chunks of one region.
struct RegionChunks {
    /// log2 of a chunk's bytes.
    shift: u8,
    /// The region's bytes.
    len: u64,
    /// Number of the region's first chunk.
    first: usize,
}

impl ChunkMap {
    /// Cuts each region of `ram` into chunks of 2^`shifts` bytes; a region's last may be shorter.
    pub(crate) fn new(ram: &Ram, shifts: &[u8]) -> ChunkMap {
        let mut count = 0;
        let regions = ram
            .regions()
            .iter()
            .zip(shifts)
            .map(|(region, &shift)| {
                let chunks = RegionChunks { shift, len: region.len(), first: count };
                count += region.len().div_ceil(1 << shift) as usize;
                chunks
            })
            .collect();
        ChunkMap { regions, count }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// The number of the chunk that a byte is in, and the offset at which that chunk ends in its region. The
    /// byte must be inside memory.
    pub(crate) fn chunk_at(&self, region: u32, offset: u64) -> (usize, u64) {
        let chunks = &self.regions[region as usize];
        let index = offset >> chunks.shift;
        (chunks.first + index as usize, ((index + 1) << chunks.shift).min(chunks.len))
    }

    /// The chunk of that number; `None` if there is none.
    pub(crate) fn extent(&self, chunk: usize) -> Option<Extent> {
        let region = self.regions.iter().rposition(|chunks| chunks.first <= chunk)?;
        let chunks = &self.regions[region];
        let offset = ((chunk - chunks.first) as u64) << chunks.shift;
        let len = chunks.len.checked_sub(offset).filter(|len| *len > 0)?.min(1 << chunks.shift);
        Some(Extent { region: region as u32, offset, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::conformance::bed::ram_that_claims as ram;
    use migration::memory::PAGE_SIZE;

    #[test]
    fn chunks_cover_every_byte_once() {
        let ram = ram(&[(40 << 20, PAGE_SIZE), (3 * PAGE_SIZE, PAGE_SIZE), (4 << 20, 2 << 20)]);
        let map = ChunkMap::new(&ram, &[24, 24, 21]);
        assert_eq!(map.len(), 3 + 1 + 2);
        let mut at = (0, 0);
        for number in 0..map.len() {
            let extent = map.extent(number).unwrap();
            if extent.region != at.0 {
                assert_eq!(at.1, ram.regions()[at.0 as usize].len());
                at = (at.0 + 1, 0);
            }
            assert_eq!((extent.region, extent.offset), at);
            let end = extent.offset + extent.len;
            for offset in [extent.offset, end - 1] {
                assert_eq!(map.chunk_at(extent.region, offset), (number, end));
            }
            at.1 = end;
        }
        assert_eq!(at, (2, 4 << 20));
        assert_eq!(map.extent(map.len()), None);
    }

    #[test]
    fn chunks_hold_whole_pages_and_are_not_too_many() {
        let ram = ram(&[(1 << 40, PAGE_SIZE), (1 << 30, 1 << 30)]);
        assert_eq!(min_chunk_shifts(&ram, DEFAULT_CHUNK, 1 << 24), [24, 30]);
        assert_eq!(min_chunk_shifts(&ram, 1, 1 << 24), [21, 30]);
        assert_eq!(min_chunk_shifts(&ram, DEFAULT_CHUNK, 1 << 12), [31, 31]);
    }
}
