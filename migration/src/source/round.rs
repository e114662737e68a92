//! One round: a set of pages goes through the lanes and every lane confirms it.
//!
//! RAM is cut into chunks. Each lane has a thread that takes the next chunk nobody has taken,
//! marks its pages clean, looks at them and sends what is not zero; so lanes share the scanning
//! as well as the sending, and a slow lane just takes fewer chunks. They come in the order of their addresses, or
//! from each part of a region in turn (`SourcePlane::spreads`). A page travels at most once in
//! a round, and every lane ends the round with a barrier, so that no write of the next round can
//! overtake one of this.
//!
//! **Clear before read.** A page is marked clean *before* its content is looked at. If the guest
//! writes in between or afterwards, its bit is set again and the page travels in a later round;
//! the other way round, a write between read and clear would be lost. The same holds for asking
//! whether a page exists at all.

use crate::cpu::{CpuTime, thread_cpu};
use crate::dirty::{DirtySet, WORD_PAGES, runs};
use crate::failure::{Code, Failure};
use crate::machine::SourceMachine;
use crate::memory::{Extent, PAGE_SIZE, Ram};
use crate::monitor::Monitor;
use crate::priority;
use crate::scan;
use crate::transport::{Lane, SourcePlane};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Bitmap words in a chunk: 8 MiB of RAM. Small enough that lanes finish a round together, large
/// enough that a chunk's ioctl and system calls do not show.
const CHUNK_WORDS: usize = 32;

/// A round of no more than this goes through one lane in the calling thread: in the blackout,
/// waking threads would cost more than they carry.
const SINGLE_LANE_BYTES: u64 = 4 << 20;

/// A piece of RAM that one lane takes at a time.
#[derive(Clone, Copy)]
struct Chunk {
    region: usize,
    first_word: usize,
    words: usize,
}

/// How a set is to be sent.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// Number of the round, and of its barrier.
    pub round: u32,
    /// Ask first which pages exist: most of a first round may not.
    pub sparse: bool,
    /// Tell the destination which pages are zero. Not needed while its memory is fresh.
    pub name_zeros: bool,
    /// Mark pages clean before reading them. Not needed once the guest is paused.
    pub clear: bool,
}

/// What a round did.
#[derive(Clone, Copy, Default)]
pub(super) struct Sent {
    pub sent: u64,
    pub zero: u64,
    pub untouched: u64,
    pub elapsed: Duration,
    pub barrier: Duration,
    /// CPU time of lane threads other than the calling one.
    pub cpu: CpuTime,
}

/// Sends rounds of one machine's RAM.
pub(super) struct Rounds<'a> {
    machine: &'a dyn SourceMachine,
    ram: &'a Ram,
    monitor: &'a Monitor,
    /// By address.
    chunks: Vec<Chunk>,
    /// The same, from each part of a region in turn.
    spread: Vec<Chunk>,
}

/// What the lanes of one round share.
struct Shared<'a> {
    rounds: &'a Rounds<'a>,
    chunks: &'a [Chunk],
    set: &'a DirtySet,
    manner: Manner,
    next: AtomicUsize,
    /// A lane has failed: the others need not go on.
    stop: AtomicBool,
}

impl<'a> Rounds<'a> {
    pub(super) fn new(machine: &'a dyn SourceMachine, ram: &'a Ram, monitor: &'a Monitor) -> Self {
        let mut chunks = Vec::new();
        for (region, r) in ram.regions().iter().enumerate() {
            let words = r.pages().div_ceil(WORD_PAGES) as usize;
            chunks.extend((0..words).step_by(CHUNK_WORDS).map(|first_word| Chunk {
                region,
                first_word,
                words: CHUNK_WORDS.min(words - first_word),
            }));
        }
        let mut spread = chunks.clone();
        spread.sort_by_key(|chunk| {
            let part = (ram.regions()[chunk.region].part_len() / (WORD_PAGES * PAGE_SIZE)).max(1) as usize;
            (chunk.region, chunk.first_word % part, chunk.first_word)
        });
        Rounds { machine, ram, monitor, chunks, spread }
    }

    /// Sends `set` and waits until the destination has confirmed it.
    ///
    /// # Errors
    /// The first lane's failure; the plane is then of no more use, and any part of the set may
    /// have arrived.
    pub(super) fn send(
        &self,
        plane: &mut dyn SourcePlane,
        set: &DirtySet,
        manner: Manner,
    ) -> Result<Sent, Failure> {
        let began = Instant::now();
        let bytes = set.bytes();
        self.monitor.round_begins(manner.round, bytes);
        let interrupter = plane.interrupter();
        let chunks = if plane.spreads() { &self.spread } else { &self.chunks };
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let shared = Shared { rounds: self, chunks, set, manner, next, stop };
        let lanes = plane.lanes();
        if lanes.is_empty() {
            return Err(Failure::new(Code::TRANSPORT, "the data plane has no lanes"));
        }
        let small = bytes <= SINGLE_LANE_BYTES;
        let wanted = if small { 1 } else { lanes.len() };
        // Marking pages clean is for a guest that runs. No lane is then driven by the calling thread, which is to switch
        // over later and must not stand back.
        let stands_back = manner.clear && !small;
        let first_other = if stands_back { 0 } else { 1 };
        let (mine, others) = lanes[..wanted].split_at_mut(first_other);
        let drive = |lane: &mut dyn Lane| {
            let result = shared.drive(lane);
            if result.is_err() && !shared.stop.swap(true, Ordering::AcqRel) {
                interrupter.interrupt();
                return result.map_err(|failure| (true, failure));
            }
            result.map_err(|failure| (false, failure))
        };
        let results = thread::scope(|scope| {
            let threads: Vec<_> = others
                .iter_mut()
                .enumerate()
                .map(|(index, lane)| {
                    thread::Builder::new().name(format!("lane-{}", first_other + index)).spawn_scoped(
                        scope,
                        || {
                            if stands_back {
                                priority::stand_back();
                            }
                            let mut sent = drive(lane.as_mut())?;
                            sent.cpu = thread_cpu();
                            Ok(sent)
                        },
                    )
                })
                .collect();
            let mut results: Vec<_> = mine.iter_mut().map(|lane| drive(lane.as_mut())).collect();
            results.extend(threads.into_iter().map(
                |spawned| match spawned.map(thread::ScopedJoinHandle::join) {
                    Ok(Ok(result)) => result,
                    Ok(Err(_)) => Err((true, Failure::new(Code::OTHER, "a lane's thread panicked"))),
                    Err(e) => {
                        Err((true, Failure::new(Code::OTHER, format_args!("cannot start a thread: {e}"))))
                    }
                },
            ));
            results
        });
        let mut total = Sent::default();
        let mut failure: Option<(bool, Failure)> = None;
        for result in results {
            match result {
                Ok(sent) => total.add(&sent),
                // What the first lane to fail met is the cause; the others were interrupted.
                Err(this) if failure.as_ref().is_none_or(|(first, _)| this.0 && !first) => {
                    failure = Some(this)
                }
                Err(_) => {}
            }
        }
        if let Some((_, failure)) = failure {
            return Err(if self.monitor.cancelled() { cancelled() } else { failure });
        }
        total.elapsed = began.elapsed();
        Ok(total)
    }
}

fn cancelled() -> Failure {
    Failure::new(Code::CANCELLED, "cancelled")
}

impl Sent {
    fn add(&mut self, other: &Sent) {
        self.sent += other.sent;
        self.zero += other.zero;
        self.untouched += other.untouched;
        self.cpu += other.cpu;
        self.barrier = self.barrier.max(other.barrier);
    }
}

impl Shared<'_> {
    /// One lane's part of the round.
    fn drive(&self, lane: &mut dyn Lane) -> Result<Sent, Failure> {
        let mut sent = Sent::default();
        let mut scratch = Scratch::default();
        while let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if self.rounds.monitor.cancelled() {
                return Err(cancelled());
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(Failure::new(Code::TRANSPORT, "another lane failed"));
            }
            self.chunk(lane, *chunk, &mut scratch, &mut sent)?;
        }
        let posted = Instant::now();
        lane.post_barrier(self.manner.round)?;
        lane.wait_barrier(self.manner.round)?;
        sent.barrier = posted.elapsed();
        Ok(sent)
    }

    fn chunk(
        &self,
        lane: &mut dyn Lane,
        chunk: Chunk,
        scratch: &mut Scratch,
        sent: &mut Sent,
    ) -> Result<(), Failure> {
        let words = &self.set.words(chunk.region)[chunk.first_word..chunk.first_word + chunk.words];
        let pages: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
        if pages == 0 {
            return Ok(());
        }
        let first_page = chunk.first_word as u64 * WORD_PAGES;
        if self.manner.clear {
            self.rounds.machine.clear_dirty(chunk.region, first_page, words)?;
        }
        scratch.clear();
        let region = &self.rounds.ram.regions()[chunk.region];
        for (first, run) in runs(words, first_page) {
            let mut look = |first, pages| {
                for page in first..first + pages {
                    let address = region.address().wrapping_add((page * PAGE_SIZE) as usize);
                    // SAFETY: `page` is a page of the region (the set has no bits past its end,
                    // and `existing` stays inside what it was asked about), whose mapping is
                    // page-aligned and alive.
                    let zero = unsafe { scan::is_zero(address) };
                    scratch.push(chunk.region, page, zero);
                }
            };
            if self.manner.sparse {
                scan::existing(region, first, run, look);
            } else {
                look(first, run);
            }
        }
        if !scratch.data.is_empty() {
            lane.write(&scratch.data)?;
        }
        if self.manner.name_zeros && !scratch.zeros.is_empty() {
            lane.zero(&scratch.zeros)?;
        }
        let total = |extents: &[Extent]| extents.iter().map(|e| e.len).sum::<u64>();
        let (data, zeros) = (total(&scratch.data), total(&scratch.zeros));
        sent.sent += data;
        sent.zero += zeros;
        sent.untouched += pages * PAGE_SIZE - data - zeros;
        self.rounds.monitor.chunk(pages * PAGE_SIZE, data, zeros);
        Ok(())
    }
}

/// Extents of one chunk; kept between chunks so that nothing is allocated for them.
#[derive(Default)]
struct Scratch {
    data: Vec<Extent>,
    zeros: Vec<Extent>,
}

impl Scratch {
    fn clear(&mut self) {
        self.data.clear();
        self.zeros.clear();
    }

    /// Adds a page to the last extent of its kind if it continues it, else as a new one.
    fn push(&mut self, region: usize, page: u64, zero: bool) {
        let extents = if zero { &mut self.zeros } else { &mut self.data };
        let (region, offset) = (region as u32, page * PAGE_SIZE);
        match extents.last_mut() {
            Some(last) if last.offset + last.len == offset => last.len += PAGE_SIZE,
            _ => extents.push(Extent { region, offset, len: PAGE_SIZE }),
        }
    }
}
