//! Queue pairs: one reliable connection each.

use crate::cm::CmId;
use crate::completions::{CompletionQueue, Waiting};
use crate::device::verbs_result;
use crate::domain::ProtectionDomain;
use crate::unavailable;
use crate::zeroed::Zeroed;
use migration::transport::PlaneError;
use rdma_sys::*;
use std::io;
use std::ptr;
use std::sync::Arc;

/// A queue pair with its completion queue, on a connection of rdma_cm.
pub(crate) struct QueuePair {
    raw: *mut ibv_qp,
    id: Arc<CmId>,
    domain: Arc<ProtectionDomain>,
    /// After the pair itself is destroyed.
    completions: CompletionQueue,
}

// SAFETY: verbs on a queue pair are thread-safe; the pointer is valid until `drop`, which needs the last
// owner.
unsafe impl Send for QueuePair {}
// SAFETY: as for Send.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// Makes a queue pair for `id`, with room for `sends` send requests and `receives` receive requests. Each
    /// may have one scatter/gather element.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] or [`PlaneError::Io`] when the device has no more, or another one is asked
    /// for than that of the domain.
    pub(crate) fn new(
        id: Arc<CmId>,
        domain: &Arc<ProtectionDomain>,
        sends: u32,
        receives: u32,
        waiting: Waiting,
    ) -> Result<QueuePair, PlaneError> {
        let failed = |error| unavailable::resource("making a queue pair", error);
        if id.context() != domain.context() {
            return Err(failed(io::Error::other(
                "the connection goes through another device than the session",
            )));
        }
        let completions = CompletionQueue::new(domain, sends + receives, waiting)?;
        let mut attributes = ibv_qp_init_attr::zeroed();
        attributes.send_cq = completions.raw();
        attributes.recv_cq = completions.raw();
        attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
        attributes.cap.max_send_wr = sends;
        attributes.cap.max_recv_wr = receives;
        attributes.cap.max_send_sge = 1;
        attributes.cap.max_recv_sge = 1;
        // SAFETY: the identifier is on the domain's device, and both, with the completion queue, outlive the
        // pair, which holds them.
        let result = unsafe { (domain.api().rdma_create_qp)(id.raw(), domain.raw(), &mut attributes) };
        if result != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the call has set the identifier's queue pair.
        let raw = unsafe { (*id.raw()).qp };
        Ok(QueuePair { raw, id, domain: Arc::clone(domain), completions })
    }

    pub(crate) fn completions(&self) -> &CompletionQueue {
        &self.completions
    }

    /// Posts a chain of send requests.
    ///
    /// # Errors
    /// When the device refuses one of them; those before it have been taken.
    ///
    /// # Safety
    /// The chain must be well-formed; what its entries point to must be registered in the pair's domain and
    /// stay valid until the requests are complete.
    pub(crate) unsafe fn post_send(&self, first: *mut ibv_send_wr) -> io::Result<()> {
        let mut bad = ptr::null_mut();
        // SAFETY: the pair is valid, and the caller vouches for the chain.
        verbs_result(unsafe { ibv_post_send(self.raw, first, &mut bad) })
    }

    /// Posts one message, which leaves a completion with this number.
    ///
    /// # Safety
    /// The message's buffer must be registered and be left alone until the request is complete.
    pub(crate) unsafe fn post_message(&self, id: u64, mut message: ibv_sge) -> io::Result<()> {
        let mut request = ibv_send_wr::zeroed();
        request.wr_id = id;
        request.sg_list = &mut message;
        request.num_sge = 1;
        request.opcode = ibv_wr_opcode::IBV_WR_SEND;
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        // SAFETY: a chain of one, and the caller vouches for its buffer.
        unsafe { self.post_send(&mut request) }
    }

    /// Posts one buffer to be received into.
    ///
    /// # Safety
    /// The buffer must be registered for local writing and be left alone until the request is complete.
    pub(crate) unsafe fn post_receive(&self, id: u64, mut buffer: ibv_sge) -> io::Result<()> {
        let mut request = ibv_recv_wr { wr_id: id, next: ptr::null_mut(), sg_list: &mut buffer, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: the pair is valid, the request is a chain of one, and the caller vouches for the buffer.
        verbs_result(unsafe { ibv_post_recv(self.raw, &mut request, &mut bad) })
    }

    /// Takes the pair out of service, for good and at once.
    ///
    /// After this the device neither sends for it nor accepts anything for it: the transition to RESET
    /// completes only when the device has stopped working on the pair, incoming packets included, and what
    /// comes later finds no connection. (ERROR would not do: it stops new work, but a responder may be in the
    /// middle of a packet when the call returns.)
    ///
    /// # Errors
    /// When the device says no, and the pair may be alive.
    pub(crate) fn reset(&self) -> io::Result<()> {
        let mut attributes = ibv_qp_attr::zeroed();
        attributes.qp_state = ibv_qp_state::IBV_QPS_RESET;
        let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
        // SAFETY: the pair is valid; the mask says that only the state is read.
        verbs_result(unsafe { (self.domain.api().ibv_modify_qp)(self.raw, &mut attributes, mask) })
    }

    /// Destroys the pair. Once this has succeeded the device does nothing for it any more, as after
    /// [`reset`](Self::reset).
    ///
    /// # Errors
    /// The pair, which may be alive, and what the device said.
    pub(crate) fn destroy(mut self) -> Result<(), (QueuePair, io::Error)> {
        self.destroy_raw().map_err(|error| (self, error))
    }

    fn destroy_raw(&mut self) -> io::Result<()> {
        if self.raw.is_null() {
            return Ok(());
        }
        // SAFETY: whoever calls is the pair's only owner, and nobody uses it after this; `rdma_destroy_qp`
        // would destroy it in the same way.
        verbs_result(unsafe { (self.domain.api().ibv_destroy_qp)(self.raw) })?;
        self.raw = ptr::null_mut();
        // SAFETY: the identifier is valid; this tells librdmacm that it has no queue pair any more.
        unsafe { (*self.id.raw()).qp = ptr::null_mut() };
        Ok(())
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // Where it fails the device is gone. Then librdmacm must not try again with a pair that nobody owns.
        if self.destroy_raw().is_err() {
            // SAFETY: the identifier is valid, since the pair holds it.
            unsafe { (*self.id.raw()).qp = ptr::null_mut() };
        }
    }
}
