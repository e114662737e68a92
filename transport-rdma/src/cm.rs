//! rdma_cm: event channels, connection identifiers and what happens to them.

use crate::api::Api;
use crate::halt::{set_nonblocking, wait_readable};
use crate::unavailable;
use crate::zeroed::Zeroed;
use migration::transport::PlaneError;
use rdma_sys::*;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most bytes of private data in a connection request over rdma_cm's TCP port space: 92 that a request of the
/// InfiniBand connection manager has, less 36 that rdma_cm puts in front.
pub(crate) const MAX_PRIVATE_DATA_BYTES: usize = 56;

/// Private data as it is received: padded with zeros by the network.
pub(crate) type PrivateData = [u8; MAX_PRIVATE_DATA_BYTES];

/// A retransmission is due when no acknowledgement has come for 4.096 µs · 2^this: half a second. rdma_cm's
/// own choice for Ethernet (some 4 s, seven times over) would make a dead link show after half a minute.
const ACK_TIMEOUT_EXPONENT: u8 = 17;

/// Retransmissions before a queue pair fails: all that the field holds.
const RETRY_COUNT: u8 = 7;

/// Repetitions when the receiver has no buffer, 7 meaning "for ever". Credits keep that from happening; a
/// device with on-demand paging answers so while it fetches a page. Time-outs of ours bound the wait.
const RNR_RETRY_COUNT: u8 = 7;

/// Delivers the events of its identifiers.
pub(crate) struct EventChannel {
    api: &'static Api,
    raw: NonNull<rdma_event_channel>,
}

// SAFETY: librdmacm's calls on a channel are thread-safe; the struct holds nothing but the pointer, which
// stays valid until `drop`.
unsafe impl Send for EventChannel {}
// SAFETY: as for Send.
unsafe impl Sync for EventChannel {}

/// Names an identifier in events. Only ever compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(usize);

/// Something that happened.
pub(crate) struct Event {
    /// To whom.
    pub key: Key,
    pub kind: rdma_cm_event_type::Type,
    /// 0, a negative errno, or a reason for a rejection.
    pub status: i32,
    /// What the peer added.
    pub private_data: PrivateData,
    /// For a connection request: the identifier of the connection to be.
    pub incoming: Option<CmId>,
}

impl EventChannel {
    /// Opens rdma_cm.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when this host has no RDMA.
    pub(crate) fn new() -> Result<Arc<Self>, PlaneError> {
        EventChannel::on(Api::get().map_err(|why| PlaneError::Unavailable(why.into()))?)
    }

    /// The same by entry points that are given.
    pub(crate) fn on(api: &'static Api) -> Result<Arc<Self>, PlaneError> {
        // SAFETY: takes nothing; a null result is looked for.
        let raw = NonNull::new(unsafe { (api.rdma_create_event_channel)() })
            .ok_or_else(|| unavailable::no_rdma(&io::Error::last_os_error()))?;
        let channel = EventChannel { api, raw };
        set_nonblocking(channel.fd()).map_err(|source| PlaneError::Io { what: "opening rdma_cm", source })?;
        Ok(Arc::new(channel))
    }

    pub(crate) fn api(&self) -> &'static Api {
        self.api
    }

    /// Readable when there is an event.
    pub(crate) fn fd(&self) -> RawFd {
        // SAFETY: the channel is valid until `drop`, and its descriptor never changes.
        unsafe { (*self.raw.as_ptr()).fd }
    }

    /// The next event, if there is one now.
    pub(crate) fn next(self: &Arc<Self>) -> io::Result<Option<Event>> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is valid, and `raw` is where the event's address goes.
        if unsafe { (self.api.rdma_get_cm_event)(self.raw.as_ptr(), &mut raw) } != 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        // SAFETY: on success the library has stored a valid event, which stays so until it is acknowledged.
        let event = unsafe { &*raw };
        let mut private_data = [0; MAX_PRIVATE_DATA_BYTES];
        // SAFETY: none of our identifiers is of a datagram kind, so the connected form of the union is the
        // one that is filled in.
        let given = unsafe { event.param.conn };
        if !given.private_data.is_null() {
            let len = usize::from(given.private_data_len).min(MAX_PRIVATE_DATA_BYTES);
            // SAFETY: the library vouches for `private_data_len` bytes until the acknowledgement;
            // `private_data` has room for `len`.
            unsafe { ptr::copy_nonoverlapping(given.private_data.cast(), private_data.as_mut_ptr(), len) };
        }
        let incoming = (event.event == rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST)
            .then(|| NonNull::new(event.id))
            .flatten()
            .map(|raw| CmId { raw, channel: Arc::clone(self) });
        let copy = Event {
            key: Key(event.id as usize),
            kind: event.event,
            status: event.status,
            private_data,
            incoming,
        };
        // SAFETY: the event is valid, and not used after this.
        unsafe { (self.api.rdma_ack_cm_event)(raw) };
        Ok(Some(copy))
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// [`PlaneError::Timeout`] at `deadline`, with `timeout` as the time that has passed.
    pub(crate) fn wait(self: &Arc<Self>, deadline: Instant, timeout: Duration) -> Result<Event, PlaneError> {
        let broken = |source| PlaneError::Io { what: "waiting for rdma_cm", source };
        loop {
            if let Some(event) = self.next().map_err(broken)? {
                return Ok(event);
            }
            if wait_readable([self.fd()], Some(deadline)).map_err(broken)?.is_none() {
                return Err(PlaneError::Timeout(timeout));
            }
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: every identifier holds an `Arc` of its channel, so none is left; events are acknowledged as
        // they are taken.
        unsafe { (self.api.rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

/// A connection, or a place to listen, of rdma_cm.
pub(crate) struct CmId {
    raw: NonNull<rdma_cm_id>,
    /// Outlives the identifier.
    channel: Arc<EventChannel>,
}

// SAFETY: librdmacm's calls on an identifier are thread-safe apart from its destruction, which needs the last
// owner; the fields read here (`verbs`, `qp`, addresses) are written by calls that take place before the
// identifier is shared.
unsafe impl Send for CmId {}
// SAFETY: as for Send.
unsafe impl Sync for CmId {}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn timeout_ms(timeout: Duration) -> i32 {
    timeout.as_millis().clamp(1, i32::MAX as u128) as i32
}

impl CmId {
    pub(crate) fn new(channel: &Arc<EventChannel>) -> io::Result<CmId> {
        let mut raw = ptr::null_mut();
        let space = rdma_port_space::RDMA_PS_TCP;
        // SAFETY: the channel is valid and outlives the identifier, which holds it.
        check(unsafe {
            (channel.api.rdma_create_id)(channel.raw.as_ptr(), &mut raw, ptr::null_mut(), space)
        })?;
        let raw = NonNull::new(raw).ok_or(io::ErrorKind::Other)?;
        Ok(CmId { raw, channel: Arc::clone(channel) })
    }

    pub(crate) fn key(&self) -> Key {
        Key(self.raw.as_ptr() as usize)
    }

    pub(crate) fn raw(&self) -> *mut rdma_cm_id {
        self.raw.as_ptr()
    }

    /// The device it belongs to; null before it has one.
    pub(crate) fn context(&self) -> *mut ibv_context {
        // SAFETY: the identifier is valid until `drop`.
        unsafe { (*self.raw()).verbs }
    }

    /// The device's port that it uses.
    pub(crate) fn port(&self) -> u8 {
        // SAFETY: as above.
        unsafe { (*self.raw()).port_num }
    }

    pub(crate) fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let mut address = Address::from(address);
        // SAFETY: the identifier is valid, and the address is a whole one of its family.
        check(unsafe { (self.channel.api.rdma_bind_addr)(self.raw(), address.as_mut_ptr()) })
    }

    /// Listens; returns the port that was chosen.
    pub(crate) fn listen(&self, backlog: i32) -> io::Result<u16> {
        // SAFETY: the identifier is valid.
        check(unsafe { (self.channel.api.rdma_listen)(self.raw(), backlog) })?;
        // SAFETY: as above.
        Ok(u16::from_be(unsafe { (self.channel.api.rdma_get_src_port)(self.raw()) }))
    }

    /// This side's address.
    pub(crate) fn local_ip(&self) -> Option<IpAddr> {
        // SAFETY: the identifier is valid; the union's address forms share their first field, the family,
        // and each is read only under its own.
        unsafe {
            let source = &(*self.raw()).route.addr.src_addr_union;
            match i32::from(source.src_addr.sa_family) {
                libc::AF_INET => {
                    Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(source.src_sin.sin_addr.s_addr))))
                }
                libc::AF_INET6 => Some(IpAddr::V6(Ipv6Addr::from(source.src_sin6.sin6_addr.s6_addr))),
                _ => None,
            }
        }
    }

    /// Looks for the device that reaches `to`. Ends in an event.
    pub(crate) fn resolve_address(&self, to: SocketAddr, timeout: Duration) -> io::Result<()> {
        let mut to = Address::from(to);
        // SAFETY: the identifier is valid; a null source address lets routing choose; the destination is a
        // whole address of its family.
        check(unsafe {
            (self.channel.api.rdma_resolve_addr)(
                self.raw(),
                ptr::null_mut(),
                to.as_mut_ptr(),
                timeout_ms(timeout),
            )
        })
    }

    /// Looks for the way there. Ends in an event.
    pub(crate) fn resolve_route(&self, timeout: Duration) -> io::Result<()> {
        // SAFETY: the identifier is valid.
        check(unsafe { (self.channel.api.rdma_resolve_route)(self.raw(), timeout_ms(timeout)) })
    }

    /// Asks for a connection. Ends in an event.
    pub(crate) fn connect(&self, private_data: &[u8]) -> io::Result<()> {
        let mut parameters = parameters(private_data);
        self.set_ack_timeout();
        // SAFETY: the identifier is valid and has a queue pair; the parameters point to `private_data`, which
        // outlives the call.
        check(unsafe { (self.channel.api.rdma_connect)(self.raw(), &mut parameters) })
    }

    /// Takes a connection.
    pub(crate) fn accept(&self, private_data: &[u8]) -> io::Result<()> {
        let mut parameters = parameters(private_data);
        self.set_ack_timeout();
        // SAFETY: as for `connect`.
        check(unsafe { (self.channel.api.rdma_accept)(self.raw(), &mut parameters) })
    }

    /// Turns a connection down, saying why. Whoever asked notices by himself if even that fails.
    pub(crate) fn reject(&self, private_data: &[u8]) {
        let len = private_data.len().min(MAX_PRIVATE_DATA_BYTES) as u8;
        // SAFETY: the identifier is valid, and `private_data` has `len` bytes.
        unsafe { (self.channel.api.rdma_reject)(self.raw(), private_data.as_ptr().cast(), len) };
    }

    /// Tells the peer that the connection is over. Fails where there is none, which is as good.
    pub(crate) fn disconnect(&self) {
        // SAFETY: the identifier is valid.
        unsafe { (self.channel.api.rdma_disconnect)(self.raw()) };
    }

    fn set_ack_timeout(&self) {
        const RDMA_OPTION_ID: i32 = 0;
        const RDMA_OPTION_ID_ACK_TIMEOUT: i32 = 3;
        let mut value = ACK_TIMEOUT_EXPONENT;
        // An old kernel does not know the option: failures then show later.
        // SAFETY: the identifier is valid, and the option is the one byte that is passed.
        unsafe {
            let value = (&raw mut value).cast();
            (self.channel.api.rdma_set_option)(
                self.raw(),
                RDMA_OPTION_ID,
                RDMA_OPTION_ID_ACK_TIMEOUT,
                value,
                1,
            )
        };
    }
}

fn parameters(private_data: &[u8]) -> rdma_conn_param {
    debug_assert!(private_data.len() <= MAX_PRIVATE_DATA_BYTES);
    rdma_conn_param {
        private_data: private_data.as_ptr().cast(),
        private_data_len: private_data.len() as u8,
        // No reads and no atomics are ever asked for; some providers want one of each all the same.
        responder_resources: 1,
        initiator_depth: 1,
        flow_control: 1,
        retry_count: RETRY_COUNT,
        rnr_retry_count: RNR_RETRY_COUNT,
        srq: 0,
        qp_num: 0,
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        // SAFETY: the last owner lets go; its queue pair is gone (`QueuePair` holds its identifier and
        // destroys the pair first), and no event of it is unacknowledged.
        unsafe { (self.channel.api.rdma_destroy_id)(self.raw()) };
    }
}

/// A socket address as C has it.
struct Address(libc::sockaddr_storage);

impl Address {
    fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut self.0).cast()
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        let mut storage = libc::sockaddr_storage::zeroed();
        match address {
            SocketAddr::V4(v4) => {
                let place = (&raw mut storage).cast::<libc::sockaddr_in>();
                // SAFETY: a storage has room and alignment for every family's address.
                unsafe {
                    (*place).sin_family = libc::AF_INET as libc::sa_family_t;
                    (*place).sin_port = v4.port().to_be();
                    (*place).sin_addr.s_addr = u32::from(*v4.ip()).to_be();
                }
            }
            SocketAddr::V6(v6) => {
                let place = (&raw mut storage).cast::<libc::sockaddr_in6>();
                // SAFETY: as above.
                unsafe {
                    (*place).sin6_family = libc::AF_INET6 as libc::sa_family_t;
                    (*place).sin6_port = v6.port().to_be();
                    (*place).sin6_addr.s6_addr = v6.ip().octets();
                    (*place).sin6_scope_id = v6.scope_id();
                }
            }
        }
        Address(storage)
    }
}

/// An event's name, and what its status says.
pub(crate) fn describe(event: &Event) -> String {
    use rdma_cm_event_type::*;
    let name = match event.kind {
        RDMA_CM_EVENT_ADDR_ERROR => "the address cannot be resolved",
        RDMA_CM_EVENT_ROUTE_ERROR => "there is no route",
        RDMA_CM_EVENT_CONNECT_ERROR => "the connection failed",
        RDMA_CM_EVENT_UNREACHABLE => "the destination does not answer",
        RDMA_CM_EVENT_REJECTED => "the destination refused the connection",
        RDMA_CM_EVENT_DISCONNECTED => "the peer closed the connection",
        RDMA_CM_EVENT_DEVICE_REMOVAL => "the RDMA device was removed",
        RDMA_CM_EVENT_ADDR_CHANGE => "the device's address changed",
        RDMA_CM_EVENT_TIMEWAIT_EXIT => "the connection is over",
        _ => return format!("rdma_cm event {} (status {})", event.kind, event.status),
    };
    match event.status {
        0 => name.to_string(),
        status if status < 0 => format!("{name}: {}", io::Error::from_raw_os_error(-status)),
        status => format!("{name} (reason {status})"),
    }
}
