//! The receive queue of a queue pair: buffers that are posted for the peer's messages.

use crate::buffers::{MAX_MESSAGE_BYTES, MessageBuffers};
use crate::completions::Completion;
use crate::domain::ProtectionDomain;
use crate::queue::QueuePair;
use migration::transport::PlaneError;
use std::sync::Arc;

/// Marks the `wr_id` of a receive request; the rest is the number of its buffer. Send requests must not have
/// it.
const RECEIVE: u64 = 1 << 63;

/// Receive buffers on a queue pair. All are posted at first; whoever has taken a message out of one posts it
/// again.
pub(crate) struct ReceiveQueue {
    queue: Arc<QueuePair>,
    buffers: MessageBuffers,
}

impl ReceiveQueue {
    /// Makes `count` buffers and posts them. The peer sends at once when it is connected: this comes before.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when buffers cannot be made, [`PlaneError::Io`] when they cannot be
    /// posted.
    pub(crate) fn new(
        queue: Arc<QueuePair>,
        domain: &Arc<ProtectionDomain>,
        count: usize,
    ) -> Result<ReceiveQueue, PlaneError> {
        let receives = ReceiveQueue { queue, buffers: MessageBuffers::new(domain, count)? };
        (0..count).try_for_each(|buffer| receives.post(buffer))?;
        Ok(receives)
    }

    /// The buffer that a completion has filled; `None` for the completion of a send request.
    pub(crate) fn filled(completion: &Completion) -> Option<usize> {
        (completion.id & RECEIVE != 0).then_some((completion.id & !RECEIVE) as usize)
    }

    /// The message that a completion has brought in `buffer`.
    ///
    /// # Safety
    /// The completion must be one of this queue's, and its buffer not be posted again while the message is in
    /// use.
    pub(crate) unsafe fn message(&self, buffer: usize, completion: &Completion) -> &[u8] {
        // The length of a write with immediate data is the write's, and there is nothing to read.
        let len = if completion.immediate.is_some() { 0 } else { completion.len };
        // SAFETY: the receive is complete, and the caller vouches that it has not been posted again.
        unsafe { self.buffers.get(buffer, len) }
    }

    /// Posts a buffer for one more message.
    ///
    /// # Errors
    /// [`PlaneError::Io`] when the device refuses.
    pub(crate) fn post(&self, buffer: usize) -> Result<(), PlaneError> {
        let sge = self.buffers.sge(buffer, MAX_MESSAGE_BYTES);
        // SAFETY: the buffer is registered for local writing. It is read only through `message`, whose
        // callers vouch that it is not posted.
        unsafe { self.queue.post_receive(RECEIVE | buffer as u64, sge) }
            .map_err(|source| PlaneError::Io { what: "posting a receive buffer", source })
    }
}
