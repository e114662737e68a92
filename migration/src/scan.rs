//! What of guest RAM exists, and what of it is not zero.
//!
//! Both questions are answered without making memory exist: reading a page of a memfd that was
//! never written would allocate it, so ranges are asked of the file first.

use crate::memory::{PAGE_SIZE, RamRegion};
use std::os::fd::AsRawFd;

/// Pages of a region that exist in memory within `first..first + pages`, as runs of
/// (first page, pages) given to `each`. Pages outside the runs were never touched and read as
/// zeros.
///
/// On 4 KiB memfds this is `SEEK_DATA`. hugetlbfs answers that call with "all data", so there it is
/// `mincore` on the mapping, through which KVM resolves the guest's own faults too. Where neither
/// answers, everything is reported: more is sent, nothing is lost.
pub fn existing(region: &RamRegion, first: u64, pages: u64, mut each: impl FnMut(u64, u64)) {
    if region.backing_page() > PAGE_SIZE {
        existing_huge(region, first, pages, each);
        return;
    }
    let fd = region.file().as_raw_fd();
    let base = region.file_offset();
    let (mut at, end) = (first * PAGE_SIZE, (first + pages) * PAGE_SIZE);
    while at < end {
        // SAFETY: lseek takes no pointers; the descriptor is borrowed from the region. Moving the
        // shared file position disturbs nobody: all other access is positional.
        let data = unsafe { libc::lseek(fd, (base + at) as i64, libc::SEEK_DATA) };
        if data < 0 {
            if std::io::Error::last_os_error().raw_os_error() != Some(libc::ENXIO) {
                each(at / PAGE_SIZE, (end - at) / PAGE_SIZE);
            }
            return;
        }
        let data = data as u64 - base;
        if data >= end {
            return;
        }
        // SAFETY: as above.
        let hole = unsafe { libc::lseek(fd, (base + data) as i64, libc::SEEK_HOLE) };
        let hole = if hole < 0 { end } else { (hole as u64 - base).min(end) };
        each(data / PAGE_SIZE, (hole - data).div_ceil(PAGE_SIZE));
        at = hole;
    }
}

fn existing_huge(region: &RamRegion, first: u64, pages: u64, mut each: impl FnMut(u64, u64)) {
    let step = region.backing_page() / PAGE_SIZE;
    let (mut at, end) = (first, first + pages);
    while at < end {
        let huge_start = at - at % step;
        let next = (huge_start + step).min(end);
        let mut resident = 0u8;
        let address = region.address().wrapping_add((huge_start * PAGE_SIZE) as usize);
        // SAFETY: the address is page-aligned and inside the region's mapping, the length is one
        // page, and `resident` is the one byte the kernel writes for it.
        let result = unsafe { libc::mincore(address.cast(), PAGE_SIZE as usize, &mut resident) };
        if result != 0 || resident & 1 == 1 {
            each(at, next - at);
        }
        at = next;
    }
}

/// Whether the page at `page` is all zeros. Reads up to the first byte that is not.
///
/// The guest may be writing to the page: the answer holds for some moment of the scan for each
/// word, and the dirty log repairs the rest, as for content that is sent.
///
/// # Safety
/// `page` must be aligned to 64 bytes and readable for [`PAGE_SIZE`] bytes.
pub unsafe fn is_zero(page: *const u8) -> bool {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi8, _mm_load_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
    };
    // 64 bytes a step: one cache line, four loads of the SSE2 that every x86_64 has. The first
    // line decides for nearly every page that is in use, so wider vectors would gain nothing
    // there; on zero pages four loads a line already keep up with memory.
    let vectors = page.cast::<__m128i>();
    for line in 0..(PAGE_SIZE as usize / 64) {
        // SAFETY: line * 64 + 64 <= PAGE_SIZE, and the caller vouches for alignment and reach.
        let any = unsafe {
            let at = vectors.add(line * 4);
            let (a, b) = (_mm_load_si128(at), _mm_load_si128(at.add(1)));
            let (c, d) = (_mm_load_si128(at.add(2)), _mm_load_si128(at.add(3)));
            let any = _mm_or_si128(_mm_or_si128(a, b), _mm_or_si128(c, d));
            _mm_movemask_epi8(_mm_cmpeq_epi8(any, _mm_setzero_si128()))
        };
        if any != 0xffff {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE as usize]);

    #[test]
    fn one_bit_anywhere_makes_a_page_not_zero() {
        let mut page = Page([0; PAGE_SIZE as usize]);
        // SAFETY: the page is aligned and readable.
        assert!(unsafe { is_zero(page.0.as_ptr()) });
        for at in 0..page.0.len() {
            page.0[at] = 1 << (at % 8);
            // SAFETY: as above.
            assert!(!unsafe { is_zero(page.0.as_ptr()) }, "byte {at}");
            page.0[at] = 0;
        }
    }
}
