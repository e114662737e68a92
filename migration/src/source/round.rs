//! One round: a set of pages goes through the lanes and every lane confirms it.
//!
//! RAM is cut into chunks. Each lane has a thread that takes the next chunk nobody has taken, marks its pages
//! clean, looks at them and sends what is not zero; so lanes share the scanning as well as the sending, and a
//! slow lane just takes fewer chunks. They come in the order of their addresses, or from each part of a
//! region in turn (`SourcePlane::spreads`). A page travels at most once in a round, and every lane ends the
//! round with a barrier, so that no write of the next round can overtake one of this.
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
use crate::transport::{Interrupt, Lane, SourcePlane};
use crate::unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// Bitmap words in a chunk: 8 MiB of RAM. Small enough that lanes finish a round together, large
/// enough that a chunk's ioctl and system calls do not show.
const CHUNK_WORDS: usize = 32;

/// A round of no more than this goes through one lane in the calling thread: in the blackout,
/// waking threads would cost more than they carry.
const MAX_SINGLE_LANE_BYTES: u64 = 4 << 20;

/// A piece of RAM that one lane takes at a time.
#[derive(Clone, Copy)]
struct Chunk {
    region: usize,
    first_word: usize,
    words: usize,
}

impl Chunk {
    fn first_page(&self) -> u64 {
        self.first_word as u64 * WORD_PAGES
    }
}

/// How a round is sent.
#[derive(Clone, Copy)]
pub(super) struct RoundOptions {
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
struct Round<'a> {
    rounds: &'a Rounds<'a>,
    chunks: &'a [Chunk],
    set: &'a DirtySet,
    options: RoundOptions,
    next: AtomicUsize,
    /// What the first lane to fail met. The others need not go on.
    failure: OnceLock<Failure>,
    interrupter: Arc<dyn Interrupt>,
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
        options: RoundOptions,
    ) -> Result<Sent, Failure> {
        let began = Instant::now();
        let bytes = set.bytes();
        self.monitor.round_begins(options.round, bytes);
        let round = Round {
            rounds: self,
            chunks: if plane.spreads() { &self.spread } else { &self.chunks },
            set,
            options,
            next: AtomicUsize::new(0),
            failure: OnceLock::new(),
            interrupter: plane.interrupter(),
        };
        let sent = round.send(plane.lanes(), bytes <= MAX_SINGLE_LANE_BYTES);
        match round.failure.into_inner() {
            None => Ok(Sent { elapsed: began.elapsed(), ..sent }),
            // What lanes meet when they are interrupted is not the cause.
            Some(failure) => Err(self.monitor.stopped().unwrap_or(failure)),
        }
    }
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

impl Round<'_> {
    /// Drives `lanes`, or only the first of them for a `small` set. What fails is noted.
    fn send(&self, lanes: &mut [Box<dyn Lane>], small: bool) -> Sent {
        let wanted = if small { lanes.len().min(1) } else { lanes.len() };
        if wanted == 0 {
            self.fail(Failure::new(Code::TRANSPORT, "the data plane has no lanes"));
        }
        // Marking pages clean is for a guest that runs. No lane is then driven by the calling thread, which
        // is to switch over later and must not have its priority lowered.
        let guest_first = self.options.clear && !small;
        let (mine, others) = lanes[..wanted].split_at_mut(if guest_first { 0 } else { wanted.min(1) });
        let mut total = Sent::default();
        thread::scope(|scope| {
            let mut threads = Vec::with_capacity(others.len());
            for (index, lane) in (mine.len()..).zip(others) {
                let work = move || self.drive_thread(lane.as_mut(), guest_first);
                match thread::Builder::new().name(format!("lane-{index}")).spawn_scoped(scope, work) {
                    Ok(thread) => threads.push(thread),
                    Err(e) => {
                        self.fail(Failure::new(Code::OTHER, format_args!("cannot start a thread: {e}")))
                    }
                }
            }
            mine.iter_mut().for_each(|lane| total.add(&self.drive(lane.as_mut())));
            // A lane's panic has become its failure already.
            threads.into_iter().for_each(|thread| total.add(&thread.join().unwrap_or_default()));
        });
        total
    }

    /// One lane's part of the round in a thread of its own.
    fn drive_thread(&self, lane: &mut dyn Lane, guest_first: bool) -> Sent {
        if guest_first {
            priority::lower();
        }
        let sent = self.drive(lane);
        Sent { cpu: thread_cpu(), ..sent }
    }

    /// One lane's part of the round. If it fails, the others are stopped.
    fn drive(&self, lane: &mut dyn Lane) -> Sent {
        unwind::catch("lane", || self.work(lane)).unwrap_or_else(|failure| {
            self.fail(failure);
            Sent::default()
        })
    }

    /// Notes a failure. The first one is the cause; the others only met its consequences.
    fn fail(&self, failure: Failure) {
        if self.failure.set(failure).is_ok() {
            self.interrupter.interrupt();
        }
    }

    /// Takes chunks until there are no more, and waits until what they held is confirmed.
    fn work(&self, lane: &mut dyn Lane) -> Result<Sent, Failure> {
        let mut sent = Sent::default();
        let mut scratch = Scratch::default();
        while let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if let Some(why) = self.rounds.monitor.stopped() {
                return Err(why);
            }
            if self.failure.get().is_some() {
                return Ok(sent);
            }
            self.chunk(lane, *chunk, &mut scratch, &mut sent)?;
        }
        let posted = Instant::now();
        lane.post_barrier(self.options.round)?;
        lane.wait_barrier(self.options.round)?;
        sent.barrier = posted.elapsed();
        Ok(sent)
    }

    /// Sends what of one chunk is in the set.
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
        if self.options.clear {
            self.rounds.machine.clear_dirty(chunk.region, chunk.first_page(), words)?;
        }
        scratch.clear();
        self.look(chunk, words, scratch);
        let mut told = 0;
        match self.rounds.monitor.slice().filter(|_| self.options.clear) {
            None if scratch.data.is_empty() => {}
            None => lane.write(&scratch.data)?,
            Some(slice) => told = self.paced(lane, &scratch.data, slice)?,
        }
        if self.options.name_zeros && !scratch.zeros.is_empty() {
            lane.zero(&scratch.zeros)?;
        }
        let total = |extents: &[Extent]| extents.iter().map(|e| e.len).sum::<u64>();
        let (data, zeros) = (total(&scratch.data), total(&scratch.zeros));
        sent.sent += data;
        sent.zero += zeros;
        sent.untouched += pages * PAGE_SIZE - data - zeros;
        self.rounds.monitor.chunk(pages * PAGE_SIZE - told, data - told, zeros);
        Ok(())
    }

    /// Writes extents so many bytes at a time, and waits in between as the cap on the bandwidth says. Tells
    /// the monitor of them, and returns how many they were.
    fn paced(&self, lane: &mut dyn Lane, extents: &[Extent], slice: u64) -> Result<u64, Failure> {
        let monitor = self.rounds.monitor;
        let whole_pages = slice / PAGE_SIZE * PAGE_SIZE;
        // Of extents that may be a page each, as many as make a slice are handed over together.
        let mut batch = Vec::new();
        let (mut batched, mut told) = (0, 0);
        let mut send = |batch: &mut Vec<Extent>, bytes: &mut u64| {
            lane.write(batch)?;
            batch.clear();
            monitor.chunk(*bytes, *bytes, 0);
            monitor.pace(*bytes);
            told += std::mem::take(bytes);
            monitor.stopped().map_or(Ok(()), Err)
        };
        for extent in extents {
            let mut rest = *extent;
            while rest.len > 0 {
                let len = rest.len.min(whole_pages - batched);
                batch.push(Extent { len, ..rest });
                batched += len;
                rest = Extent { offset: rest.offset + len, len: rest.len - len, ..rest };
                if batched == whole_pages {
                    send(&mut batch, &mut batched)?;
                }
            }
        }
        if batched > 0 {
            send(&mut batch, &mut batched)?;
        }
        Ok(told)
    }

    /// Finds out which pages of `words` exist, if that is to be asked, and which of them hold only zeros.
    fn look(&self, chunk: Chunk, words: &[u64], scratch: &mut Scratch) {
        let region = &self.rounds.ram.regions()[chunk.region];
        for (first, run) in runs(words, chunk.first_page()) {
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
            if self.options.sparse {
                scan::existing(region, first, run, look);
            } else {
                look(first, run);
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::bed;
    use crate::transport::{LaneStats, PlaneError};
    use std::sync::{Condvar, Mutex};

    struct Machine(Arc<Ram>);

    impl SourceMachine for Machine {
        fn ram(&self) -> Arc<Ram> {
            self.0.clone()
        }

        fn describe(&self) -> Result<Vec<u8>, Failure> {
            Ok(Vec::new())
        }

        fn start_tracking(&self) -> Result<(), Failure> {
            Ok(())
        }

        fn stop_tracking(&self) -> Result<(), Failure> {
            Ok(())
        }

        fn collect_dirty(&self, _: &mut DirtySet) -> Result<(), Failure> {
            Ok(())
        }

        fn clear_dirty(&self, _: usize, _: u64, _: &[u64]) -> Result<(), Failure> {
            Ok(())
        }

        fn pause(&self) -> Result<(), Failure> {
            Ok(())
        }

        fn resume(&self) -> Result<(), Failure> {
            Ok(())
        }

        fn save(&self) -> Result<Vec<u8>, Failure> {
            Ok(Vec::new())
        }
    }

    /// Whether the plane was interrupted, and a way to wait for it.
    #[derive(Default)]
    struct Switch(Mutex<bool>, Condvar);

    impl Interrupt for Switch {
        fn interrupt(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_all();
        }
    }

    /// Lanes of which the last breaks at its barrier, once the others wait for theirs.
    struct Plane {
        lanes: Vec<Box<dyn Lane>>,
        interrupted: Arc<Switch>,
    }

    impl Plane {
        fn new(lanes: usize, panics: bool) -> Plane {
            let (interrupted, waiting) = (Arc::<Switch>::default(), Arc::<AtomicUsize>::default());
            let lane = |index| TestLane {
                breaks: index == lanes - 1,
                panics,
                others: lanes - 1,
                waiting: Arc::clone(&waiting),
                interrupted: Arc::clone(&interrupted),
            };
            Plane {
                lanes: (0..lanes).map(|index| Box::new(lane(index)) as Box<dyn Lane>).collect(),
                interrupted,
            }
        }
    }

    impl SourcePlane for Plane {
        fn name(&self) -> &'static str {
            "test"
        }

        fn lanes(&mut self) -> &mut Vec<Box<dyn Lane>> {
            &mut self.lanes
        }

        fn interrupter(&self) -> Arc<dyn Interrupt> {
            self.interrupted.clone()
        }
    }

    struct TestLane {
        breaks: bool,
        panics: bool,
        others: usize,
        waiting: Arc<AtomicUsize>,
        interrupted: Arc<Switch>,
    }

    impl Lane for TestLane {
        fn write(&mut self, _: &[Extent]) -> Result<(), PlaneError> {
            Ok(())
        }

        fn zero(&mut self, _: &[Extent]) -> Result<(), PlaneError> {
            Ok(())
        }

        fn post_barrier(&mut self, _: u32) -> Result<(), PlaneError> {
            Ok(())
        }

        fn wait_barrier(&mut self, _: u32) -> Result<(), PlaneError> {
            if self.breaks {
                while self.waiting.load(Ordering::SeqCst) < self.others {
                    thread::yield_now();
                }
                assert!(!self.panics, "on purpose");
                return Err(PlaneError::Protocol("the cause".into()));
            }
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let interrupted = self.interrupted.0.lock().unwrap();
            drop(self.interrupted.1.wait_while(interrupted, |interrupted| !*interrupted).unwrap());
            Err(PlaneError::Interrupted)
        }

        fn stats(&self) -> LaneStats {
            LaneStats::default()
        }
    }

    /// What a round of all memory over `plane` says.
    fn round(plane: Plane) -> Result<Sent, Failure> {
        watched_round(plane, &Monitor::default())
    }

    fn watched_round(mut plane: Plane, monitor: &Monitor) -> Result<Sent, Failure> {
        let machine = Machine(bed::ram());
        let ram = machine.ram();
        let mut set = DirtySet::empty(&ram);
        set.fill();
        let options = RoundOptions { round: 0, sparse: true, name_zeros: false, clear: true };
        Rounds::new(&machine, &ram, monitor).send(&mut plane, &set, options)
    }

    #[test]
    fn the_first_failure_is_the_cause_and_ends_what_the_other_lanes_wait_for() {
        let why = round(Plane::new(4, false)).err().expect("a failure");
        assert!(why.message.contains("the cause"), "{why}");
    }

    #[test]
    fn a_lane_that_panics_ends_what_the_other_lanes_wait_for() {
        let why = round(Plane::new(4, true)).err().expect("a failure");
        assert!(why.message.contains("on purpose"), "{why}");
    }

    #[test]
    fn a_deadline_ends_a_round_in_which_nothing_is_confirmed() {
        let mut plane = Plane::new(4, false);
        // All but the one that breaks.
        plane.lanes.pop();
        let monitor = Monitor::default();
        monitor.arm(plane.interrupter());
        monitor.set_deadline(Some(Instant::now() + Duration::from_millis(100)));
        thread::scope(|scope| {
            scope.spawn(|| monitor.keep_deadline());
            let why = watched_round(plane, &monitor).err().expect("a failure");
            assert_eq!(why.code, Code::TIMEOUT, "{why}");
        });
        // Whatever comes later does not begin either.
        let late = Plane::new(1, false);
        assert_eq!(watched_round(late, &monitor).err().expect("a failure").code, Code::TIMEOUT);
    }

    #[test]
    fn a_plane_without_lanes_is_a_failure() {
        let empty = Plane { lanes: Vec::new(), interrupted: Arc::default() };
        assert_eq!(round(empty).err().expect("a failure").code, Code::TRANSPORT);
    }
}
