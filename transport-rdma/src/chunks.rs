//! The chunks in which memory is registered.
//!
//! A chunk is large enough that the fixed cost of a registration (tens of microseconds) disappears beside the
//! cost of its pages, and small enough that the first byte need not wait long and that little memory comes to
//! exist around a page that does. See `docs/rdma.md` for the figures and how to get them for a device.

use migration::memory::{Extent, Ram};

/// Bytes of a chunk, unless the memory's own pages are larger or the device could not hold so many.
pub const DEFAULT_CHUNK: u64 = 16 << 20;

/// The smallest chunk that can be asked for: a huge page.
pub const MIN_CHUNK: u64 = 2 << 20;

/// For each region of `ram`, log2 of the least chunk that suits it: `chunk` bytes, but no part of a page, and
/// no more chunks in all than a quarter of the memory regions that a device has.
pub(crate) fn least_shifts(ram: &Ram, chunk: u64, max_regions: u64) -> Vec<u8> {
    let log2 = |size: u64| size.next_power_of_two().trailing_zeros() as u8;
    let mut least = log2(chunk.max(MIN_CHUNK));
    while ram.len() >> least > (max_regions / 4).max(1) && least < 34 {
        least += 1;
    }
    ram.regions().iter().map(|region| least.max(log2(region.backing_page()))).collect()
}

/// All of a machine's RAM, cut into chunks and numbered.
pub(crate) struct Grid {
    regions: Vec<Row>,
    chunks: usize,
}

struct Row {
    shift: u8,
    len: u64,
    /// Number of the region's first chunk.
    first: usize,
}

impl Grid {
    /// Cuts each region of `ram` into chunks of 2^`shifts` bytes; a region's last may be shorter.
    pub(crate) fn new(ram: &Ram, shifts: &[u8]) -> Grid {
        let mut chunks = 0;
        let regions = ram
            .regions()
            .iter()
            .zip(shifts)
            .map(|(region, &shift)| {
                let row = Row { shift, len: region.len(), first: chunks };
                chunks += region.len().div_ceil(1 << shift) as usize;
                row
            })
            .collect();
        Grid { regions, chunks }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.chunks
    }

    /// The number of the chunk that a byte is in, and where that chunk ends in its region. The byte must be
    /// inside memory.
    pub(crate) fn find(&self, region: u32, offset: u64) -> (usize, u64) {
        let row = &self.regions[region as usize];
        let index = offset >> row.shift;
        (row.first + index as usize, ((index + 1) << row.shift).min(row.len))
    }

    /// The chunk of that number.
    pub(crate) fn extent(&self, chunk: usize) -> Option<Extent> {
        let region = self.regions.iter().rposition(|row| row.first <= chunk)?;
        let row = &self.regions[region];
        let offset = ((chunk - row.first) as u64) << row.shift;
        let len = row.len.checked_sub(offset).filter(|len| *len > 0)?.min(1 << row.shift);
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
        let grid = Grid::new(&ram, &[24, 24, 21]);
        assert_eq!(grid.len(), 3 + 1 + 2);
        let mut at = (0, 0);
        for number in 0..grid.len() {
            let extent = grid.extent(number).unwrap();
            if extent.region != at.0 {
                assert_eq!(at.1, ram.regions()[at.0 as usize].len());
                at = (at.0 + 1, 0);
            }
            assert_eq!((extent.region, extent.offset), at);
            let end = extent.offset + extent.len;
            for offset in [extent.offset, end - 1] {
                assert_eq!(grid.find(extent.region, offset), (number, end));
            }
            at.1 = end;
        }
        assert_eq!(at, (2, 4 << 20));
        assert_eq!(grid.extent(grid.len()), None);
    }

    #[test]
    fn chunks_hold_whole_pages_and_are_not_too_many() {
        let ram = ram(&[(1 << 40, PAGE_SIZE), (1 << 30, 1 << 30)]);
        assert_eq!(least_shifts(&ram, DEFAULT_CHUNK, 1 << 24), [24, 30]);
        assert_eq!(least_shifts(&ram, 1, 1 << 24), [21, 30]);
        assert_eq!(least_shifts(&ram, DEFAULT_CHUNK, 1 << 12), [31, 31]);
    }
}
