//! A device that carries nothing: requests complete as they are posted, and messages are answered at once.
//! What a lane takes on it is what this crate's code takes, on any machine; a real device adds what its
//! driver does for a request and a completion. Only `examples/costs.rs` uses it, and nothing of it is ever
//! freed.

use super::lane::{LaneLimits, RdmaLane};
use super::registry::{MAX_REQUESTS_IN_QUEUE, Registry};
use crate::api::Api;
use crate::buffers::MAX_MESSAGE_BYTES;
use crate::chunks::{ChunkMap, DEFAULT_CHUNK, min_chunk_shifts};
use crate::cm::{CmId, EventChannel};
use crate::domain::ProtectionDomain;
use crate::halt::Halt;
use crate::message::{self, LANE_CREDITS, Message, REGISTRATION_CREDITS};
use crate::options::DEFAULT_DEPTH;
use crate::queue::QueuePair;
use crate::zeroed::Zeroed;
use migration::memory::Ram;
use migration::transport::{Lane, PlaneError};
use rdma_sys::*;
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::net::Ipv4Addr;
use std::ptr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// A lane on such a device, with all of `ram` registered.
///
/// # Errors
/// When the RDMA libraries are not installed: what is not about devices is theirs.
pub fn lane(ram: &Arc<Ram>) -> Result<Box<dyn Lane>, PlaneError> {
    let broken = |source| PlaneError::Io { what: "preparing a device that carries nothing", source };
    let channel = EventChannel::on(api()?)?;
    let domain = ProtectionDomain::open(&channel, Ipv4Addr::LOCALHOST.into(), false)?;
    let identifier = || {
        let id = CmId::new(&channel).map_err(broken)?;
        id.bind((Ipv4Addr::LOCALHOST, 0).into()).map_err(broken)?;
        Ok::<_, PlaneError>(Arc::new(id))
    };
    let map = ChunkMap::new(ram, &min_chunk_shifts(ram, DEFAULT_CHUNK, domain.abilities().max_mr));
    let chunks = map.len();
    let (sends, receives) = (MAX_REQUESTS_IN_QUEUE as u32, REGISTRATION_CREDITS as u32);
    let queue = QueuePair::new(identifier()?, &domain, sends, receives, Default::default())?;
    let halt = Halt::new().map_err(broken)?;
    let registry = Registry::new(Arc::clone(ram), Arc::clone(&domain), map, Arc::new(queue), halt)?;
    let registry = Arc::new(registry);
    let registering = Arc::clone(&registry);
    thread::spawn(move || registering.register_queued());
    let timeout = Duration::from_secs(60);
    for chunk in 0..chunks {
        registry.request(chunk)?;
        registry.handle_sent()?;
        registry.answer_without_destination(chunk)?;
        registry.wait_for_keys(chunk, timeout)?;
    }
    let queue =
        QueuePair::new(identifier()?, &domain, DEFAULT_DEPTH, LANE_CREDITS as u32, Default::default())?;
    let limits = LaneLimits { max_write_bytes: 1 << 31, max_requests: DEFAULT_DEPTH, timeout };
    Ok(Box::new(RdmaLane::new(Arc::new(queue), &domain, registry, limits, true)?))
}

/// What a completion queue and its queue pair know.
#[derive(Default)]
struct State {
    completions: VecDeque<ibv_wc>,
    /// Buffers that are posted: number and address.
    receives: VecDeque<(u64, u64)>,
    messages: u64,
}

impl State {
    fn complete(&mut self, id: u64, len: usize) {
        // A status of zero means success.
        let mut completion = ibv_wc::zeroed();
        (completion.wr_id, completion.byte_len) = (id, len as u32);
        self.completions.push_back(completion);
    }

    /// What a destination answers: to every barrier, and to as many messages as it says one word for.
    fn answer(&mut self, round: Option<u32>) {
        self.messages += 1;
        if round.is_none() && !self.messages.is_multiple_of(LANE_CREDITS as u64 / 2) {
            return;
        }
        // The registrations' queue pair has no buffers: it is answered by hand.
        let Some((id, address)) = self.receives.pop_front() else { return };
        let mut buffer = [0; MAX_MESSAGE_BYTES];
        let len = message::put(&mut buffer, &Message::Done { messages: self.messages, round });
        // SAFETY: the buffer is posted, and so the device's; it has room for any message.
        unsafe { ptr::copy_nonoverlapping(buffer.as_ptr(), address as *mut u8, len) };
        self.complete(id, len);
    }
}

unsafe extern "C" fn post_send(
    pair: *mut ibv_qp,
    mut request: *mut ibv_send_wr,
    _bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the pair is one of `create_qp`'s, whose state is used by one thread at a time.
    let state = unsafe { &mut *(*pair).qp_context.cast::<State>() };
    // SAFETY: the caller vouches for a chain of valid requests that ends in null.
    while let Some(this) = unsafe { request.as_ref() } {
        if this.send_flags & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0 {
            state.complete(this.wr_id, 0);
        }
        match this.opcode {
            ibv_wr_opcode::IBV_WR_SEND => state.answer(None),
            ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM => {
                // SAFETY: this kind of request carries immediate data.
                state.answer(Some(u32::from_be(unsafe { this.imm_data_invalidated_rkey_union.imm_data })));
            }
            _ => {}
        }
        request = this.next;
    }
    0
}

unsafe extern "C" fn post_recv(
    pair: *mut ibv_qp,
    request: *mut ibv_recv_wr,
    _bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as for `post_send`; this crate posts one buffer of one piece at a time.
    unsafe {
        let state = &mut *(*pair).qp_context.cast::<State>();
        state.receives.push_back(((*request).wr_id, (*(*request).sg_list).addr));
    }
    0
}

unsafe extern "C" fn poll_cq(queue: *mut ibv_cq, most: c_int, into: *mut ibv_wc) -> c_int {
    // SAFETY: the queue is one of `create_cq`'s, whose state is used by one thread at a time.
    let state = unsafe { &mut *(*queue).cq_context.cast::<State>() };
    let taken = state.completions.len().min(most.max(0) as usize);
    for (at, completion) in state.completions.drain(..taken).enumerate() {
        // SAFETY: the caller has room for `most` entries, and `at` is less.
        unsafe { into.add(at).write(completion) };
    }
    taken as c_int
}

unsafe extern "C" fn req_notify_cq(_queue: *mut ibv_cq, _solicited: c_int) -> c_int {
    0
}

/// Something of C's that lives for ever, zero at first.
fn leaked<T: Zeroed>() -> &'static mut T {
    Box::leak(Box::new(T::zeroed()))
}

fn api() -> Result<&'static Api, PlaneError> {
    let real = Api::get().map_err(|why| PlaneError::Unavailable(why.into()))?;
    let api = Api {
        ibv_query_device,
        ibv_query_port,
        ibv_alloc_pd,
        ibv_reg_mr_iova,
        ibv_create_comp_channel,
        ibv_create_cq,
        rdma_create_event_channel,
        rdma_create_id,
        rdma_bind_addr,
        rdma_create_qp,
        // Whatever ends ends with the process.
        ibv_dealloc_pd: nothing,
        ibv_dereg_mr: nothing,
        ibv_destroy_comp_channel: nothing,
        ibv_destroy_cq: nothing,
        ibv_destroy_qp: nothing,
        rdma_destroy_id: nothing,
        rdma_destroy_event_channel: nothing_at_all,
        ..*real
    };
    Ok(Box::leak(Box::new(api)))
}

unsafe extern "C" fn nothing<T>(_what: *mut T) -> c_int {
    0
}

unsafe extern "C" fn nothing_at_all(_channel: *mut rdma_event_channel) {}

unsafe extern "C" fn ibv_query_device(_context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller asks for an answer there.
    unsafe { ((*attributes).max_mr, (*attributes).max_qp_wr) = (1 << 20, 1 << 15) };
    0
}

unsafe extern "C" fn ibv_query_port(
    _context: *mut ibv_context,
    _port: u8,
    attributes: *mut _compat_ibv_port_attr,
) -> c_int {
    // SAFETY: this crate asks with a whole structure of the newer form behind the older one's name.
    unsafe { (*attributes.cast::<ibv_port_attr>()).max_msg_sz = 1 << 31 };
    0
}

unsafe extern "C" fn ibv_alloc_pd(_context: *mut ibv_context) -> *mut ibv_pd {
    leaked()
}

unsafe extern "C" fn ibv_reg_mr_iova(
    _domain: *mut ibv_pd,
    _address: *mut c_void,
    _len: usize,
    _iova: u64,
    _access: c_int,
) -> *mut ibv_mr {
    leaked()
}

/// A descriptor that is never readable.
fn silent() -> c_int {
    // SAFETY: no pointers are involved.
    unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }
}

unsafe extern "C" fn ibv_create_comp_channel(_context: *mut ibv_context) -> *mut ibv_comp_channel {
    let channel: &mut ibv_comp_channel = leaked();
    channel.fd = silent();
    channel
}

unsafe extern "C" fn ibv_create_cq(
    context: *mut ibv_context,
    _entries: c_int,
    _user: *mut c_void,
    channel: *mut ibv_comp_channel,
    _vector: c_int,
) -> *mut ibv_cq {
    let queue: &mut ibv_cq = leaked();
    let state = Box::into_raw(Box::<State>::default()).cast();
    (queue.context, queue.channel, queue.cq_context) = (context, channel, state);
    queue
}

unsafe extern "C" fn rdma_create_event_channel() -> *mut rdma_event_channel {
    let channel: &mut rdma_event_channel = leaked();
    channel.fd = silent();
    channel
}

unsafe extern "C" fn rdma_create_id(
    channel: *mut rdma_event_channel,
    into: *mut *mut rdma_cm_id,
    _user: *mut c_void,
    _space: rdma_port_space::Type,
) -> c_int {
    let id: &mut rdma_cm_id = leaked();
    id.channel = channel;
    // SAFETY: the caller wants it there.
    unsafe { *into = id };
    0
}

unsafe extern "C" fn rdma_bind_addr(id: *mut rdma_cm_id, _address: *mut libc::sockaddr) -> c_int {
    // One device for all.
    static CONTEXT: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    let context = CONTEXT.get_or_init(|| {
        let context: &mut ibv_context = leaked();
        context.ops.post_send = Some(post_send);
        context.ops.post_recv = Some(post_recv);
        context.ops.poll_cq = Some(poll_cq);
        context.ops.req_notify_cq = Some(req_notify_cq);
        ptr::from_mut(context) as usize
    });
    // SAFETY: the identifier is one of `rdma_create_id`'s.
    unsafe { ((*id).verbs, (*id).port_num) = (*context as *mut ibv_context, 1) };
    0
}

unsafe extern "C" fn rdma_create_qp(
    id: *mut rdma_cm_id,
    _domain: *mut ibv_pd,
    attributes: *mut ibv_qp_init_attr,
) -> c_int {
    let pair: &mut ibv_qp = leaked();
    // SAFETY: the identifier and the completion queue are of the functions above.
    unsafe {
        pair.context = (*id).verbs;
        pair.qp_context = (*(*attributes).send_cq).cq_context;
        (*id).qp = pair;
    }
    0
}
