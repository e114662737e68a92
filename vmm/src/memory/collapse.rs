//! Making huge pages of guest RAM in the background, while the guest runs and nobody moves it.
//!
//! Where the host's setting does not give huge pages to whoever touches memory first, and for whatever was
//! written by file, as a destination does, they are made later, of what exists. What a guest never touched
//! stays absent, since a migration sends nothing of it: only where nearly all of 2 MiB exists already is the
//! rest made to exist too.
//!
//! A guest that touches the 2 MiB that are being copied waits for the copy. So they are done one by one, with
//! long rests in between.

use super::thp::{self, HUGE};
use super::{GuestRam, Thp};
use crate::ended::Ended;
use migration::memory::{PAGE_SIZE, Ram, RamRegion};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pages of [`HUGE`].
const PAGES: usize = (HUGE / PAGE_SIZE) as usize;

/// How many of them must exist. Guest RAM grows by a seventh at most.
const ENOUGH: usize = PAGES - PAGES / 8;

/// How long a guest is to have run before the first, and how often it is looked whether it runs.
const SETTLE: Duration = Duration::from_secs(1);

/// Time between two passes over all RAM.
const REST: Duration = Duration::from_secs(60);

/// After each, a rest of so many times what it took: a tenth of a processor is used at most.
const PACE: u32 = 9;

/// After so many refusals one after the other, the host has no such pages to give now.
const REFUSALS: u32 = 16;

/// As lanes, behind the guests.
const NICE: libc::c_int = 10;

/// The thread that does it. It ends when this is dropped.
pub(crate) struct Collapser {
    ended: Arc<Ended>,
    thread: Option<JoinHandle<()>>,
}

impl Collapser {
    /// Starts it for `ram`. It works only while `may` says so, and finishes 2 MiB at most after it no longer
    /// does. `None` if `ram` is not to have huge pages, or there is no thread for it.
    pub fn start(ram: &GuestRam, may: impl Fn() -> bool + Send + 'static) -> Option<Self> {
        if ram.thp() == Thp::Off {
            return None;
        }
        let mut sweep = Sweep::new(ram.ram().clone());
        let ended = Arc::new(Ended::default());
        let shared = ended.clone();
        let work = move || {
            // SAFETY: the call takes no pointers, and is about this thread only.
            unsafe { libc::nice(NICE) };
            let mut settled = false;
            while shared.rest(SETTLE) {
                let now = may();
                if now && settled {
                    sweep.pass(|rest| may() && shared.rest(rest));
                    settled = shared.rest(REST);
                } else {
                    settled = now;
                }
            }
        };
        let thread = std::thread::Builder::new().name("huge-pages".into()).spawn(work).ok()?;
        Some(Collapser { ended, thread: Some(thread) })
    }
}

impl Drop for Collapser {
    fn drop(&mut self) {
        self.ended.end();
        if let Some(thread) = self.thread.take() {
            // If it panicked, it has said why, and nobody depends on it.
            let _ = thread.join();
        }
    }
}

/// What is left to do. Huge pages of guest RAM stay so: nothing is ever taken out of it.
struct Sweep {
    ram: Arc<Ram>,
    /// For each region, whether each 2 MiB are one.
    done: Vec<Vec<bool>>,
}

impl Sweep {
    fn new(ram: Arc<Ram>) -> Self {
        let done = ram.regions().iter().map(|region| vec![false; (region.len() / HUGE) as usize]).collect();
        Sweep { ram, done }
    }

    /// Goes over all RAM once. Before each 2 MiB that it makes one page of, it calls `go_on` with how long to
    /// rest first, and ends if that says no.
    fn pass(&mut self, go_on: impl Fn(Duration) -> bool) {
        let (mut took, mut refused) = (Duration::ZERO, 0);
        for (region, done) in self.ram.regions().iter().zip(&mut self.done) {
            for (done, block) in done.iter_mut().zip(0u64..).filter(|(done, _)| !**done) {
                if resident(region, block * HUGE) < ENOUGH {
                    continue;
                }
                if !go_on(took * PACE) {
                    return;
                }
                let began = Instant::now();
                let result = thp::collapse(region, block * HUGE, HUGE);
                took = began.elapsed();
                *done = result.is_ok();
                refused = match result.map_err(|error| error.raw_os_error()) {
                    Ok(()) => 0,
                    // Somebody is using a page of it just now. Later, perhaps.
                    Err(Some(libc::EAGAIN)) => refused,
                    Err(_) => refused + 1,
                };
                if refused == REFUSALS {
                    return;
                }
            }
        }
    }
}

/// How many pages of the [`HUGE`] bytes from `offset` on exist, which must lie inside the region.
fn resident(region: &RamRegion, offset: u64) -> usize {
    let mut pages = [0u8; PAGES];
    let address = region.address().wrapping_add(offset as usize);
    // SAFETY: the page-aligned range lies inside the region's mapping, as the caller vouches; the kernel
    // writes one byte a page, for which `pages` has room. Outside of any mapping it would be refused.
    let result = unsafe { libc::mincore(address.cast(), HUGE as usize, pages.as_mut_ptr()) };
    if result == 0 { pages.iter().filter(|page| **page & 1 == 1).count() } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::super::thp::tests::mapped_huge;
    use super::super::{PageSize, thp};
    use super::*;
    use std::cell::Cell;

    /// What a page is filled with.
    fn content(page: usize) -> u8 {
        (page % 251) as u8 + 1
    }

    /// Writes pages by file, as a destination does, which makes fewer huge pages at once than writing to the
    /// mapping.
    fn write(ram: &GuestRam, pages: impl Iterator<Item = usize>) {
        let region = &ram.ram().regions()[0];
        for page in pages {
            let bytes = [content(page); PAGE_SIZE as usize];
            let piece = region.pieces(page as u64 * PAGE_SIZE, PAGE_SIZE).next().unwrap();
            // SAFETY: the bytes live across the call, and nobody else uses this memory.
            let put =
                unsafe { libc::pwrite(piece.fd, bytes.as_ptr().cast(), bytes.len(), piece.offset as i64) };
            assert_eq!(put, PAGE_SIZE as isize);
        }
    }

    fn blocks(ram: &GuestRam) -> Vec<usize> {
        let region = &ram.ram().regions()[0];
        (0..region.len() / HUGE).map(|block| resident(region, block * HUGE)).collect()
    }

    /// 64 MiB: the first 16 exist, then comes a hole, in which one page, half of 2 MiB and
    /// nearly all of 2 MiB exist.
    fn holed() -> GuestRam {
        let ram = GuestRam::new(64 << 20, PageSize::Small).unwrap();
        write(&ram, 0..8 * PAGES);
        write(&ram, [10 * PAGES + 7].into_iter());
        write(&ram, 12 * PAGES..12 * PAGES + PAGES / 2);
        write(&ram, 14 * PAGES + PAGES / 8..15 * PAGES);
        ram
    }

    #[test]
    fn what_exists_becomes_huge_and_what_does_not_stays_absent() {
        let ram = holed();
        let before = blocks(&ram);
        Sweep::new(ram.ram().clone()).pass(|_| true);
        // On whatever host: the kernel is asked by the same call.
        let huge = mapped_huge(&ram);
        match thp::try_collapse() {
            Ok(()) => assert!(huge >= HUGE, "nothing was made huge"),
            Err(why) => assert_eq!(huge, 0, "{why}"),
        }
        for (block, (before, after)) in before.into_iter().zip(blocks(&ram)).enumerate() {
            let expected = if before > PAGES / 2 { before.max(after) } else { before };
            assert_eq!(after, expected, "2 MiB number {block}");
        }
        let region = &ram.ram().regions()[0];
        for page in (0..8 * PAGES).chain(12 * PAGES..12 * PAGES + PAGES / 2) {
            // SAFETY: inside the mapping, to which nobody holds references.
            let byte = unsafe { region.address().add(page * PAGE_SIZE as usize + 99).read_volatile() };
            assert_eq!(byte, content(page), "page {page}");
        }
    }

    #[test]
    fn nothing_is_begun_once_it_may_not() {
        let ram = holed();
        let left = Cell::new(2);
        Sweep::new(ram.ram().clone()).pass(|_| left.replace(left.get() - 1) > 0);
        assert_eq!(left.get(), -1, "it went on after it was told not to");
        assert!(mapped_huge(&ram) <= 2 * HUGE);
    }

    #[test]
    fn a_refusal_with_an_end_is_no_endless_work() {
        let ram = GuestRam::new(64 << 20, PageSize::Small).unwrap();
        ram.populate_range(0, 0, 64 << 20).unwrap();
        let mut sweep = Sweep::new(ram.ram().clone());
        let asked = Cell::new(0);
        let pass = |sweep: &mut Sweep| {
            asked.set(0);
            sweep.pass(|_| {
                asked.set(asked.get() + 1);
                true
            });
        };
        pass(&mut sweep);
        assert!(asked.get() <= 32);
        if thp::try_collapse().is_ok() && sweep.done.iter().flatten().all(|done| *done) {
            pass(&mut sweep);
            assert_eq!(asked.get(), 0, "huge pages were asked for again");
        }
    }

    #[test]
    fn ram_that_is_not_to_have_them_gets_none() {
        let ram = GuestRam::with_thp(64 << 20, PageSize::Small, Thp::Off).unwrap();
        assert!(Collapser::start(&ram, || true).is_none());
    }
}
