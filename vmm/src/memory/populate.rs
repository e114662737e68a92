//! Making RAM exist before it is written to.
//!
//! A destination that populates its RAM first takes page faults in bulk and in parallel instead of
//! one by one in the path of the data. A source never does: what its guest never touched must stay
//! absent.

use super::thp::{self, HUGE};
use super::{Error, GuestRam, PageSize, Thp};
use migration::cpu::thread_cpu;
use migration::memory::RamRegion;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Bytes per call: long enough to amortise it, short enough to share the work out evenly.
const CHUNK: u64 = 32 << 20;

/// Processor time for making huge pages of a chunk above which no more are made: 16 times 2 ms. Where memory
/// lies in one piece, a chunk takes 2 to 4 ms. Where it does not, the kernel moves pages about for each huge
/// page, and a chunk takes some 60 ms; small pages take 22, and what a migration gains by huge ones is not 2.
/// What is small then becomes huge in the background, once the guest runs.
const WORTH: Duration = Duration::from_millis(32);

/// Linux 5.14; libc has it only for some targets.
const MADV_POPULATE_WRITE: libc::c_int = 23;

impl GuestRam {
    /// Populates all RAM, with `threads` threads (at least one). Existing content stays.
    ///
    /// # Errors
    /// [`Error::System`] when the host runs out of memory, or has no MADV_POPULATE_WRITE.
    pub fn populate(&self, threads: usize) -> Result<(), Error> {
        for region in 0..self.ram().regions().len() {
            let len = self.ram().regions()[region].len();
            let next = AtomicU64::new(0);
            let huge = AtomicBool::new(true);
            let work = || -> Result<(), Error> {
                loop {
                    let offset = next.fetch_add(CHUNK.max(self.page_size().bytes()), Ordering::Relaxed);
                    if offset >= len {
                        return Ok(());
                    }
                    let len = CHUNK.max(self.page_size().bytes()).min(len - offset);
                    if huge.load(Ordering::Relaxed) && self.make_huge(region, offset, len)? > WORTH {
                        huge.store(false, Ordering::Relaxed);
                    }
                    self.populate_range(region, offset, len)?;
                }
            };
            std::thread::scope(|scope| {
                let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
                let mine = work();
                helpers.into_iter().fold(mine, |result, helper| {
                    result.and(helper.join().unwrap_or(Err(Error::System {
                        what: "populate",
                        source: io::Error::other("a thread panicked"),
                    })))
                })
            })?;
        }
        Ok(())
    }

    /// Populates `len` bytes from `offset` of region number `region`; both are multiples of the region's page
    /// size.
    ///
    /// # Errors
    /// As for [`populate`](Self::populate), and [`Error::Layout`] for a range outside the region.
    pub fn populate_range(&self, region: usize, offset: u64, len: u64) -> Result<(), Error> {
        fault_in(self.range(region, offset, len)?, offset, len)
    }

    /// Makes whole 2 MiB of a range huge pages, if it may have them; returns the processor time that it took.
    /// They are made of one small page and 511 that do not exist: so nothing is copied, and no memory that
    /// lies in one piece is broken up for small pages first.
    fn make_huge(&self, region: usize, offset: u64, len: u64) -> Result<Duration, Error> {
        let region = self.range(region, offset, len)?;
        let (first, last) = (offset.next_multiple_of(HUGE), (offset + len) / HUGE * HUGE);
        if self.thp() == Thp::Off || self.page_size() != PageSize::Small || first >= last {
            return Ok(Duration::ZERO);
        }
        let before = thread_cpu();
        for huge in (first..last).step_by(HUGE as usize) {
            fault_in(region, huge, self.page_size().bytes())?;
        }
        // Whatever refuses it, small pages do as well.
        let _ = thp::collapse(region, first, last - first);
        Ok(thread_cpu().since(before).all)
    }

    fn range(&self, region: usize, offset: u64, len: u64) -> Result<&RamRegion, Error> {
        let region = self.ram().regions().get(region).ok_or(Error::Layout)?;
        offset.checked_add(len).filter(|end| *end <= region.len()).ok_or(Error::Layout)?;
        Ok(region)
    }
}

/// Has the kernel do what writing to each page of a range inside the region would.
fn fault_in(region: &RamRegion, offset: u64, len: u64) -> Result<(), Error> {
    let address = region.address().wrapping_add(offset as usize);
    loop {
        // SAFETY: the caller checked that the range lies inside the region's mapping; the call faults pages
        // in and changes no content.
        let result = unsafe { libc::madvise(address.cast(), len as usize, MADV_POPULATE_WRITE) };
        if result == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(Error::System { what: "populate", source });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of the region's mapping that exist.
    fn resident_pages(ram: &GuestRam) -> usize {
        let region = &ram.ram().regions()[0];
        let mut pages = vec![0u8; region.pages() as usize];
        // SAFETY: the range is the region's mapping, and there is one byte per page.
        let result =
            unsafe { libc::mincore(region.address().cast(), region.len() as usize, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn nothing_exists_until_populated_and_everything_after() {
        let ram = GuestRam::new(80 << 20, PageSize::Small).unwrap();
        assert_eq!(resident_pages(&ram), 0);
        ram.populate(3).unwrap();
        assert_eq!(resident_pages(&ram), 80 << 8);
        assert!(matches!(ram.populate_range(0, 79 << 20, 2 << 20), Err(Error::Layout)));
        assert!(matches!(ram.populate_range(1, 0, 4096), Err(Error::Layout)));
    }

    #[test]
    fn populated_ram_is_huge_at_once_where_that_can_be_had() {
        for (thp, huge) in [(Thp::On, true), (Thp::Off, false)] {
            let ram = GuestRam::with_thp(80 << 20, PageSize::Small, thp).unwrap();
            ram.populate(2).unwrap();
            assert_eq!(resident_pages(&ram), 80 << 8);
            let expected = huge && thp::try_collapse().is_ok();
            assert_eq!(thp::tests::mapped_huge(&ram) >= HUGE, expected, "{thp:?}");
        }
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        assert!(matches!(GuestRam::new(1 << 50, PageSize::Small), Err(Error::HostMemory { .. })));
        assert!(matches!(GuestRam::new(17 << 20, PageSize::Huge2M), Err(Error::HugePageMultiple { .. })));
    }
}
