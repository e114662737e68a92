//! The source's memory, registered chunk by chunk on both sides.
//!
//! A lane that is about to write to a chunk [requests](Registry::request) it, and takes the two keys that it
//! needs: the lkey for reading our side, the rkey for writing the destination's. The first request for a
//! chunk sends a message to the destination, and a thread of ours registers our side. Both work at once, and
//! meanwhile lanes write to chunks that are ready. So that lanes rarely wait, a request covers the next
//! chunks as well.
//!
//! **Memory that holds nothing is not registered.** Without on-demand paging a registration makes all of a
//! chunk exist and pins it, on both sides. Registering the guest beforehand would delay the first byte by the
//! size of the guest, and would turn memory that it never touched into memory that it occupies. Hence a chunk
//! is registered when the first write to it comes, and chunks ahead of it only if they hold something.

use crate::buffers::MessageBuffers;
use crate::chunks::ChunkMap;
use crate::domain::{MemoryRegion, ProtectionDomain};
use crate::halt::{Halt, HaltReason, lock};
use crate::limits;
use crate::message::{self, Message, REGISTRATION_CREDITS, Refusal};
use crate::queue::QueuePair;
use migration::cpu::{CpuMeter, CpuTime};
use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::scan;
use migration::transport::{Interrupt, PlaneError};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of memory that are made ready ahead of the writing. At 100 Gb/s this is 5 ms of writing: more than a
/// registration takes.
const MAX_LOOK_AHEAD_BYTES: u64 = 64 << 20;

/// Requests that the registrations' queue pair has room for. More than may be unanswered, since an answer may
/// be here before the completion of its request is.
pub(super) const MAX_REQUESTS_IN_QUEUE: usize = 2 * REGISTRATION_CREDITS;

/// Keys of a chunk.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    /// For reading the source's memory.
    pub lkey: u32,
    /// For writing the destination's.
    pub rkey: u32,
}

#[derive(Default)]
struct Chunk {
    local: OnceLock<MemoryRegion>,
    rkey: OnceLock<u32>,
    /// Whether a lane has requested this chunk, and with it those that follow.
    requested: AtomicBool,
}

/// Registrations under way.
struct State {
    /// For each chunk, whether it is or was in the two queues below.
    queued: Vec<bool>,
    /// Chunks to be registered on this side.
    to_register: VecDeque<usize>,
    /// Chunks to be requested from the destination.
    to_request: VecDeque<usize>,
    /// Chunks that the destination has not answered for, with the buffer that holds the request.
    unanswered: Vec<(usize, usize)>,
    /// Send buffers, and those of them that hold no unanswered request.
    buffers: MessageBuffers,
    free_buffers: Vec<usize>,
    /// Send requests that the queue pair has not completed.
    sends_in_flight: usize,
}

pub(super) struct Registry {
    ram: Arc<Ram>,
    domain: Arc<ProtectionDomain>,
    map: ChunkMap,
    chunks: Vec<Chunk>,
    queue: Arc<QueuePair>,
    state: Mutex<State>,
    /// Notified with every change of `state`, of a chunk, or of `halt`.
    changed: Condvar,
    halt: Halt,
    /// When the first write was posted.
    first_write: OnceLock<Instant>,
    registration_us: AtomicU64,
    overlap_us: AtomicU64,
    /// CPU time of the thread that registers, and of the one that watches.
    registering: CpuMeter,
    pub(super) watching: CpuMeter,
}

impl Registry {
    /// `queue` is the connection for registrations; its receives are the caller's to post.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when there is no memory for messages.
    pub(super) fn new(
        ram: Arc<Ram>,
        domain: Arc<ProtectionDomain>,
        map: ChunkMap,
        queue: Arc<QueuePair>,
        halt: Halt,
    ) -> Result<Registry, PlaneError> {
        let state = State {
            queued: vec![false; map.len()],
            to_register: VecDeque::new(),
            to_request: VecDeque::new(),
            unanswered: Vec::new(),
            buffers: MessageBuffers::new(&domain, REGISTRATION_CREDITS)?,
            free_buffers: (0..REGISTRATION_CREDITS).collect(),
            sends_in_flight: 0,
        };
        Ok(Registry {
            chunks: (0..map.len()).map(|_| Chunk::default()).collect(),
            ram,
            domain,
            map,
            queue,
            state: Mutex::new(state),
            changed: Condvar::new(),
            halt,
            first_write: OnceLock::new(),
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

    /// What stops the plane, to be looked at. Only [`stop`](Self::stop) sets it.
    pub(super) fn halt(&self) -> &Halt {
        &self.halt
    }

    /// Stops the plane.
    pub(super) fn stop(&self, reason: HaltReason) {
        self.halt.halt(reason);
        // Whoever is between looking and waiting holds the lock.
        drop(lock(&self.state));
        self.changed.notify_all();
    }

    /// Notes that data is on its way.
    pub(super) fn note_first_write(&self) {
        if self.first_write.get().is_none() {
            let _ = self.first_write.set(Instant::now());
        }
    }

    /// Microseconds spent registering here, and those of them in which data was moving.
    pub(super) fn registration_us(&self) -> (u64, u64) {
        (self.registration_us.load(Ordering::Relaxed), self.overlap_us.load(Ordering::Relaxed))
    }

    /// CPU time of the plane's own threads.
    pub(super) fn cpu(&self) -> CpuTime {
        let mut cpu = self.registering.read();
        cpu += self.watching.read();
        cpu
    }

    /// The chunk that a byte of memory is in, and the offset at which that chunk ends in its region.
    pub(super) fn chunk_at(&self, region: u32, offset: u64) -> (usize, u64) {
        self.map.chunk_at(region, offset)
    }

    /// Has a chunk, and those after it that are about to be needed, registered on both sides. Returns at
    /// once. Only the first call for a chunk does anything.
    ///
    /// # Errors
    /// [`PlaneError::Io`] when the destination cannot be asked.
    pub(super) fn request(&self, chunk: usize) -> Result<(), PlaneError> {
        let requested = &self.chunks[chunk].requested;
        // Nearly always set: then this is one load.
        if requested.load(Ordering::Relaxed) || requested.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        self.request_from(chunk)
    }

    /// A chunk's keys, if it is registered on both sides.
    pub(super) fn keys(&self, chunk: usize) -> Option<Keys> {
        let entry = &self.chunks[chunk];
        let (lkey, rkey) = (entry.local.get()?.lkey(), *entry.rkey.get()?);
        Some(Keys { lkey, rkey })
    }

    /// Waits for the keys of a chunk that has been requested.
    ///
    /// # Errors
    /// [`PlaneError::Timeout`] when no registration at all ends within `timeout`; the reason when the plane
    /// is stopped.
    pub(super) fn wait_for_keys(&self, chunk: usize, timeout: Duration) -> Result<Keys, PlaneError> {
        loop {
            // Any change counts as a sign of life, and so restarts the time-out.
            let state = lock(&self.state);
            self.halt.check()?;
            if let Some(keys) = self.keys(chunk) {
                return Ok(keys);
            }
            let woken = self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner);
            if woken.1.timed_out() && self.keys(chunk).is_none() {
                self.halt.check()?;
                return Err(PlaneError::Timeout(timeout));
            }
        }
    }

    /// Queues a chunk, and what exists of the next [`MAX_LOOK_AHEAD_BYTES`].
    fn request_from(&self, chunk: usize) -> Result<(), PlaneError> {
        let mut state = lock(&self.state);
        let mut ahead = 0;
        for next in chunk..self.map.len() {
            let Some(extent) = self.map.extent(next) else { break };
            if next > chunk {
                ahead += extent.len;
                if ahead > MAX_LOOK_AHEAD_BYTES {
                    break;
                }
            }
            if !state.queued[next] && (next == chunk || self.exists(&extent)) {
                state.queued[next] = true;
                state.to_register.push_back(next);
                state.to_request.push_back(next);
            }
        }
        let sent = self.send_requests(&mut state);
        drop(state);
        self.changed.notify_all();
        sent
    }

    /// Whether anything of an extent has ever been touched.
    fn exists(&self, extent: &Extent) -> bool {
        let mut any = false;
        if let Ok(region) = self.ram.check(extent) {
            scan::existing(region, extent.offset / PAGE_SIZE, extent.len / PAGE_SIZE, |_, _| any = true);
        }
        any
    }

    /// Requests as many chunks from the destination as may be requested at once.
    fn send_requests(&self, state: &mut State) -> Result<(), PlaneError> {
        while !state.to_request.is_empty() && state.sends_in_flight < MAX_REQUESTS_IN_QUEUE {
            let Some(buffer) = state.free_buffers.pop() else { return Ok(()) };
            let Some(chunk) = state.to_request.pop_front() else { return Ok(()) };
            let Some(extent) = self.map.extent(chunk) else { continue };
            // SAFETY: a free buffer holds no unanswered request. What has been answered has arrived; should
            // the device repeat it, the peer's drops it as a duplicate.
            let bytes = unsafe { state.buffers.get_mut(buffer) };
            let len = message::put(bytes, &Message::Request(extent));
            // SAFETY: the buffer is registered, and left alone until the answer has come.
            unsafe { self.queue.post_message(0, state.buffers.sge(buffer, len)) }.map_err(|source| {
                PlaneError::Io { what: "requesting memory from the destination", source }
            })?;
            state.unanswered.push((chunk, buffer));
            state.sends_in_flight += 1;
        }
        Ok(())
    }

    /// The queue pair has completed a request's send.
    ///
    /// # Errors
    /// [`PlaneError::Io`] when the requests that were waiting for it cannot be sent.
    pub(super) fn handle_sent(&self) -> Result<(), PlaneError> {
        let mut state = lock(&self.state);
        state.sends_in_flight = state.sends_in_flight.saturating_sub(1);
        self.send_requests(&mut state)
    }

    /// Takes the destination's answer. The buffer in which it came must have been posted again.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when the destination could not register the chunk,
    /// [`PlaneError::Protocol`] when nobody has requested it.
    pub(super) fn handle_answer(
        &self,
        extent: &Extent,
        outcome: Result<u32, Refusal>,
    ) -> Result<(), PlaneError> {
        let mut state = lock(&self.state);
        let known = state.unanswered.iter().position(|(chunk, _)| self.map.extent(*chunk) == Some(*extent));
        let Some((chunk, buffer)) = known.map(|at| state.unanswered.swap_remove(at)) else {
            return Err(PlaneError::Protocol(format!("{extent:?} was announced, and nobody requested it")));
        };
        let rkey = outcome.map_err(|refusal| limits::refused_by_destination(extent.len, refusal))?;
        // Set once: `queued` lets a chunk be requested once.
        let _ = self.chunks[chunk].rkey.set(rkey);
        state.free_buffers.push(buffer);
        let sent = self.send_requests(&mut state);
        drop(state);
        self.changed.notify_all();
        sent
    }

    /// Answers a chunk that was requested, where there is no destination.
    #[cfg(feature = "null-device")]
    pub(super) fn answer_without_destination(&self, chunk: usize) -> Result<(), PlaneError> {
        let unanswered = lock(&self.state).unanswered.iter().any(|(requested, _)| *requested == chunk);
        match self.map.extent(chunk) {
            Some(extent) if unanswered => self.handle_answer(&extent, Ok(0)),
            _ => Ok(()),
        }
    }

    /// Registers what is queued for this side, until the plane is stopped.
    pub(super) fn register_queued(&self) {
        while let Some(chunk) = self.next_to_register() {
            let Some(extent) = self.map.extent(chunk) else { continue };
            let began = Instant::now();
            match self.domain.register_ram(&self.ram, &extent, false) {
                Ok(region) => {
                    let _ = self.chunks[chunk].local.set(region);
                }
                Err(error) => {
                    return self.stop(HaltReason::from(&limits::registration_failed(error, extent.len)));
                }
            }
            self.account(began);
            self.registering.note();
            // Whoever is between looking and waiting holds the lock.
            drop(lock(&self.state));
            self.changed.notify_all();
        }
    }

    /// Waits for a chunk to register; `None` when the plane is stopped.
    fn next_to_register(&self) -> Option<usize> {
        let mut state = lock(&self.state);
        loop {
            if self.halt.reason().is_some() {
                return None;
            }
            if let Some(chunk) = state.to_register.pop_front() {
                return Some(chunk);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Adds the time since `began` to what registrations have taken.
    fn account(&self, began: Instant) {
        let ended = Instant::now();
        let micros = |from: Instant| ended.saturating_duration_since(from).as_micros() as u64;
        self.registration_us.fetch_add(micros(began), Ordering::Relaxed);
        if let Some(first_write) = self.first_write.get() {
            self.overlap_us.fetch_add(micros(began.max(*first_write)), Ordering::Relaxed);
        }
    }
}

impl Interrupt for Registry {
    fn interrupt(&self) {
        self.stop(HaltReason::Interrupted);
    }
}
