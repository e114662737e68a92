//! The thread that looks after a source's connections: it takes the destination's answers about memory, and
//! notices when a connection ends.

use super::registry::{CREDITS, Registry};
use crate::cm::{EventChannel, describe};
use crate::completions::Completion;
use crate::halt::{Why, wait_readable};
use crate::message::{self, Message};
use crate::slots::{SLOT, Slots};
use migration::transport::PlaneError;
use rdma_sys::rdma_cm_event_type::*;
use std::io;
use std::sync::Arc;

/// Marks the completions of receives.
const RECEIVE: u64 = 1 << 63;

/// Whether an event means that a connection works no more.
pub(super) fn ends(kind: u32) -> bool {
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

/// Posts all buffers for the destination's answers: before the connection is made.
pub(super) fn post_all(registry: &Registry, answers: &Slots) -> Result<(), PlaneError> {
    (0..CREDITS).try_for_each(|slot| post(registry, answers, slot))
}

fn post(registry: &Registry, answers: &Slots, slot: usize) -> Result<(), PlaneError> {
    // SAFETY: the buffer is registered for local writing, and left alone until its completion.
    unsafe { registry.queue().post_receive(RECEIVE | slot as u64, answers.sge(slot, SLOT)) }
        .map_err(|source| PlaneError::Io { what: "posting a buffer", source })
}

/// Watches until the plane is halted, by whomever; halts it when something is wrong.
pub(super) fn watch(registry: &Registry, channel: &Arc<EventChannel>, answers: &Slots) {
    if let Err(error) = serve(registry, channel, answers) {
        registry.halt(Why::from(&error));
    }
}

fn serve(registry: &Registry, channel: &Arc<EventChannel>, answers: &Slots) -> Result<(), PlaneError> {
    let broken = |source| PlaneError::Io { what: "watching the RDMA connections", source };
    let halt = registry.halted();
    let queue = registry.queue().completions();
    let mut completions = Vec::new();
    loop {
        halt.check()?;
        while let Some(event) = channel.next().map_err(broken)? {
            if ends(event.kind) {
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
            completions.iter().try_for_each(|completion| take(registry, answers, completion))?;
        }
        registry.watching.note();
        if let Some([true, ..]) =
            wait_readable([queue.fd(), channel.fd(), halt.fd()], None).map_err(broken)?
        {
            queue.disarm().map_err(broken)?;
        }
    }
}

fn take(registry: &Registry, answers: &Slots, completion: &Completion) -> Result<(), PlaneError> {
    if completion.id & RECEIVE == 0 {
        return registry.sent();
    }
    let slot = (completion.id & !RECEIVE) as usize;
    // SAFETY: the receive is complete, so the buffer is ours until it is posted again below.
    let bytes = unsafe { answers.get(slot, completion.len) };
    let Message::Announce { extent, outcome } = message::get(bytes)? else {
        return Err(PlaneError::Protocol("an answer that is none".into()));
    };
    post(registry, answers, slot)?;
    registry.answered(&extent, outcome)
}
