//! A machine that is nothing but memory and somebody who writes to it: the smallest that can be moved.

use crate::dirty::{DirtySet, WORD_PAGES};
use crate::failure::{Code, Failure};
use crate::machine::{DestinationHost, DestinationMachine, SourceMachine};
use crate::memory::{PAGE_SIZE, Ram, RegionLayout};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What a state begins with.
const MAGIC: [u8; 8] = *b"a memory";

/// Between two writes.
const BETWEEN_WRITES: Duration = Duration::from_micros(100);

/// Memory to which a thread, its guest, writes a number that goes up, to one page after the other.
///
/// Its tracker is one in software: a bitmap that is cleared when it is collected, and in which a page is
/// marked after it was written.
pub struct Memory {
    shared: Arc<Shared>,
    guest: Option<JoinHandle<()>>,
}

struct Shared {
    ram: Arc<Ram>,
    /// A bitmap for each region.
    marks: Vec<Vec<AtomicU64>>,
    /// Held while a page is written.
    guest: Mutex<Guest>,
    ended: AtomicBool,
}

struct Guest {
    runs: bool,
    /// How often it has written.
    writes: u64,
}

impl Shared {
    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            let mut guest = self.guest();
            if guest.runs {
                guest.writes += 1;
                let (region, page) = self.page(guest.writes);
                self.put(region, page, guest.writes);
                self.mark(region, page);
            }
            drop(guest);
            thread::sleep(BETWEEN_WRITES);
        }
    }

    /// Where write number `write` goes: each page in turn, in steps, so that neighbours are not dirty
    /// together.
    fn page(&self, write: u64) -> (usize, u64) {
        let pages = self.ram.len() / PAGE_SIZE;
        let mut page = write.wrapping_mul(7) % pages;
        let mut region = 0;
        while page >= self.ram.regions()[region].pages() {
            page -= self.ram.regions()[region].pages();
            region += 1;
        }
        (region, page)
    }

    fn put(&self, region: usize, page: u64, value: u64) {
        // Fails only outside the region, which `page` does not leave.
        let written = self.ram.regions()[region].write(page * PAGE_SIZE, &value.to_le_bytes());
        debug_assert!(written.is_ok(), "{written:?}");
    }

    /// After the page was written.
    fn mark(&self, region: usize, page: u64) {
        let (word, bit) = ((page / WORD_PAGES) as usize, page % WORD_PAGES);
        self.marks[region][word].fetch_or(1 << bit, Ordering::Release);
    }
}

impl Memory {
    /// Memory of this layout, to which nobody writes before it is resumed.
    ///
    /// # Panics
    /// If there can be no such memory, or no thread.
    pub fn new(layout: &[RegionLayout]) -> Self {
        Memory::build(layout).expect("memory of a layout that can be")
    }

    fn build(layout: &[RegionLayout]) -> Result<Self, Failure> {
        let ram = Arc::new(Ram::allocate(layout)?);
        let words = |pages: u64| (0..pages.div_ceil(WORD_PAGES)).map(|_| AtomicU64::new(0)).collect();
        let marks = ram.regions().iter().map(|region| words(region.pages())).collect();
        let guest = Mutex::new(Guest { runs: false, writes: 0 });
        let shared = Arc::new(Shared { ram, marks, guest, ended: AtomicBool::new(false) });
        let living = Arc::clone(&shared);
        let thread = thread::Builder::new().name("guest".into()).spawn(move || living.live());
        let thread =
            thread.map_err(|e| Failure::new(Code::OTHER, format_args!("cannot start a thread: {e}")))?;
        Ok(Memory { shared, guest: Some(thread) })
    }

    /// How often the guest has written. It takes this with it when it moves.
    pub fn writes(&self) -> u64 {
        self.shared.guest().writes
    }

    /// Writes `value` to a page as a device would, whether the guest runs or not.
    pub fn write(&self, region: usize, page: u64, value: u64) {
        self.write_unmarked(region, page, value);
        self.mark(region, page);
    }

    pub(super) fn write_unmarked(&self, region: usize, page: u64, value: u64) {
        self.shared.put(region, page, value);
    }

    pub(super) fn mark(&self, region: usize, page: u64) {
        self.shared.mark(region, page);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Its panic has been reported by its own message.
        let _ = self.guest.take().map(JoinHandle::join);
    }
}

impl SourceMachine for Memory {
    fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.shared.ram)
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        Ok(Vec::new())
    }

    /// Pages are marked all the time. Those that were marked before are sent in the first round anyway.
    fn start_tracking(&self) -> Result<(), Failure> {
        self.shared.marks.iter().flatten().for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        for (region, marks) in self.shared.marks.iter().enumerate() {
            for (word, mark) in set.words_mut(region).iter_mut().zip(marks) {
                *word |= mark.swap(0, Ordering::Acquire);
            }
        }
        Ok(())
    }

    fn pause(&self) -> Result<(), Failure> {
        // Whoever has the lock is not in the middle of a write.
        self.shared.guest().runs = false;
        Ok(())
    }

    fn resume(&self) -> Result<(), Failure> {
        self.shared.guest().runs = true;
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        Ok([MAGIC, self.writes().to_le_bytes()].concat())
    }
}

/// Builds memory for what arrives.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryHost;

/// Memory at a destination; once its guest runs it is a [`Memory`] like any other.
pub struct Arrived(pub Memory);

impl DestinationHost for MemoryHost {
    type Machine = Arrived;

    fn build(&mut self, _description: &[u8], layout: &[RegionLayout]) -> Result<Arrived, Failure> {
        Memory::build(layout).map(Arrived)
    }
}

impl DestinationMachine for Arrived {
    fn ram(&self) -> Arc<Ram> {
        self.0.ram()
    }

    fn memory_is_zero(&self) -> bool {
        true
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        match state.split_first_chunk() {
            Some((&MAGIC, writes)) => match writes.try_into() {
                Ok(writes) => {
                    self.0.shared.guest().writes = u64::from_le_bytes(writes);
                    Ok(())
                }
                Err(_) => Err(Failure::new(Code::STATE, "the state of a memory has 16 bytes")),
            },
            _ => Err(Failure::new(Code::STATE, "this is not the state of a memory")),
        }
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.0.resume()
    }
}
