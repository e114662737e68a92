//! A connection at the destination: taking messages, and answering them.

use crate::buffers::MessageBuffers;
use crate::completions::Completion;
use crate::domain::ProtectionDomain;
use crate::halt::Halt;
use crate::message::{self, Message};
use crate::queue::QueuePair;
use crate::receives::ReceiveQueue;
use migration::transport::PlaneError;
use std::collections::VecDeque;
use std::sync::Arc;

/// What goes back to the source for a message, if anything.
pub(super) type Answer = Option<Message<'static>>;

/// A queue pair with its buffers, all of those for receiving posted.
pub(super) struct Endpoint {
    queue: Arc<QueuePair>,
    receives: ReceiveQueue,
    sends: MessageBuffers,
    /// Send buffers of which no request is in flight.
    free_sends: Vec<usize>,
    /// Answers that wait for a free send buffer, oldest first; at most as many as there are buffers.
    waiting: VecDeque<Message<'static>>,
    completions: Vec<Completion>,
}

impl Endpoint {
    /// An endpoint with `buffers` buffers for receiving and as many for sending. Comes before the connection
    /// is accepted.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when there is no memory for the buffers, [`PlaneError::Io`] when they
    /// cannot be posted.
    pub(super) fn new(
        queue: Arc<QueuePair>,
        domain: &Arc<ProtectionDomain>,
        buffers: usize,
    ) -> Result<Endpoint, PlaneError> {
        Ok(Endpoint {
            receives: ReceiveQueue::new(Arc::clone(&queue), domain, buffers)?,
            queue,
            sends: MessageBuffers::new(domain, buffers)?,
            free_sends: (0..buffers).collect(),
            waiting: VecDeque::new(),
            completions: Vec::new(),
        })
    }

    /// Takes messages until `halt` is set. `handle` is given the immediate data and the content of each, one
    /// after the other, and returns the answer. The buffer is posted again before the answer goes out.
    ///
    /// # Errors
    /// That of `handle`, of the queue pair, or the reason in `halt`. It returns for no other cause.
    pub(super) fn serve(
        &mut self,
        halt: &Halt,
        mut handle: impl FnMut(Option<u32>, &[u8]) -> Result<Answer, PlaneError>,
    ) -> Result<(), PlaneError> {
        loop {
            self.queue.completions().wait(&mut self.completions, halt, None)?;
            for at in 0..self.completions.len() {
                let completion = self.completions[at];
                let Some(buffer) = ReceiveQueue::filled(&completion) else {
                    self.handle_sent(completion.id as usize)?;
                    continue;
                };
                // SAFETY: the completion is of this queue pair. The buffer is posted again only below, where
                // the message is no longer in use.
                let message = unsafe { self.receives.message(buffer, &completion) };
                let answer = handle(completion.immediate, message)?;
                self.receives.post(buffer)?;
                if let Some(answer) = answer {
                    self.send(answer)?;
                }
            }
        }
    }

    /// The answer in a send buffer has left, which is free again.
    fn handle_sent(&mut self, buffer: usize) -> Result<(), PlaneError> {
        self.free_sends.push(buffer);
        self.waiting.pop_front().map_or(Ok(()), |answer| self.send(answer))
    }

    fn send(&mut self, answer: Message<'static>) -> Result<(), PlaneError> {
        let Some(buffer) = self.free_sends.pop() else {
            // A source has taken the answers to all its messages but the last few, as many as we have
            // buffers. Its device's acknowledgements may come later than its next message, but no more
            // answers than that ever wait here, unless it sends and takes none.
            if self.waiting.len() >= self.sends.count() {
                return Err(PlaneError::Protocol("the source takes no answers".into()));
            }
            self.waiting.push_back(answer);
            return Ok(());
        };
        // SAFETY: free buffers are those whose send is complete.
        let len = message::put(unsafe { self.sends.get_mut(buffer) }, &answer);
        // SAFETY: the buffer is registered, and left alone until its completion puts it among the free ones.
        unsafe { self.queue.post_message(buffer as u64, self.sends.sge(buffer, len)) }
            .map_err(|source| PlaneError::Io { what: "answering the source", source })
    }
}
