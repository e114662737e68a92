//! A lane at the destination: clearing the pages that are named, and confirming barriers. The card places what
//! is written, without us.

use super::Plane;
use crate::completions::Completion;
use crate::message::{self, Extents, Message};
use crate::queue::QueuePair;
use crate::slots::{SLOT, Slots};
use crate::source::LANE_CREDITS;
use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::scan;
use migration::transport::PlaneError;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Marks the completions of receives.
const RECEIVE: u64 = 1 << 63;

/// A connection's buffers, all of those for receiving posted.
pub(super) struct Post {
    queue: Arc<QueuePair>,
    sends: Slots,
    free: Vec<usize>,
    /// Answers for which no buffer was free.
    waiting: VecDeque<Message<'static>>,
    receives: Slots,
    completions: Vec<Completion>,
}

impl Post {
    pub(super) fn new(queue: Arc<QueuePair>, sends: Slots, receives: Slots) -> Result<Post, PlaneError> {
        let free = (0..sends.count()).collect();
        let post = Post { queue, sends, free, waiting: VecDeque::new(), receives, completions: Vec::new() };
        (0..post.receives.count()).try_for_each(|slot| post.post(slot))?;
        Ok(post)
    }

    fn post(&self, slot: usize) -> Result<(), PlaneError> {
        // SAFETY: the buffer is registered for local writing, and left alone until its completion.
        unsafe { self.queue.post_receive(RECEIVE | slot as u64, self.receives.sge(slot, SLOT)) }
            .map_err(|source| PlaneError::Io { what: "posting a buffer", source })
    }

    /// Waits for messages; `each` is given their immediate data and content, one after the other, and returns
    /// what is to be answered. The buffer is posted again before the answer goes out.
    pub(super) fn serve(
        &mut self,
        plane: &Plane,
        mut each: impl FnMut(Option<u32>, &[u8]) -> Result<Answer, PlaneError>,
    ) -> Result<(), PlaneError> {
        loop {
            self.queue.completions().wait(&mut self.completions, &plane.halt, None)?;
            for at in 0..self.completions.len() {
                let Completion { id, len, immediate } = self.completions[at];
                if id & RECEIVE == 0 {
                    self.free.push(id as usize);
                    if let Some(message) = self.waiting.pop_front() {
                        self.send(message)?;
                    }
                    continue;
                }
                let slot = (id & !RECEIVE) as usize;
                // The length of a write with immediate data is the write's, and there is nothing to read.
                let len = if immediate.is_some() { 0 } else { len };
                // SAFETY: the receive is complete, so the buffer is ours until it is posted again below.
                let answer = each(immediate, unsafe { self.receives.get(slot, len) })?;
                self.post(slot)?;
                if let Some(message) = answer {
                    self.send(message)?;
                }
            }
        }
    }

    fn send(&mut self, message: Message<'static>) -> Result<(), PlaneError> {
        let Some(slot) = self.free.pop() else {
            // A source has taken the answers to all its messages but the last few, as many as we have buffers.
            // Its device's acknowledgements may come later than its next message, but no more answers than
            // that ever wait here, unless it sends and takes none.
            if self.waiting.len() >= self.sends.count() {
                return Err(PlaneError::Protocol("the source takes no answers".into()));
            }
            self.waiting.push_back(message);
            return Ok(());
        };
        // SAFETY: free buffers are those whose send is complete.
        let len = message::put(unsafe { self.sends.get_mut(slot) }, &message);
        // SAFETY: the buffer is registered and left alone until its completion.
        unsafe { self.queue.post_message(slot as u64, self.sends.sge(slot, len)) }
            .map_err(|source| PlaneError::Io { what: "answering the source", source })
    }
}

/// What goes back to the source.
pub(super) type Answer = Option<Message<'static>>;

impl Plane {
    /// Serves a lane until the plane is halted.
    pub(super) fn serve_lane(&self, post: &mut Post) -> Result<(), PlaneError> {
        let (mut dealt, mut told, mut bytes) = (0u64, 0u64, 0u64);
        post.serve(self, |immediate, content| {
            dealt += 1;
            if let Some(round) = immediate {
                // The card completes this after everything before it on the queue pair is in memory, and the
                // zeros before it have been dealt with here, in order.
                told = dealt;
                return Ok(Some(Message::Done { messages: dealt, round: Some(round) }));
            }
            match message::get(content)? {
                Message::Zero(extents) => self.clear(extents)?,
                Message::Progress(now) => {
                    let more = now
                        .checked_sub(bytes)
                        .ok_or_else(|| PlaneError::Protocol(format!("{now} bytes written after {bytes}")))?;
                    self.placed.fetch_add(more, Ordering::Relaxed);
                    bytes = now;
                }
                other => return Err(PlaneError::Protocol(format!("{other:?} on a lane"))),
            }
            // Not for every message: half of the buffers are enough to keep the source going.
            if dealt - told < LANE_CREDITS as u64 / 2 {
                return Ok(None);
            }
            told = dealt;
            Ok(Some(Message::Done { messages: dealt, round: None }))
        })
    }

    fn clear(&self, extents: Extents<'_>) -> Result<(), PlaneError> {
        let ram = &self.session.ram;
        for extent in extents.iter() {
            ram.check(&extent)?;
            if extent.offset % PAGE_SIZE != 0 || extent.len % PAGE_SIZE != 0 {
                return Err(PlaneError::Protocol(format!("{extent:?} is not made of whole pages")));
            }
        }
        extents.iter().for_each(|extent| clear(ram, &extent));
        // Named pages are a sign of life as much as sent ones.
        self.placed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Makes a checked extent read as zeros. Pages that do not exist already do, and are not made to exist.
fn clear(ram: &Ram, extent: &Extent) {
    let Ok(region) = ram.check(extent) else { return };
    scan::existing(region, extent.offset / PAGE_SIZE, extent.len / PAGE_SIZE, |first, pages| {
        let address = region.address().wrapping_add((first * PAGE_SIZE) as usize);
        // SAFETY: `existing` reports only pages of the extent, which lies inside the region's mapping; the
        // guest does not run here yet, and no reference to its memory exists.
        unsafe { std::ptr::write_bytes(address, 0, (pages * PAGE_SIZE) as usize) };
    });
}
