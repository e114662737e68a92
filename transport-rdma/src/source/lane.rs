//! A lane: writes, zeros and barriers on one queue pair.
//!
//! Requests are collected into chains and posted a chain at a time. Only some of them are signalled, that is,
//! leave a completion: a queue pair completes in order, so that one completion stands for all before it.
//!
//! **Messages never overrun the destination.** It has posted [`CREDITS`] buffers, and says every so often how
//! many messages it has dealt with and posted anew. No more than the difference is ever under way; barriers
//! count as messages, since each uses up a buffer. Each message of ours brings at most one answer, so that as
//! many buffers on this side suffice.

use super::registry::{Keys, Registry};
use crate::completions::Completion;
use crate::halt::Why;
use crate::message::{self, MAX_EXTENTS, Message};
use crate::queue::QueuePair;
use crate::slots::{SLOT, Slots};
use migration::memory::{Extent, PAGE_SIZE};
use migration::transport::{Lane, LaneStats, PlaneError};
use rdma_sys::*;
use std::collections::VecDeque;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Messages that may be under way at once.
pub(crate) const CREDITS: usize = 32;

/// Requests in a chain.
const CHAIN: usize = 32;

/// Bytes that may be under way. Beyond what any link holds (400 Gb/s over 100 µs are 5 MB), with room for the
/// lane's thread to look at its next pages meanwhile.
const WINDOW: u64 = 32 << 20;

/// A request is signalled when this much has been posted since the last one that was.
const SIGNAL_BYTES: u64 = 1 << 20;

/// After this much the destination is told how much there is, so that it sees its source alive.
const PROGRESS_BYTES: u64 = 16 << 20;

/// Marks the completions of receives.
const RECEIVE: u64 = 1 << 63;

pub(super) struct RdmaLane {
    registry: Arc<Registry>,
    queue: Arc<QueuePair>,
    /// Buffers of messages to be sent and to be received.
    sends: Slots,
    receives: Slots,
    timeout: Duration,
    /// Largest write, in bytes.
    max_message: u64,
    depth: u64,
    /// The chain that is being collected. Entries point into `sges` at their own index.
    requests: Box<[ibv_send_wr]>,
    sges: Box<[ibv_sge]>,
    filled: usize,
    /// Requests and bytes put into chains, and of these, completed.
    pushed: u64,
    pushed_bytes: u64,
    completed: u64,
    completed_bytes: u64,
    /// Signalled requests that are not complete: how many requests and bytes each stands for.
    marks: VecDeque<(u64, u64)>,
    marked: (u64, u64),
    /// Messages put into chains, and of these, dealt with by the destination.
    messages: u64,
    done: u64,
    /// Barriers that are posted, and those that are confirmed and nobody has waited for.
    posted: VecDeque<u32>,
    confirmed: VecDeque<u32>,
    /// Bytes that the destination has been told of.
    told: u64,
    completions: Vec<Completion>,
    stats: LaneStats,
    /// Registrations are the plane's; its first lane reports them.
    first: bool,
}

// SAFETY: the raw pointers inside `requests` point to the lane's own `sges`, which move with it on the heap.
unsafe impl Send for RdmaLane {}

impl RdmaLane {
    /// A lane on `queue`, whose receives are posted here: before the connection is made.
    pub(super) fn new(
        queue: Arc<QueuePair>,
        sends: Slots,
        receives: Slots,
        registry: Arc<Registry>,
        limits: (u64, u32),
        timeout: Duration,
        first: bool,
    ) -> Result<RdmaLane, PlaneError> {
        let (max_message, depth) = limits;
        // SAFETY: plain data, for which zeros are valid.
        let request = || unsafe { std::mem::zeroed::<ibv_send_wr>() };
        let lane = RdmaLane {
            registry,
            queue,
            sends,
            receives,
            timeout,
            max_message,
            depth: u64::from(depth),
            requests: (0..CHAIN).map(|_| request()).collect(),
            sges: vec![ibv_sge { addr: 0, length: 0, lkey: 0 }; CHAIN].into(),
            filled: 0,
            pushed: 0,
            pushed_bytes: 0,
            completed: 0,
            completed_bytes: 0,
            marks: VecDeque::new(),
            marked: (0, 0),
            messages: 0,
            done: 0,
            posted: VecDeque::new(),
            confirmed: VecDeque::new(),
            told: 0,
            completions: Vec::new(),
            stats: LaneStats::default(),
            first,
        };
        (0..lane.receives.count()).try_for_each(|slot| lane.post_receive(slot))?;
        Ok(lane)
    }

    fn post_receive(&self, slot: usize) -> Result<(), PlaneError> {
        // SAFETY: the buffer is registered for local writing, and left alone until its completion.
        unsafe { self.queue.post_receive(RECEIVE | slot as u64, self.receives.sge(slot, SLOT)) }
            .map_err(|source| PlaneError::Io { what: "posting a buffer", source })
    }

    /// Whatever fails takes the plane with it; a wait that was too long does not, it may be tried again.
    fn guard<T>(&self, result: Result<T, PlaneError>) -> Result<T, PlaneError> {
        if let Err(error) = &result
            && !matches!(error, PlaneError::OutOfBounds(_) | PlaneError::Timeout(_))
        {
            self.registry.halt(Why::from(error));
        }
        result
    }

    fn check(&self, extents: &[Extent]) -> Result<(), PlaneError> {
        for extent in extents {
            self.registry.ram().check(extent)?;
            if extent.offset % PAGE_SIZE != 0 || extent.len % PAGE_SIZE != 0 {
                return Err(PlaneError::Protocol(format!("{extent:?} is not made of whole pages")));
            }
        }
        self.registry.halted().check()
    }

    fn write_checked(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        for extent in extents {
            let (mut at, end) = (extent.offset, extent.offset + extent.len);
            while at < end {
                let (chunk, chunk_end) = self.registry.find(extent.region, at);
                let keys = match self.registry.keys(chunk)? {
                    Some(keys) => keys,
                    None => {
                        // What is ready travels while we wait.
                        self.flush()?;
                        self.registry.wait(chunk, self.timeout)?
                    }
                };
                let len = (end - at).min(chunk_end - at).min(self.max_message);
                self.push_write(at, len as u32, keys)?;
                at += len;
            }
        }
        self.flush()
    }

    fn push_write(&mut self, at: u64, len: u32, keys: Keys) -> Result<(), PlaneError> {
        self.make_room(u64::from(len))?;
        // Both keys are for the chunk's extent under addresses that are offsets into the region.
        self.sges[self.filled] = ibv_sge { addr: at, length: len, lkey: keys.local };
        let request = &mut self.requests[self.filled];
        request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
        request.num_sge = 1;
        request.wr.rdma.remote_addr = at;
        request.wr.rdma.rkey = keys.remote;
        self.push(u64::from(len), false);
        self.stats.bytes += u64::from(len);
        self.registry.moving();
        if self.stats.bytes - self.told >= PROGRESS_BYTES {
            self.push_progress()?;
        }
        Ok(())
    }

    fn push_progress(&mut self) -> Result<(), PlaneError> {
        let bytes = self.stats.bytes;
        self.push_message(|slot| message::put(slot, &Message::Progress(bytes)))?;
        self.told = bytes;
        Ok(())
    }

    /// Puts a message into the chain once the destination has a buffer for it.
    fn push_message(&mut self, put: impl FnOnce(&mut [u8; SLOT]) -> usize) -> Result<(), PlaneError> {
        self.await_credit()?;
        self.make_room(0)?;
        let slot = (self.messages % CREDITS as u64) as usize;
        // SAFETY: the buffer's last message is CREDITS messages ago, which the destination has dealt with: it
        // has arrived, and what the device may still repeat of it is dropped as a duplicate.
        let len = put(unsafe { self.sends.get_mut(slot) });
        self.sges[self.filled] = self.sends.sge(slot, len);
        let request = &mut self.requests[self.filled];
        request.opcode = ibv_wr_opcode::IBV_WR_SEND;
        request.num_sge = 1;
        self.messages += 1;
        self.push(0, false);
        Ok(())
    }

    fn push_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        if self.told != self.stats.bytes {
            self.push_progress()?;
        }
        self.await_credit()?;
        self.make_room(0)?;
        // An empty write needs no key and no address. The destination's device completes it after all that
        // came before it on this queue pair is in memory.
        let request = &mut self.requests[self.filled];
        request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
        request.num_sge = 0;
        request.imm_data_invalidated_rkey_union.imm_data = round.to_be();
        request.wr.rdma.remote_addr = 0;
        request.wr.rdma.rkey = 0;
        self.messages += 1;
        self.posted.push_back(round);
        self.push(0, true);
        self.flush()
    }

    /// Waits until the destination has a buffer for one more message.
    fn await_credit(&mut self) -> Result<(), PlaneError> {
        while self.messages - self.done >= CREDITS as u64 {
            self.flush()?;
            self.reap()?;
        }
        Ok(())
    }

    /// Waits until one more request of `len` bytes may be under way.
    fn make_room(&mut self, len: u64) -> Result<(), PlaneError> {
        if self.filled == CHAIN {
            self.flush()?;
        }
        while self.pushed - self.completed >= self.depth
            || (self.pushed_bytes + len - self.completed_bytes > WINDOW && !self.marks.is_empty())
        {
            self.flush()?;
            self.reap()?;
        }
        Ok(())
    }

    /// Makes the entry at `filled` part of the chain.
    fn push(&mut self, bytes: u64, signal: bool) {
        self.pushed += 1;
        self.pushed_bytes += bytes;
        let (requests, marked_bytes) = self.marked;
        let due =
            self.pushed - requests >= self.depth / 4 || self.pushed_bytes - marked_bytes >= SIGNAL_BYTES;
        let request = &mut self.requests[self.filled];
        request.wr_id = self.pushed;
        request.send_flags = 0;
        if signal || due {
            request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
            self.marked = (self.pushed, self.pushed_bytes);
            self.marks.push_back(self.marked);
        }
        self.filled += 1;
    }

    /// Posts the chain, and takes what completions there are.
    fn flush(&mut self) -> Result<(), PlaneError> {
        if self.filled == 0 {
            return Ok(());
        }
        for index in 0..self.filled {
            self.requests[index].sg_list = &mut self.sges[index];
            self.requests[index].next =
                if index + 1 < self.filled { &mut self.requests[index + 1] } else { ptr::null_mut() };
        }
        // SAFETY: the chain ends at the last filled entry, and every entry points to its own scatter element.
        // Those are guest memory under a key of a chunk that is registered until the registry goes, which the
        // lane holds, or message buffers, which the lane holds as well; see `push_message` for their reuse.
        // What they hold is only read, and racing guest writes are the contract's own.
        unsafe { self.queue.post_send(&mut self.requests[0]) }
            .map_err(|source| PlaneError::Io { what: "posting RDMA requests", source })?;
        self.stats.requests += self.filled as u64;
        self.filled = 0;
        self.stats.max_in_flight = self.stats.max_in_flight.max(self.pushed - self.completed);
        self.queue.completions().poll(&mut self.completions)?;
        self.take()
    }

    /// Waits for completions.
    fn reap(&mut self) -> Result<(), PlaneError> {
        let deadline = Instant::now() + self.timeout;
        let completions = self.queue.completions();
        if !completions.wait(&mut self.completions, self.registry.halted(), Some(deadline))? {
            return Err(PlaneError::Timeout(self.timeout));
        }
        self.take()
    }

    fn take(&mut self) -> Result<(), PlaneError> {
        for at in 0..self.completions.len() {
            let completion = self.completions[at];
            if completion.id & RECEIVE == 0 {
                while let Some(&(requests, bytes)) = self.marks.front()
                    && requests <= completion.id
                {
                    self.marks.pop_front();
                    (self.completed, self.completed_bytes) = (requests, bytes);
                }
            } else {
                self.receive((completion.id & !RECEIVE) as usize, completion.len)?;
            }
        }
        Ok(())
    }

    fn receive(&mut self, slot: usize, len: usize) -> Result<(), PlaneError> {
        // SAFETY: the receive is complete, so the buffer is ours until it is posted again below.
        let bytes = unsafe { self.receives.get(slot, len) };
        let Message::Done { messages, round } = message::get(bytes)? else {
            return Err(PlaneError::Protocol("an answer that is none".into()));
        };
        if messages < self.done || messages > self.messages {
            return Err(PlaneError::Protocol(format!("{messages} of {} messages done", self.messages)));
        }
        if let Some(round) = round {
            if self.posted.pop_front() != Some(round) {
                return Err(PlaneError::Protocol(format!("barrier {round} is confirmed out of turn")));
            }
            self.confirmed.push_back(round);
        }
        // The buffer first: the credit lets us send what brings the next answer.
        self.post_receive(slot)?;
        self.done = messages;
        Ok(())
    }

    fn wait_confirmed(&mut self, round: u32) -> Result<(), PlaneError> {
        loop {
            while let Some(confirmed) = self.confirmed.pop_front() {
                if confirmed == round {
                    return Ok(());
                }
            }
            self.reap()?;
        }
    }
}

impl Lane for RdmaLane {
    fn write(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        let result = self.write_checked(extents);
        self.guard(result)
    }

    fn zero(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        for some in extents.chunks(MAX_EXTENTS) {
            let result = self.push_message(|slot| message::put_zeros(slot, some));
            self.guard(result)?;
            self.stats.zero_bytes += some.iter().map(|e| e.len).sum::<u64>();
        }
        let result = self.flush();
        self.guard(result)
    }

    fn post_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        self.registry.halted().check()?;
        let result = self.push_barrier(round);
        self.guard(result)
    }

    fn wait_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        let result = self.wait_confirmed(round);
        self.guard(result)
    }

    fn stats(&self) -> LaneStats {
        let mut stats = self.stats.clone();
        if self.first {
            (stats.registration_us, stats.registration_overlap_us) = self.registry.spent();
        }
        stats
    }
}

/// Turns a failure to make buffers into one of the plane.
pub(super) fn buffers(error: io::Error) -> PlaneError {
    crate::unavailable::resource("registering message buffers", error)
}
