//! The thread that looks after a source's connections: it takes the destination's answers about memory, and
//! notices when a connection ends.

use super::registry::Registry;
use crate::cm::{EventChannel, describe};
use crate::completions::Completion;
use crate::halt::{HaltReason, wait_readable};
use crate::message::{self, Message};
use crate::receives::ReceiveQueue;
use migration::transport::PlaneError;
use rdma_sys::rdma_cm_event_type::*;
use std::io;
use std::sync::Arc;

/// Whether an event means that a connection works no more.
fn ends_connection(kind: u32) -> bool {
    matches!(
        kind,
        RDMA_CM_EVENT_DISCONNECTED
            | RDMA_CM_EVENT_DEVICE_REMOVAL
            | RDMA_CM_EVENT_CONNECT_ERROR
            | RDMA_CM_EVENT_UNREACHABLE
            | RDMA_CM_EVENT_REJECTED
            | RDMA_CM_EVENT_TIMEWAIT_EXIT
    )
}

/// Watches until the plane is stopped, by whomever; stops it when something is wrong. `answers` is the
/// receive queue of the registrations' connection.
pub(super) fn watch(registry: &Registry, channel: &Arc<EventChannel>, answers: &ReceiveQueue) {
    if let Err(error) = serve(registry, channel, answers) {
        registry.stop(HaltReason::from(&error));
    }
}

fn serve(registry: &Registry, channel: &Arc<EventChannel>, answers: &ReceiveQueue) -> Result<(), PlaneError> {
    let broken = |source| PlaneError::Io { what: "watching the RDMA connections", source };
    let halt = registry.halt();
    let queue = registry.queue().completions();
    let mut completions = Vec::new();
    loop {
        halt.check()?;
        while let Some(event) = channel.next().map_err(broken)? {
            if ends_connection(event.kind) {
                let source = io::Error::other(describe(&event));
                return Err(PlaneError::Io { what: "the RDMA connection", source });
            }
        }
        // Armed before the last look, so that what comes after it raises an event.
        queue.arm()?;
        loop {
            queue.poll(&mut completions)?;
            if completions.is_empty() {
                break;
            }
            completions.iter().try_for_each(|completion| handle(registry, answers, completion))?;
        }
        registry.watching.note();
        if let Some([true, ..]) =
            wait_readable([queue.fd(), channel.fd(), halt.fd()], None).map_err(broken)?
        {
            queue.disarm().map_err(broken)?;
        }
    }
}

fn handle(registry: &Registry, answers: &ReceiveQueue, completion: &Completion) -> Result<(), PlaneError> {
    let Some(buffer) = ReceiveQueue::filled(completion) else { return registry.handle_sent() };
    // SAFETY: the completion is of this queue pair. The buffer is posted again only below, where the message
    // is no longer in use.
    let bytes = unsafe { answers.message(buffer, completion) };
    let Message::Announce { extent, outcome } = message::get(bytes)? else {
        return Err(PlaneError::Protocol("the destination's message about memory is no answer".into()));
    };
    answers.post(buffer)?;
    registry.handle_answer(&extent, outcome)
}
