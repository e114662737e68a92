//! A lane of the source: writes, zeros and barriers on one queue pair.
//!
//! Work requests are collected in a [`Chain`] and posted a chain at a time. The [`Window`] bounds what is in
//! flight and says which requests are signalled. [`Credits`] see to it that the destination has a receive
//! buffer for every message. [`Barriers`] remembers what the destination has confirmed.
//!
//! Each message of ours brings at most one answer, so that as many receive buffers on this side suffice.

use super::barriers::Barriers;
use super::chain::Chain;
use super::credits::Credits;
use super::registry::{Keys, Registry};
use super::window::Window;
use crate::buffers::{MAX_MESSAGE_BYTES, MessageBuffers};
use crate::completions::Completion;
use crate::domain::ProtectionDomain;
use crate::halt::HaltReason;
use crate::message::{self, LANE_CREDITS, MAX_EXTENTS, Message};
use crate::pages::check_whole_pages;
use crate::queue::QueuePair;
use crate::receives::ReceiveQueue;
use migration::memory::Extent;
use migration::transport::{Lane, LaneStats, PlaneError};
use rdma_sys::ibv_sge;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that may be in flight. Beyond what any link holds (400 Gb/s over 100 µs are 5 MB), with room for the
/// lane's thread to look at its next pages meanwhile.
const MAX_BYTES_IN_FLIGHT: u64 = 32 << 20;

/// After this many bytes the destination is told how many there are, so that it sees its source alive.
const PROGRESS_INTERVAL_BYTES: u64 = 16 << 20;

/// What a lane may ask of its device.
#[derive(Clone, Copy)]
pub(super) struct LaneLimits {
    /// Largest RDMA write, in bytes; a multiple of the page size.
    pub max_write_bytes: u64,
    /// Most work requests in flight, at most what the queue pair has room for.
    pub max_requests: u32,
    /// How long the destination may take to answer.
    pub timeout: Duration,
}

pub(super) struct RdmaLane {
    registry: Arc<Registry>,
    /// The queue pair goes before the buffers that it may still use: first this owner, then the last one,
    /// which is inside `receives`.
    queue: Arc<QueuePair>,
    receives: ReceiveQueue,
    sends: MessageBuffers,
    limits: LaneLimits,
    chain: Chain,
    window: Window,
    credits: Credits,
    barriers: Barriers,
    /// Of `stats.bytes`, those that the destination has been told of.
    reported_bytes: u64,
    completions: Vec<Completion>,
    stats: LaneStats,
    /// Whether this lane's figures include the registrations, which are the plane's.
    reports_registrations: bool,
}

impl RdmaLane {
    /// A lane on `queue`. Posts its receive buffers, which comes before the connection is made.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when there is no memory for the buffers, [`PlaneError::Io`] when they
    /// cannot be posted.
    pub(super) fn new(
        queue: Arc<QueuePair>,
        domain: &Arc<ProtectionDomain>,
        registry: Arc<Registry>,
        limits: LaneLimits,
        reports_registrations: bool,
    ) -> Result<RdmaLane, PlaneError> {
        Ok(RdmaLane {
            registry,
            receives: ReceiveQueue::new(Arc::clone(&queue), domain, LANE_CREDITS)?,
            queue,
            sends: MessageBuffers::new(domain, LANE_CREDITS)?,
            limits,
            chain: Chain::new(),
            window: Window::new(limits.max_requests, MAX_BYTES_IN_FLIGHT),
            credits: Credits::new(LANE_CREDITS),
            barriers: Barriers::default(),
            reported_bytes: 0,
            completions: Vec::new(),
            stats: LaneStats::default(),
            reports_registrations,
        })
    }

    /// Stops the plane if `result` is a failure. Exceptions are extents that were refused before anything was
    /// sent, and waits that were too long, which may be tried again.
    fn stop_on_failure<T>(&self, result: Result<T, PlaneError>) -> Result<T, PlaneError> {
        if let Err(error) = &result
            && !matches!(error, PlaneError::OutOfBounds(_) | PlaneError::Timeout(_))
        {
            self.registry.stop(HaltReason::from(error));
        }
        result
    }

    fn check(&self, extents: &[Extent]) -> Result<(), PlaneError> {
        extents.iter().try_for_each(|extent| check_whole_pages(self.registry.ram(), extent))?;
        self.registry.halt().check()
    }

    fn write_checked(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        for extent in extents {
            let (mut at, end) = (extent.offset, extent.offset + extent.len);
            while at < end {
                let (chunk, chunk_end) = self.registry.chunk_at(extent.region, at);
                self.registry.request(chunk)?;
                let keys = match self.registry.keys(chunk) {
                    Some(keys) => keys,
                    None => {
                        // What is ready travels while we wait.
                        self.flush()?;
                        self.registry.wait_for_keys(chunk, self.limits.timeout)?
                    }
                };
                let len = (end - at).min(chunk_end - at).min(self.limits.max_write_bytes);
                self.push_write(at, len as u32, keys)?;
                at += len;
            }
        }
        self.flush()
    }

    fn push_write(&mut self, at: u64, len: u32, keys: Keys) -> Result<(), PlaneError> {
        self.make_room(u64::from(len))?;
        let admitted = self.window.push(u64::from(len), false);
        // Both keys are for the chunk's extent under addresses that are offsets into the region.
        let local = ibv_sge { addr: at, length: len, lkey: keys.lkey };
        self.chain.write(admitted, local, at, keys.rkey);
        self.stats.bytes += u64::from(len);
        self.registry.note_first_write();
        if self.stats.bytes - self.reported_bytes >= PROGRESS_INTERVAL_BYTES {
            self.push_progress()?;
        }
        Ok(())
    }

    fn push_progress(&mut self) -> Result<(), PlaneError> {
        let bytes = self.stats.bytes;
        self.push_message(|buffer| message::put(buffer, &Message::Progress(bytes)))?;
        self.reported_bytes = bytes;
        Ok(())
    }

    /// Puts a message into the chain once the destination has a buffer for it.
    fn push_message(
        &mut self,
        put: impl FnOnce(&mut [u8; MAX_MESSAGE_BYTES]) -> usize,
    ) -> Result<(), PlaneError> {
        let buffer = self.take_credit()?;
        // SAFETY: `Credits` has given this buffer out, so the destination has handled the last message from
        // it. That one has arrived; should the device repeat it, the peer's drops it as a duplicate.
        let len = put(unsafe { self.sends.get_mut(buffer) });
        let admitted = self.window.push(0, false);
        self.chain.send(admitted, self.sends.sge(buffer, len));
        Ok(())
    }

    fn push_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        if self.reported_bytes != self.stats.bytes {
            self.push_progress()?;
        }
        // It uses up a receive buffer like a message, and no send buffer.
        self.take_credit()?;
        // The destination's device completes it after all that came before it on this queue pair is in
        // memory.
        let admitted = self.window.push(0, true);
        self.chain.write_immediate(admitted, round);
        self.barriers.post(round);
        self.flush()
    }

    /// Waits until one more message may be in flight. Returns the send buffer for it.
    fn take_credit(&mut self) -> Result<usize, PlaneError> {
        // First, since a credit that is taken has to be used. Waiting for a credit only makes more room.
        self.make_room(0)?;
        loop {
            if let Some(buffer) = self.credits.take() {
                return Ok(buffer);
            }
            self.flush()?;
            self.wait_completions()?;
        }
    }

    /// Waits until one more request of `len` bytes may be in flight, and the chain has a place for it.
    fn make_room(&mut self, len: u64) -> Result<(), PlaneError> {
        if self.chain.is_full() {
            self.flush()?;
        }
        while !self.window.has_room(len) {
            self.flush()?;
            self.wait_completions()?;
        }
        Ok(())
    }

    /// Posts the chain, and handles the completions that there are.
    fn flush(&mut self) -> Result<(), PlaneError> {
        if self.chain.is_empty() {
            return Ok(());
        }
        let requests = self.chain.len() as u64;
        // SAFETY: the requests read guest memory under a key of a chunk that is registered until the registry
        // goes, which the lane holds, or message buffers, which the lane holds as well; `push_message` says
        // when they are used again. Writes of the guest meanwhile are part of the contract: nothing in this
        // process reads what the device does.
        unsafe { self.chain.post(&self.queue) }
            .map_err(|source| PlaneError::Io { what: "posting RDMA requests", source })?;
        self.stats.requests += requests;
        self.stats.max_in_flight = self.stats.max_in_flight.max(self.window.in_flight());
        self.queue.completions().poll(&mut self.completions)?;
        self.handle_completions()
    }

    /// Waits for completions, and handles them.
    fn wait_completions(&mut self) -> Result<(), PlaneError> {
        let timeout = self.limits.timeout;
        let deadline = Some(Instant::now() + timeout);
        let completions = self.queue.completions();
        if !completions.wait(&mut self.completions, self.registry.halt(), deadline)? {
            return Err(PlaneError::Timeout(timeout));
        }
        self.handle_completions()
    }

    fn handle_completions(&mut self) -> Result<(), PlaneError> {
        for at in 0..self.completions.len() {
            let completion = self.completions[at];
            match ReceiveQueue::filled(&completion) {
                Some(buffer) => self.handle_answer(buffer, &completion)?,
                None => self.window.complete(completion.id),
            }
        }
        Ok(())
    }

    fn handle_answer(&mut self, buffer: usize, completion: &Completion) -> Result<(), PlaneError> {
        // SAFETY: the completion is of this queue pair. The buffer is posted again only below, where the
        // message is no longer in use.
        let bytes = unsafe { self.receives.message(buffer, completion) };
        let Message::Done { messages, round } = message::get(bytes)? else {
            return Err(PlaneError::Protocol("the destination's message on a lane is no answer".into()));
        };
        // The buffer first: the credit lets us send what brings the next answer.
        self.receives.post(buffer)?;
        self.credits.release(messages)?;
        round.map_or(Ok(()), |round| self.barriers.confirm(round))
    }

    fn wait_confirmed(&mut self, round: u32) -> Result<(), PlaneError> {
        while !self.barriers.take_confirmed(round) {
            self.wait_completions()?;
        }
        Ok(())
    }
}

impl Lane for RdmaLane {
    fn write(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        let result = self.write_checked(extents);
        self.stop_on_failure(result)
    }

    fn zero(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        for some in extents.chunks(MAX_EXTENTS) {
            let result = self.push_message(|buffer| message::put_zeros(buffer, some));
            self.stop_on_failure(result)?;
            self.stats.zero_bytes += some.iter().map(|e| e.len).sum::<u64>();
        }
        let result = self.flush();
        self.stop_on_failure(result)
    }

    fn post_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        self.registry.halt().check()?;
        let result = self.push_barrier(round);
        self.stop_on_failure(result)
    }

    fn wait_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        let result = self.wait_confirmed(round);
        self.stop_on_failure(result)
    }

    fn stats(&self) -> LaneStats {
        let mut stats = self.stats.clone();
        if self.reports_registrations {
            (stats.registration_us, stats.registration_overlap_us) = self.registry.registration_us();
        }
        stats
    }
}
