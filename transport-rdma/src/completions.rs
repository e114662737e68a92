//! Completion queues, and sleeping until they have something.

use crate::domain::ProtectionDomain;
use crate::halt::{Halt, set_nonblocking, wait_readable};
use crate::unavailable;
use crate::zeroed::Zeroed;
use migration::transport::PlaneError;
use rdma_sys::*;
use std::io;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Instant;

/// Completions that are taken by one call to the device.
const MAX_COMPLETIONS_PER_POLL: usize = 32;

/// How to wait for completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Waiting {
    /// Sleep until the device raises an event. A wait takes some microseconds longer and no CPU time.
    #[default]
    Sleep,
    /// Poll the completion queue all the time. Waits are the shortest, and each lane takes a whole CPU.
    BusyPoll,
}

/// A completed work request.
#[derive(Clone, Copy)]
pub(crate) struct Completion {
    /// What the request was given.
    pub id: u64,
    /// Bytes received.
    pub len: usize,
    /// Immediate data, for a write that carried some.
    pub immediate: Option<u32>,
}

/// A queue with the channel that announces its completions.
pub(crate) struct CompletionQueue {
    raw: NonNull<ibv_cq>,
    channel: Channel,
    waiting: Waiting,
}

struct Channel {
    raw: NonNull<ibv_comp_channel>,
    domain: Arc<ProtectionDomain>,
}

// SAFETY: verbs on queues and channels are thread-safe; the pointers are valid until `drop`.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for Send.
unsafe impl Sync for CompletionQueue {}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: the channel's only queue is destroyed before its channel (`CompletionQueue::drop`).
        unsafe { (self.domain.api().ibv_destroy_comp_channel)(self.raw.as_ptr()) };
    }
}

impl CompletionQueue {
    /// A queue with room for `entries` completions.
    pub(crate) fn new(
        domain: &Arc<ProtectionDomain>,
        entries: u32,
        waiting: Waiting,
    ) -> Result<Self, PlaneError> {
        let failed = |error| unavailable::resource("making a completion queue", error);
        let api = domain.api();
        // SAFETY: the context is open while the domain lives, which the channel holds.
        let raw = NonNull::new(unsafe { (api.ibv_create_comp_channel)(domain.context()) })
            .ok_or_else(|| failed(io::Error::last_os_error()))?;
        let channel = Channel { raw, domain: Arc::clone(domain) };
        // SAFETY: as above; the channel is valid and outlives the queue.
        let raw = unsafe {
            (api.ibv_create_cq)(domain.context(), entries as i32, ptr::null_mut(), channel.raw.as_ptr(), 0)
        };
        let raw = NonNull::new(raw).ok_or_else(|| failed(io::Error::last_os_error()))?;
        let queue = CompletionQueue { raw, channel, waiting };
        set_nonblocking(queue.fd()).map_err(failed)?;
        Ok(queue)
    }

    pub(crate) fn raw(&self) -> *mut ibv_cq {
        self.raw.as_ptr()
    }

    /// Readable when an armed queue has got a completion.
    pub(crate) fn fd(&self) -> RawFd {
        // SAFETY: the channel is valid until `drop`, and its descriptor never changes.
        unsafe { (*self.channel.raw.as_ptr()).fd }
    }

    /// Takes completions that are there now into `into`, which is emptied first.
    ///
    /// # Errors
    /// [`PlaneError::Io`] when one of them failed, or the device does. Then `into` is incomplete.
    pub(crate) fn poll(&self, into: &mut Vec<Completion>) -> Result<(), PlaneError> {
        into.clear();
        let mut raw = <[ibv_wc; MAX_COMPLETIONS_PER_POLL]>::zeroed();
        // SAFETY: the queue is valid, and `raw` has room for as many entries as are asked for.
        let taken = unsafe { ibv_poll_cq(self.raw(), MAX_COMPLETIONS_PER_POLL as i32, raw.as_mut_ptr()) };
        if taken < 0 {
            let source = io::Error::other("the completion queue cannot be read");
            return Err(PlaneError::Io { what: "polling the RDMA device", source });
        }
        for wc in &raw[..taken as usize] {
            if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
                let source = io::Error::other(status_text(wc.status, wc.vendor_err));
                return Err(PlaneError::Io { what: "an RDMA request", source });
            }
            let with_immediate = wc.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0;
            // SAFETY: both forms of the union are 32-bit integers, and the flag says which one it is.
            let immediate =
                with_immediate.then(|| u32::from_be(unsafe { wc.imm_data_invalidated_rkey_union.imm_data }));
            into.push(Completion { id: wc.wr_id, len: wc.byte_len as usize, immediate });
        }
        Ok(())
    }

    /// Takes at least one completion into `into`. Waits for it until `deadline`, without one for ever;
    /// returns false when time is up.
    ///
    /// # Errors
    /// As for [`poll`](Self::poll), and the reason in `halt`. The latter goes first, since requests of a
    /// plane that is halted fail because of that.
    pub(crate) fn wait(
        &self,
        into: &mut Vec<Completion>,
        halt: &Halt,
        deadline: Option<Instant>,
    ) -> Result<bool, PlaneError> {
        let mut armed = false;
        loop {
            halt.check()?;
            self.poll(into).or_else(|error| halt.check().and(Err(error)))?;
            if !into.is_empty() {
                return Ok(true);
            }
            if self.waiting == Waiting::BusyPoll {
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Ok(false);
                }
                std::hint::spin_loop();
                continue;
            }
            if !armed {
                // What completes between the poll above and this call raises no event: hence one more poll.
                self.arm()?;
                armed = true;
                continue;
            }
            let broken = |source| PlaneError::Io { what: "waiting for the RDMA device", source };
            match wait_readable([self.fd(), halt.fd()], deadline).map_err(broken)? {
                None => return Ok(false),
                Some([true, _]) => {
                    self.disarm().map_err(broken)?;
                    armed = false;
                }
                Some([false, _]) => {}
            }
        }
    }

    /// Asks for an event at the next completion.
    pub(crate) fn arm(&self) -> Result<(), PlaneError> {
        // SAFETY: the queue is valid.
        let result = unsafe { ibv_req_notify_cq(self.raw(), 0) };
        crate::device::verbs_result(result)
            .map_err(|source| PlaneError::Io { what: "arming the RDMA device", source })
    }

    /// Takes the event that made the descriptor readable.
    pub(crate) fn disarm(&self) -> io::Result<()> {
        let api = self.channel.domain.api();
        let (mut queue, mut user) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is valid, and the pointers are to locals.
        let result = unsafe { (api.ibv_get_cq_event)(self.channel.raw.as_ptr(), &mut queue, &mut user) };
        if result == 0 {
            // SAFETY: the channel's only queue is this one, and one event of it has been taken.
            unsafe { (api.ibv_ack_cq_events)(self.raw(), 1) };
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() == io::ErrorKind::WouldBlock { Ok(()) } else { Err(error) }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs are destroyed before their completion queue (`QueuePair` owns both), and events
        // are acknowledged as they are taken, so the call does not wait.
        unsafe { (self.channel.domain.api().ibv_destroy_cq)(self.raw()) };
    }
}

/// What a status means, in words that help to find the cause.
fn status_text(status: ibv_wc_status::Type, vendor: u32) -> String {
    use ibv_wc_status::*;
    let text = match status {
        IBV_WC_LOC_PROT_ERR => "local protection error: memory that is not registered",
        IBV_WC_WR_FLUSH_ERR => "flushed: the queue pair was shut",
        IBV_WC_REM_INV_REQ_ERR => "the peer's device found the request invalid",
        IBV_WC_REM_ACCESS_ERR => "remote access error: the peer's device refused the key or the address",
        IBV_WC_REM_OP_ERR => "the peer's device could not carry out the request",
        IBV_WC_RETRY_EXC_ERR => "the peer's device does not answer: link down, device gone, or peer dead",
        IBV_WC_RNR_RETRY_EXC_ERR => "the peer has no buffer for a message",
        IBV_WC_FATAL_ERR => "fatal error of the device",
        IBV_WC_LOC_LEN_ERR => "a message longer than its buffer",
        IBV_WC_LOC_QP_OP_ERR => "the queue pair cannot carry out the request",
        _ => "failed",
    };
    format!("{text} (status {status}, vendor code {vendor:#x})")
}
