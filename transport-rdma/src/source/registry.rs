//! The source's memory, registered chunk by chunk on both sides.
//!
//! A lane that is about to write to a chunk asks here for the two keys it takes: ours for reading, the
//! destination's for writing. The first time a chunk is asked for, a request goes to the destination and a
//! thread of ours registers our side; both work at once, and meanwhile lanes write to chunks that are ready. So
//! that they rarely wait, a lane that enters a chunk has the next ones made ready as well.
//!
//! **Nothing is registered that is not written to.** Without on-demand paging a registration makes all of a
//! chunk exist and pins it, on both sides. Registering the guest beforehand would delay the first byte by the
//! size of the guest and turn memory that it never touched into memory that it occupies. Hence chunks are
//! registered when the first write to them comes, and looked ahead only into chunks that hold something.

use crate::chunks::Grid;
use crate::domain::{Domain, MemoryRegion};
use crate::halt::{Halt, Why, lock};
use crate::limits;
use crate::message::{self, Message, Refusal};
use crate::queue::QueuePair;
use crate::slots::Slots;
use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::report::{CpuMeter, CpuTime};
use migration::scan;
use migration::transport::PlaneError;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Requests that may be unanswered at once; the destination has posted as many buffers for them, and we as
/// many for the answers.
pub(crate) const CREDITS: usize = 32;

/// Bytes of memory that are made ready ahead of the writing. At 100 Gb/s this is 5 ms of writing: more than a
/// registration takes.
const AHEAD: u64 = 64 << 20;

/// Keys of a chunk.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    pub local: u32,
    pub remote: u32,
}

#[derive(Default)]
struct Chunk {
    local: OnceLock<MemoryRegion>,
    remote: OnceLock<u32>,
    /// Whether the chunks after this one have been asked for.
    looked_ahead: AtomicBool,
}

/// Registrations under way.
struct State {
    wanted: Vec<bool>,
    /// Chunks to be registered here.
    here: VecDeque<usize>,
    /// Chunks to be registered at the destination, not yet asked for.
    there: VecDeque<usize>,
    /// Chunks asked for and not yet answered, with the buffer that holds the question.
    asked: Vec<(usize, usize)>,
    free: Vec<usize>,
    slots: Slots,
    /// Sends that the queue pair has not completed.
    in_queue: usize,
}

pub(super) struct Registry {
    ram: Arc<Ram>,
    domain: Arc<Domain>,
    grid: Grid,
    chunks: Vec<Chunk>,
    queue: Arc<QueuePair>,
    state: Mutex<State>,
    /// With every change of `state`, of a chunk, or of `halt`.
    changed: Condvar,
    halt: Halt,
    /// When the first write was posted.
    moving: OnceLock<Instant>,
    registration_us: AtomicU64,
    overlap_us: AtomicU64,
    /// CPU time of the thread that registers, and of the one that watches.
    registering: CpuMeter,
    pub(super) watching: CpuMeter,
}

impl Registry {
    /// `queue` is the connection for registrations; its receives are the caller's to post.
    pub(super) fn new(
        ram: Arc<Ram>,
        domain: Arc<Domain>,
        grid: Grid,
        queue: Arc<QueuePair>,
        halt: Halt,
    ) -> io::Result<Registry> {
        let state = State {
            wanted: vec![false; grid.len()],
            here: VecDeque::new(),
            there: VecDeque::new(),
            asked: Vec::new(),
            free: (0..CREDITS).collect(),
            slots: Slots::new(&domain, CREDITS)?,
            in_queue: 0,
        };
        Ok(Registry {
            chunks: (0..grid.len()).map(|_| Chunk::default()).collect(),
            ram,
            domain,
            grid,
            queue,
            state: Mutex::new(state),
            changed: Condvar::new(),
            halt,
            moving: OnceLock::new(),
            registration_us: AtomicU64::new(0),
            overlap_us: AtomicU64::new(0),
            registering: CpuMeter::default(),
            watching: CpuMeter::default(),
        })
    }

    pub(super) fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    pub(super) fn queue(&self) -> &Arc<QueuePair> {
        &self.queue
    }

    /// What stops the plane. To be looked at; [`halt`](Self::halt) sets it.
    pub(super) fn halted(&self) -> &Halt {
        &self.halt
    }

    /// Stops the plane.
    pub(super) fn halt(&self, why: Why) {
        self.halt.halt(why);
        // Whoever is between looking and waiting holds the lock.
        drop(lock(&self.state));
        self.changed.notify_all();
    }

    /// Notes that data is on its way.
    pub(super) fn moving(&self) {
        if self.moving.get().is_none() {
            let _ = self.moving.set(Instant::now());
        }
    }

    /// Microseconds spent registering here, and those of them in which data was moving.
    pub(super) fn spent(&self) -> (u64, u64) {
        (self.registration_us.load(Ordering::Relaxed), self.overlap_us.load(Ordering::Relaxed))
    }

    /// CPU time of the plane's own threads.
    pub(super) fn cpu(&self) -> CpuTime {
        let mut cpu = self.registering.read();
        cpu += self.watching.read();
        cpu
    }

    /// Where a byte of memory is in the grid: its chunk, and the chunk's end in the region.
    pub(super) fn find(&self, region: u32, offset: u64) -> (usize, u64) {
        self.grid.find(region, offset)
    }

    /// A chunk's keys, if it is ready. Has the chunks after it made ready.
    pub(super) fn keys(&self, chunk: usize) -> Result<Option<Keys>, PlaneError> {
        let entry = &self.chunks[chunk];
        if !entry.looked_ahead.load(Ordering::Relaxed) && !entry.looked_ahead.swap(true, Ordering::Relaxed) {
            self.want(chunk)?;
        }
        Ok(match (entry.local.get(), entry.remote.get()) {
            (Some(local), Some(&remote)) => Some(Keys { local: local.lkey(), remote }),
            _ => None,
        })
    }

    /// Waits for a chunk's keys.
    ///
    /// # Errors
    /// [`PlaneError::Timeout`] when no registration at all ends within `timeout`.
    pub(super) fn wait(&self, chunk: usize, timeout: Duration) -> Result<Keys, PlaneError> {
        loop {
            // Any change counts as a sign of life, and so restarts the patience.
            let state = lock(&self.state);
            self.halt.check()?;
            if let Some(keys) = self.keys_of(chunk) {
                return Ok(keys);
            }
            let woken = self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner);
            if woken.1.timed_out() && self.keys_of(chunk).is_none() {
                self.halt.check()?;
                return Err(PlaneError::Timeout(timeout));
            }
        }
    }

    fn keys_of(&self, chunk: usize) -> Option<Keys> {
        let entry = &self.chunks[chunk];
        Some(Keys { local: entry.local.get()?.lkey(), remote: *entry.remote.get()? })
    }

    /// Has a chunk made ready, and those after it that hold something.
    fn want(&self, chunk: usize) -> Result<(), PlaneError> {
        let mut state = lock(&self.state);
        let mut ahead = 0;
        for next in chunk..self.grid.len() {
            let Some(extent) = self.grid.extent(next) else { break };
            if next > chunk {
                ahead += extent.len;
                if ahead > AHEAD {
                    break;
                }
            }
            if !state.wanted[next] && (next == chunk || self.exists(&extent)) {
                state.wanted[next] = true;
                state.here.push_back(next);
                state.there.push_back(next);
            }
        }
        let asked = self.ask(&mut state);
        drop(state);
        self.changed.notify_all();
        asked
    }

    /// Whether anything of an extent has ever been touched.
    fn exists(&self, extent: &Extent) -> bool {
        let mut any = false;
        if let Ok(region) = self.ram.check(extent) {
            scan::existing(region, extent.offset / PAGE_SIZE, extent.len / PAGE_SIZE, |_, _| any = true);
        }
        any
    }

    /// Asks the destination for as many chunks as may be asked for at once.
    fn ask(&self, state: &mut State) -> Result<(), PlaneError> {
        while !state.there.is_empty() && state.in_queue < 2 * CREDITS {
            let Some(slot) = state.free.pop() else { return Ok(()) };
            let Some(chunk) = state.there.pop_front() else { return Ok(()) };
            let Some(extent) = self.grid.extent(chunk) else { continue };
            // SAFETY: free buffers are those whose question has been answered, so it is no longer posted.
            let buffer = unsafe { state.slots.get_mut(slot) };
            let len = message::put(buffer, &Message::Request(extent));
            // SAFETY: the buffer is registered, and left alone until the answer has come.
            unsafe { self.queue.post_message(0, state.slots.sge(slot, len)) }
                .map_err(|source| PlaneError::Io { what: "asking for memory", source })?;
            state.asked.push((chunk, slot));
            state.in_queue += 1;
        }
        Ok(())
    }

    /// Notes that a question has left.
    pub(super) fn sent(&self) -> Result<(), PlaneError> {
        let mut state = lock(&self.state);
        state.in_queue = state.in_queue.saturating_sub(1);
        self.ask(&mut state)
    }

    /// Takes the destination's answer. The buffer it came in must have been posted again.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when the destination could not register the chunk,
    /// [`PlaneError::Protocol`] when nobody asked.
    pub(super) fn answered(&self, extent: &Extent, outcome: Result<u32, Refusal>) -> Result<(), PlaneError> {
        let mut state = lock(&self.state);
        let known = state.asked.iter().position(|(chunk, _)| self.grid.extent(*chunk) == Some(*extent));
        let Some((chunk, slot)) = known.map(|at| state.asked.swap_remove(at)) else {
            return Err(PlaneError::Protocol(format!("{extent:?} was announced, and nobody asked for it")));
        };
        let key = outcome.map_err(|refusal| PlaneError::Unavailable(refused(extent, refusal)))?;
        // Set once: `wanted` lets a chunk be asked for once.
        let _ = self.chunks[chunk].remote.set(key);
        state.free.push(slot);
        let asked = self.ask(&mut state);
        drop(state);
        self.changed.notify_all();
        asked
    }

    /// Has a chunk that was asked for answered, where there is no destination.
    #[cfg(feature = "null-device")]
    pub(super) fn answer(&self, chunk: usize) -> Result<(), PlaneError> {
        let asked = lock(&self.state).asked.iter().any(|(asked, _)| *asked == chunk);
        match self.grid.extent(chunk) {
            Some(extent) if asked => self.answered(&extent, Ok(0)),
            _ => Ok(()),
        }
    }

    /// Registers what is wanted on this side, until the plane is halted.
    pub(super) fn register(&self) {
        loop {
            let mut state = lock(&self.state);
            let chunk = loop {
                if self.halt.why().is_some() {
                    return;
                }
                match state.here.pop_front() {
                    Some(chunk) => break chunk,
                    None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(state);
            let Some(extent) = self.grid.extent(chunk) else { continue };
            let began = Instant::now();
            match self.domain.register_ram(&self.ram, &extent, false) {
                Ok(region) => {
                    let _ = self.chunks[chunk].local.set(region);
                }
                Err(error) => return self.halt(Why::from(&limits::registration(error, extent.len))),
            }
            self.account(began);
            self.registering.note();
            drop(lock(&self.state));
            self.changed.notify_all();
        }
    }

    fn account(&self, began: Instant) {
        let ended = Instant::now();
        let micros = |from: Instant| ended.saturating_duration_since(from).as_micros() as u64;
        self.registration_us.fetch_add(micros(began), Ordering::Relaxed);
        if let Some(moving) = self.moving.get() {
            self.overlap_us.fetch_add(micros(began.max(*moving)), Ordering::Relaxed);
        }
    }
}

fn refused(extent: &Extent, refusal: Refusal) -> String {
    let error = io::Error::from_raw_os_error(refusal.errno);
    let len = extent.len;
    match (refusal.errno, refusal.limit) {
        (libc::ENOMEM, 0) => format!(
            "the destination cannot pin {len} bytes of guest memory ({error}): it, its memory cgroup or its \
             device has no more room"
        ),
        (libc::ENOMEM, limit) => format!(
            "the destination cannot pin {len} bytes of guest memory ({error}): its limit of locked memory is \
             {} KiB; raise it there with `ulimit -l` or LimitMEMLOCK=",
            limit >> 10
        ),
        _ => format!("the destination cannot register {len} bytes of guest memory: {error}"),
    }
}
