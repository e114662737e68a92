//! What of guest RAM exists, and what of it is not zero.
//!
//! Both questions are answered without making memory exist: reading a page of a memfd that was
//! never written would allocate it, so ranges are asked of the file first.

use crate::memory::{Extent, PAGE_SIZE, Ram, RamRegion};

/// Pages whose residence is asked for at once.
const WINDOW: u64 = 2048;

/// Pages of a region that exist in memory within `first..first + pages`, as runs of
/// (first page, pages) given to `each`; runs may follow each other without a gap. Pages outside the
/// runs were never touched and read as zeros.
///
/// Its cost depends on the range, not on what lies behind it. On 4 KiB memfds `SEEK_DATA` finds where
/// pages begin to exist, at once however large the hole before them is. Where they cease to, `SEEK_HOLE`
/// could tell, but it goes through *everything* that exists up to the next hole: asked once for each chunk
/// of a full guest, that is quadratic in its memory. So `mincore` tells instead which pages of the range
/// are resident. It does not know pages that were swapped out, hence only its yes counts; for its no,
/// `SEEK_DATA` is asked again.
///
/// hugetlbfs answers `SEEK_DATA` with "all data", so there it is `mincore` alone (such pages are never
/// swapped out), on the mapping through which KVM resolves the guest's own faults too. Where nothing
/// answers, everything is reported: more is sent, nothing is lost.
pub fn existing(region: &RamRegion, first: u64, pages: u64, mut each: impl FnMut(u64, u64)) {
    if region.backing_page() > PAGE_SIZE {
        existing_huge(region, first, pages, each);
        return;
    }
    let end = first + pages;
    let mut window = Window { start: 0, resident: [0; WINDOW as usize] };
    let mut at = first;
    while let Some(data) = next_data(region, at, end) {
        let mut run_end = data + 1;
        while run_end < end && window.is_resident(region, run_end, end) {
            run_end += 1;
        }
        each(data, run_end - data);
        at = run_end;
    }
}

/// The first page in `at..end` that exists in 4 KiB memfds.
fn next_data(region: &RamRegion, mut at: u64, end: u64) -> Option<u64> {
    for piece in region.pieces(at * PAGE_SIZE, end.saturating_sub(at) * PAGE_SIZE) {
        // SAFETY: lseek takes no pointers; the descriptor is borrowed from the region. Moving the
        // shared file position disturbs nobody: all other access is positional.
        let data = unsafe { libc::lseek(piece.fd, piece.offset as i64, libc::SEEK_DATA) };
        match u64::try_from(data) {
            Ok(data) if data < piece.offset + piece.len => {
                return Some(at + (data - piece.offset) / PAGE_SIZE);
            }
            Ok(_) => {}
            // ENXIO: nothing but a hole up to the end of the file. Anything else is no answer.
            Err(_) if std::io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => {}
            Err(_) => return Some(at),
        }
        at += piece.len / PAGE_SIZE;
    }
    None
}

/// Which pages of a stretch were resident when it was looked at. A page that was stays existent:
/// nothing is ever taken out of guest memory, so the answer does not age.
struct Window {
    /// First page.
    start: u64,
    /// For each page, bit 0: resident.
    resident: [u8; WINDOW as usize],
}

impl Window {
    /// Whether `page` certainly exists. Pages are asked about in ascending order, none from `end` on.
    fn is_resident(&mut self, region: &RamRegion, page: u64, end: u64) -> bool {
        let known = self.start..self.start + WINDOW;
        // `existing` never asks about page 0, the only one that an empty window would seem to hold.
        if self.start == 0 || !known.contains(&page) {
            self.start = page;
            self.resident = [0; WINDOW as usize];
            let length = WINDOW.min(end - page) * PAGE_SIZE;
            let address = region.address().wrapping_add((page * PAGE_SIZE) as usize);
            // SAFETY: `page..end` lies inside the region, so the page-aligned range lies inside its
            // mapping; the kernel writes one byte a page, for which `resident` has room.
            let result =
                unsafe { libc::mincore(address.cast(), length as usize, self.resident.as_mut_ptr()) };
            if result != 0 {
                self.resident = [0; WINDOW as usize];
            }
        }
        self.resident[(page - self.start) as usize] & 1 == 1
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

/// Pages that are cleared between two looks at whether to stop.
const CLEAR_PAGES: u64 = 4096;

/// Makes an extent that [`Ram::check`] has passed read as zeros. Pages that do not exist already do, and are
/// not made to exist. Stops early once `stop` says so.
///
/// # Safety
/// The guest must not be running, and no references to its memory may exist.
pub unsafe fn clear(ram: &Ram, extent: &Extent, stop: impl Fn() -> bool) {
    let Ok(region) = ram.check(extent) else { return };
    let (mut at, end) = (extent.offset / PAGE_SIZE, (extent.offset + extent.len) / PAGE_SIZE);
    while at < end && !stop() {
        let some = CLEAR_PAGES.min(end - at);
        existing(region, at, some, |first, pages| {
            let address = region.address().wrapping_add((first * PAGE_SIZE) as usize);
            // SAFETY: `existing` reports only pages of the extent, which lies inside the region's
            // mapping; nobody else uses them, as the caller vouches.
            unsafe { std::ptr::write_bytes(address, 0, (pages * PAGE_SIZE) as usize) };
        });
        at += some;
    }
}

/// Writes zeros over every page that holds something else. Pages that do not exist go on not to exist, and
/// pages that exist go on to exist. Nobody else may be writing to `ram`.
pub(crate) fn make_zero(ram: &Ram) {
    for region in ram.regions() {
        existing(region, 0, region.pages(), |first, pages| {
            for page in first..first + pages {
                let address = region.address().wrapping_add((page * PAGE_SIZE) as usize);
                // SAFETY: `existing` reports only pages inside the region, whose mapping is page-aligned,
                // writable and alive. The machine does not run and no data plane is open yet, so nobody else
                // uses them.
                unsafe {
                    if !is_zero(address) {
                        address.write_bytes(0, PAGE_SIZE as usize);
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::bed::ram_of;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

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

    fn pages_found(region: &RamRegion, first: u64, pages: u64) -> Vec<u64> {
        let mut found = Vec::new();
        existing(region, first, pages, |first, pages| found.extend(first..first + pages));
        found
    }

    #[test]
    fn exactly_the_pages_that_were_written_exist() {
        let ram = ram_of(&[3 * WINDOW]);
        let region = &ram.regions()[0];
        assert!(pages_found(region, 0, 3 * WINDOW).is_empty());
        // Written through the mapping, and written to the file alone, on both sides of windows' ends.
        let mapped = [0, 1, 2, 7, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 5, 3 * WINDOW - 1];
        let filed = [3, 9, WINDOW + 2, 2 * WINDOW];
        for page in mapped {
            // SAFETY: inside the mapping, to which nobody holds references.
            unsafe { region.address().add((page * PAGE_SIZE) as usize).write_volatile(1) };
        }
        for page in filed {
            let piece = region.pieces(page * PAGE_SIZE, 1).next().unwrap();
            let (fd, offset) = (piece.fd, piece.offset as i64);
            // SAFETY: one byte is read from a live array.
            assert_eq!(unsafe { libc::pwrite(fd, [1u8].as_ptr().cast(), 1, offset) }, 1);
        }
        let mut all: Vec<u64> = mapped.into_iter().chain(filed).collect();
        all.sort_unstable();
        for (first, pages) in
            [(0, 3 * WINDOW), (1, 2), (2, WINDOW), (8, 3 * WINDOW - 8), (4, 3), (3 * WINDOW - 1, 1)]
        {
            let expected: Vec<u64> =
                all.iter().copied().filter(|page| (first..first + pages).contains(page)).collect();
            assert_eq!(pages_found(region, first, pages), expected, "{first} + {pages}");
        }
        assert_eq!(pages_found(region, 0, 3 * WINDOW), all, "asking made no page exist");
    }

    #[test]
    fn clearing_stops_when_the_session_is_over() {
        let ram = ram_of(&[64]);
        let all = Extent { region: 0, offset: 0, len: 64 * PAGE_SIZE };
        let byte = ram.address(&all).unwrap();
        // SAFETY: inside the mapping; nobody else uses it.
        unsafe { byte.write(1) };
        // SAFETY: there is no guest.
        unsafe { clear(&ram, &all, || true) };
        // SAFETY: as above.
        assert_eq!(unsafe { byte.read() }, 1, "not interrupted");
        // SAFETY: as above.
        unsafe { clear(&ram, &all, || false) };
        // SAFETY: as above.
        assert_eq!(unsafe { byte.read() }, 0);
    }

    #[test]
    fn a_full_region_is_found_whole() {
        let ram = ram_of(&[2 * WINDOW + 3]);
        let region = &ram.regions()[0];
        // SAFETY: the whole mapping, to which nobody holds references.
        unsafe { std::ptr::write_bytes(region.address(), 1, region.len() as usize) };
        assert_eq!(pages_found(region, 0, region.pages()), (0..region.pages()).collect::<Vec<_>>());
    }

    /// Linux 6.1; libc has it only for some targets.
    const MADV_COLLAPSE: libc::c_int = 25;

    /// Kernels that make huge pages of small ones without hiding them show nothing here, nor do those that
    /// make none.
    #[test]
    fn what_exists_is_found_whatever_the_kernel_makes_of_it() {
        const HUGE: u64 = 2 << 20;
        let ram = ram_of(&[32 * HUGE / PAGE_SIZE]);
        let region = &ram.regions()[0];
        let written: Vec<u64> = (0..region.pages()).filter(|page| page % 37 != 5).collect();
        for page in &written {
            // SAFETY: inside the mapping, to which nobody holds references.
            unsafe { region.address().add((page * PAGE_SIZE) as usize).write_volatile(1) };
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let scan = || {
                while !done.load(Ordering::Relaxed) {
                    let mut found = pages_found(region, 0, region.pages()).into_iter().peekable();
                    for page in &written {
                        while found.next_if(|found| found < page).is_some() {}
                        assert_eq!(found.peek(), Some(page), "a page that exists was not found");
                    }
                }
            };
            let scans = [0; 2].map(|_| scope.spawn(scan));
            for block in 0..region.len() / HUGE {
                let address = region.address().wrapping_add((block * HUGE) as usize);
                // SAFETY: the range lies in the region's mapping, and the advice changes no content.
                unsafe { libc::madvise(address.cast(), HUGE as usize, MADV_COLLAPSE) };
            }
            done.store(true, Ordering::Relaxed);
            scans.into_iter().for_each(|scan| scan.join().expect("everything is found"));
        });
    }
}
