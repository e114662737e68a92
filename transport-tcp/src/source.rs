//! The source's streams.
//!
//! Large extents are sent with `sendfile` from the guest's memfd: the kernel puts references to the guest's
//! own pages into the socket, and nothing is copied on this side. A page may change before it leaves; the
//! contract allows that. Small extents, and memory whose file cannot be sent (hugetlbfs), are sent with
//! `sendmsg` from the mapping, many at a time. This is the same for a socket to which the kernel encrypts. If
//! this process has to encrypt, it does so from the mapping.
//!
//! **Keys** are good for a number of records. A lane that has sent as many waits until all of it is in place,
//! ends its connection, and opens another one, whose handshake makes new keys. The destination lets it in
//! once it has seen the end of the first. So both ends may encrypt wherever they like; not every kernel can
//! change keys.

use crate::channel::{Channel, Peer, Protected, Protection, SharedSocket};
use crate::frame::{self, Header, Kind, MAX_FRAME_EXTENTS, UNIT};
use crate::iovec::{self, MAX_IOVECS};
use crate::opening::{self, Caller};
use crate::plane::lock;
use crate::stream::{self, PEER, Stream};
use crate::{Error, cause, pacing};
use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::preamble::Preamble;
use migration::transport::{Interrupt, Lane, LaneStats, PlaneError, Session, SourcePlane, SourceTransport};
use socket2::Socket;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Streams that a source opens by default. Over loopback on two cores, four streams carry 1.06 times (1.01 to
/// 1.23) as much as two to populated memory, and up to 1.6 times as much to memory that is not; see
/// `docs/measurements.md`.
pub const DEFAULT_STREAMS: u16 = 4;

/// Protected lanes that are opened at once. Their handshakes are computed by both ends in turn, so that one
/// after the other would leave processors idle. A destination holds few callers of one address that have not
/// shown yet who they are.
const LANES_AT_ONCE: u16 = 4;

/// From this length on, an extent is sent with `sendfile`; below it, the call costs more than the copy.
const MIN_SENDFILE_BYTES: u64 = 32 << 10;

/// Streams to the destination.
pub struct TcpSource(Streams);

/// Where a source's streams come from.
enum Streams {
    /// Connections to an address.
    Connect(Arc<Way>),
    /// Connected elsewhere.
    Given(Vec<Socket>),
}

/// How a source reaches its destination.
struct Way {
    to: SocketAddr,
    streams: u16,
    /// What it has to prove to be, and how.
    host: String,
    protection: Protection,
    /// Who is at the other end of the control link.
    peer: Option<Peer>,
}

impl Way {
    /// A lane's channel. Who is to shut it down is told of it `before` anything is waited for.
    fn open(
        &self,
        lane: u16,
        session: &Session,
        before: impl FnOnce(&SharedSocket),
    ) -> Result<Channel, Error> {
        let Session { token, secret, timeout: patience, .. } = session;
        let to = self.to.to_string();
        let caller = Caller { to: &to, host: &self.host, protection: &self.protection, patience: *patience };
        let preamble = Preamble::data(*token, lane, self.streams).encrypted(self.protection.is_some());
        let socket = stream::connect(self.to, *patience, before)?;
        let mut channel = caller.call(Channel::Clear(socket), preamble)?;
        if let (Some(owner), Some(peer)) = (&self.peer, channel.peer())
            && !owner.is(peer)
        {
            let text =
                format!("a lane to {to} leads to {}, and the session is with {}", peer.name, owner.name);
            return Err(Error::Untrusted(text));
        }
        opening::prove(&mut channel, &to, &preamble, secret, *patience)?;
        Ok(channel)
    }
}

impl TcpSource {
    /// `streams` connections to `to`, the address to which the control link goes; 0 for [`DEFAULT_STREAMS`].
    pub fn new(to: SocketAddr, streams: u16) -> Self {
        TcpSource::protected(to, streams, "", Protection::none(), None)
    }

    /// The same to `host`, protected, and bound to the peer of the control link.
    pub(crate) fn protected(
        to: SocketAddr,
        streams: u16,
        host: &str,
        protection: Protection,
        peer: Option<Peer>,
    ) -> Self {
        let streams = if streams == 0 { DEFAULT_STREAMS } else { streams };
        TcpSource(Streams::Connect(Arc::new(Way { to, streams, host: host.into(), protection, peer })))
    }

    /// Streams that are connected already: stream sockets of any family, one for each lane. What is at their
    /// other ends is a [`TcpDestination::from_streams`](crate::TcpDestination::from_streams), or gives them
    /// to a [`LaneAcceptor`](crate::LaneAcceptor). They are good for one session.
    ///
    /// # Errors
    /// [`Error::Descriptor`] for what is no stream socket.
    pub fn from_streams(streams: impl IntoIterator<Item = impl Into<OwnedFd>>) -> Result<Self, Error> {
        Ok(TcpSource(Streams::Given(streams.into_iter().map(stream::lane).collect::<Result<_, _>>()?)))
    }
}

impl Streams {
    /// A session's streams, which have been let in.
    fn open(&mut self, session: &Session) -> Result<Vec<Channel>, Error> {
        let Session { token, secret, timeout, .. } = *session;
        match self {
            Streams::Connect(way) => {
                let open = |lane| opening::insist(|| way.open(lane, session, |_| {}));
                if !way.protection.is_some() {
                    return (0..way.streams).map(open).collect();
                }
                let mut opened = Vec::new();
                for first in (0..way.streams).step_by(LANES_AT_ONCE.into()) {
                    let lanes = first..way.streams.min(first + LANES_AT_ONCE);
                    thread::scope(|scope| -> Result<(), Error> {
                        let opening: Vec<_> = lanes.map(|lane| scope.spawn(move || open(lane))).collect();
                        for lane in opening {
                            opened.push(lane.join().unwrap_or_else(|panic| resume_unwind(panic))?);
                        }
                        Ok(())
                    })?;
                }
                Ok(opened)
            }
            Streams::Given(sockets) => {
                let sockets = std::mem::take(sockets);
                let count = sockets.len() as u16;
                let open = |(lane, socket)| {
                    stream::prepare(&socket, timeout).map_err(Error::Descriptor)?;
                    let mut channel = Channel::Clear(socket.into());
                    let preamble = Preamble::data(token, lane, count);
                    stream::call(&mut channel, PEER, preamble, timeout)?;
                    opening::prove(&mut channel, PEER, &preamble, &secret, timeout)?;
                    Ok(channel)
                };
                (0..count).zip(sockets).map(open).collect()
            }
        }
    }
}

impl SourceTransport for TcpSource {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn connect(&mut self, session: &Session, _offer: &[u8]) -> Result<Box<dyn SourcePlane>, PlaneError> {
        let broken = |source| PlaneError::Io { what: "preparing a data connection", source };
        let streams = self.0.open(session).map_err(not_opened)?;
        if streams.is_empty() {
            return Err(PlaneError::Unavailable("no streams are left: they serve one session".into()));
        }
        let handles = streams.iter().map(|channel| channel.socket().clone()).collect();
        let interrupter = Arc::new(Interrupter { streams: Mutex::new(handles), ..Interrupter::default() });
        let mut lanes: Vec<Box<dyn Lane>> = Vec::new();
        for (lane, channel) in (0..).zip(streams) {
            prepare(&channel, session.timeout).map_err(broken)?;
            let renewal = match &self.0 {
                Streams::Connect(way) if channel.peer().is_some() => {
                    Some(Renewal { way: Arc::clone(way), session: session.clone(), lane })
                }
                _ => None,
            };
            lanes.push(Box::new(TcpLane {
                renewal,
                records: 0,
                stats: LaneStats::encrypted(channel.encryption()),
                channel,
                ram: Arc::clone(&session.ram),
                timeout: session.timeout,
                head: Vec::with_capacity(UNIT * (MAX_FRAME_EXTENTS + 1)),
                interrupter: Arc::clone(&interrupter),
            }));
        }
        Ok(Box::new(TcpPlane { lanes, interrupter }))
    }
}

/// Prepares a lane's channel that is open.
fn prepare(channel: &Channel, timeout: Duration) -> io::Result<()> {
    pacing::stop_if_near(channel.socket());
    channel.set_read_timeout(Some(timeout))
}

/// Why there is no lane.
fn not_opened(error: Error) -> PlaneError {
    match error {
        Error::Silent { waited, .. } => PlaneError::Timeout(waited),
        error => PlaneError::Unavailable(error.to_string()),
    }
}

/// Stops all lanes of a plane.
#[derive(Default)]
struct Interrupter {
    interrupted: AtomicBool,
    /// Of each lane the one that it has now.
    streams: Mutex<Vec<SharedSocket>>,
}

impl Interrupter {
    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Acquire)
    }

    /// A lane's next stream.
    fn replace(&self, lane: u16, stream: &SharedSocket) {
        if let Some(place) = lock(&self.streams).get_mut(usize::from(lane)) {
            *place = stream.clone();
        }
        // Either this is seen here, or the stream there.
        if self.interrupted() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Interrupt for Interrupter {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
        for stream in lock(&self.streams).iter() {
            // Fails only for a connection that is down already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

struct TcpPlane {
    lanes: Vec<Box<dyn Lane>>,
    interrupter: Arc<Interrupter>,
}

impl SourcePlane for TcpPlane {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn lanes(&mut self) -> &mut Vec<Box<dyn Lane>> {
        &mut self.lanes
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.interrupter) as Arc<dyn Interrupt>
    }

    /// The destination writes files, and each best by one stream at a time.
    fn spreads(&self) -> bool {
        true
    }
}

struct TcpLane {
    channel: Channel,
    ram: Arc<Ram>,
    timeout: Duration,
    /// Header and table of the frame that is being sent.
    head: Vec<u8>,
    stats: LaneStats,
    interrupter: Arc<Interrupter>,
    /// If its keys are good for a time only.
    renewal: Option<Renewal>,
    /// Records that this connection has sent, or more.
    records: u64,
}

/// What a lane needs to begin anew.
struct Renewal {
    way: Arc<Way>,
    session: Session,
    lane: u16,
}

/// Bytes of the largest record of TLS.
const RECORD_BYTES: u64 = 16 << 10;

/// The barrier behind which a connection ends. No round has this number, and nobody would mind.
const LAST_BARRIER: u32 = u32::MAX;

impl TcpLane {
    /// Begins anew if the keys have encrypted enough.
    fn renew_in_time(&mut self) -> Result<(), PlaneError> {
        let due = |renewal: &Renewal| self.records >= renewal.way.protection.records_per_key();
        if self.renewal.as_ref().is_some_and(due) { self.renew() } else { Ok(()) }
    }

    fn renew(&mut self) -> Result<(), PlaneError> {
        self.post_barrier(LAST_BARRIER)?;
        self.wait_barrier(LAST_BARRIER)?;
        let ended = self.channel.socket().shutdown(Shutdown::Write).and_then(|()| {
            // The destination ends it as well, once it would let the lane in again.
            match self.read_patiently(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
                Err(error) => Err(error),
                Ok(()) => Err(io::ErrorKind::InvalidData.into()),
            }
        });
        ended.map_err(|error| self.error("ending a connection whose keys have done their part", error))?;
        let Some(Renewal { way, session, lane }) = &self.renewal else { return Ok(()) };
        let known = |stream: &SharedSocket| self.interrupter.replace(*lane, stream);
        let opened = opening::insist(|| way.open(*lane, session, known));
        let channel = opened.map_err(|error| {
            if self.interrupter.interrupted() { PlaneError::Interrupted } else { not_opened(error) }
        })?;
        prepare(&channel, self.timeout).map_err(|error| self.error("preparing a data connection", error))?;
        self.stats.encryption = channel.encryption();
        self.channel = channel;
        self.records = 0;
        Ok(())
    }

    fn error(&self, what: &'static str, source: io::Error) -> PlaneError {
        if self.interrupter.interrupted() {
            return PlaneError::Interrupted;
        }
        cause::of(self.channel.socket(), what, source, self.timeout)
    }

    /// Reads the destination's answer, which comes once it has everything that was sent before. The socket
    /// may hold megabytes of that, so on a slow line the answer may take long. A peer counts as silent only
    /// if it accepts nothing during the time that the stream waits.
    fn read_patiently(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut unconfirmed = self.unconfirmed()?;
        let mut read = 0;
        while read < bytes.len() {
            match self.channel.read(&mut bytes[read..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => read += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    let left = self.unconfirmed()?;
                    if left >= unconfirmed {
                        return Err(e);
                    }
                    unconfirmed = left;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Bytes that the peer's kernel has not confirmed.
    fn unconfirmed(&self) -> io::Result<u32> {
        cause::unconfirmed(self.channel.socket())
    }

    fn check(&self, extents: &[Extent]) -> Result<(), PlaneError> {
        for extent in extents {
            self.ram.check(extent)?;
            if !frame::fits(extent) {
                return Err(PlaneError::Protocol(format!("{extent:?} is not made of whole pages")));
            }
        }
        Ok(())
    }

    fn fill_head(&mut self, kind: Kind, extents: &[Extent], round: u32) {
        self.head.clear();
        self.head.extend_from_slice(&Header { kind, extents: extents.len() as u32, round }.encode());
        extents.iter().for_each(|extent| frame::put_extent(&mut self.head, extent));
        self.stats.requests += 1;
        // A record ends where an extent does. Some kernels also end one after each 64 KiB of a file; there is
        // room for that below the limit.
        let content = if kind == Kind::Write { extents } else { &[] };
        self.records += 1 + content.iter().map(|extent| 2 + extent.len / RECORD_BYTES).sum::<u64>();
    }

    /// Sends the head and then the extents' content.
    fn send_payload(&mut self, extents: &[Extent]) -> io::Result<()> {
        match &mut self.channel {
            Channel::Clear(socket) => send_through(socket, &self.head, &self.ram, extents),
            Channel::Protected(protected) if protected.in_kernel() => {
                send_through(protected.socket(), &self.head, &self.ram, extents)?;
                check_open(protected.socket())
            }
            Channel::Protected(protected) => {
                send_protected(protected.as_mut(), &self.head, &self.ram, extents)
            }
        }
    }
}

/// Through a socket, to which the content goes as it is. Copies nothing of large extents.
fn send_through(stream: &Socket, head: &[u8], ram: &Ram, extents: &[Extent]) -> io::Result<()> {
    let mut batch = Batch::new(stream);
    batch.add(head.as_ptr(), head.len(), true)?;
    for (index, extent) in extents.iter().enumerate() {
        let more = index + 1 < extents.len();
        // `check` has passed all extents.
        let Ok(region) = ram.check(extent) else { continue };
        let address = region.address().wrapping_add(extent.offset as usize);
        if extent.len < MIN_SENDFILE_BYTES || region.backing_page() > PAGE_SIZE {
            batch.add(address, extent.len as usize, more)?;
        } else {
            batch.flush(true)?;
            for piece in region.pieces(extent.offset, extent.len) {
                send_file(stream, piece.fd, piece.offset, piece.len)?;
            }
        }
    }
    batch.flush(false)
}

/// Encrypts straight from guest memory.
fn send_protected(channel: &mut dyn Protected, head: &[u8], ram: &Ram, extents: &[Extent]) -> io::Result<()> {
    channel.write_all(head)?;
    for extent in extents {
        // `check` has passed all extents.
        let Ok(address) = ram.address(extent) else { continue };
        // SAFETY: the extent lies inside a mapping that `ram` keeps alive across the call, and no thread of
        // this process writes to it through a reference. The guest may, from outside of this program: whoever
        // encrypts copies each byte into a record of its own before it looks at any, as the kernel does in
        // `sendmsg`, so that a page which changes meanwhile is torn, which the contract allows.
        let content = unsafe { std::slice::from_raw_parts(address, extent.len as usize) };
        channel.write_all(content)?;
    }
    channel.flush()
}

impl Lane for TcpLane {
    fn write(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        for some in extents.chunks(MAX_FRAME_EXTENTS) {
            self.renew_in_time()?;
            self.fill_head(Kind::Write, some, 0);
            self.send_payload(some).map_err(|e| self.error("sending memory", e))?;
            self.stats.bytes += some.iter().map(|e| e.len).sum::<u64>();
        }
        Ok(())
    }

    fn zero(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        for some in extents.chunks(MAX_FRAME_EXTENTS) {
            self.renew_in_time()?;
            self.fill_head(Kind::Zero, some, 0);
            self.send_payload(&[]).map_err(|e| self.error("naming zero pages", e))?;
            self.stats.zero_bytes += some.iter().map(|e| e.len).sum::<u64>();
        }
        Ok(())
    }

    fn post_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        self.fill_head(Kind::Barrier, &[], round);
        self.send_payload(&[]).map_err(|e| self.error("sending a barrier", e))
    }

    fn wait_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        let mut bytes = [0; UNIT];
        let read = self.read_patiently(&mut bytes);
        read.map_err(|e| self.error("waiting for a barrier's confirmation", e))?;
        match Header::decode(&bytes) {
            Ok(Header { kind: Kind::Barrier, round: confirmed, .. }) if confirmed == round => Ok(()),
            other => Err(PlaneError::Protocol(format!("barrier {round} was answered with {other:?}"))),
        }
    }

    fn stats(&self) -> LaneStats {
        self.stats.clone()
    }
}

/// Collects buffers for one `sendmsg`.
struct Batch<'a> {
    stream: &'a Socket,
    iovecs: [libc::iovec; MAX_IOVECS],
    filled: usize,
}

impl<'a> Batch<'a> {
    fn new(stream: &'a Socket) -> Self {
        Batch { stream, iovecs: [iovec::EMPTY; MAX_IOVECS], filled: 0 }
    }

    /// Adds a buffer, which must stay readable until the next flush; `more`: others follow.
    fn add(&mut self, address: *const u8, len: usize, more: bool) -> io::Result<()> {
        self.iovecs[self.filled] = libc::iovec { iov_base: address.cast_mut().cast(), iov_len: len };
        self.filled += 1;
        if self.filled == MAX_IOVECS { self.flush(more) } else { Ok(()) }
    }

    /// Sends what was added; with `more` the last segment waits for what follows.
    fn flush(&mut self, more: bool) -> io::Result<()> {
        let flags = libc::MSG_NOSIGNAL | if more { libc::MSG_MORE } else { 0 };
        let mut first = 0;
        while first < self.filled {
            // SAFETY: an all-zero msghdr is a valid empty one.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = self.iovecs[first..].as_mut_ptr();
            message.msg_iovlen = self.filled - first;
            // SAFETY: the iovecs from `first` to `filled` describe the frame's head, which the lane
            // owns, and guest memory inside checked regions; both outlive the call. The kernel
            // only reads them, and racing guest writes are the contract's own.
            let sent = unsafe { libc::sendmsg(self.stream.as_raw_fd(), &message, flags) };
            if sent < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            first = iovec::advance(&mut self.iovecs, first, self.filled, sent as usize);
        }
        self.filled = 0;
        Ok(())
    }
}

/// Whether a connection is still there. Linux 6.1 takes what it is to encrypt without an error after the peer
/// has gone, and drops it.
fn check_open(socket: &Socket) -> io::Result<()> {
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one entry, which lives across the call.
    let result = unsafe { libc::poll(&mut polled, 1, 0) };
    let gone = result > 0 && polled.revents & (libc::POLLHUP | libc::POLLERR) != 0;
    if gone { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
}

fn send_file(stream: &Socket, file: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let mut at = offset as libc::off_t;
    let end = at + len as libc::off_t;
    while at < end {
        // SAFETY: `at` is a local that the kernel advances; no other memory is involved.
        let sent = unsafe { libc::sendfile(stream.as_raw_fd(), file, &mut at, (end - at) as usize) };
        match sent {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n if n < 0 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::conformance::bed::ram_of;
    use socket2::SockRef;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    const PATIENCE: Duration = Duration::from_secs(1);

    /// Bytes that are on their way when the barrier is waited for.
    const BYTES: usize = 2 << 20;

    /// A lane with a long queue to a peer that takes a few KiB at a time, until it has taken `takes` bytes.
    fn lane_to_slow_peer(takes: usize) -> (TcpLane, thread::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // What the peer's kernel takes for it is little, too.
        SockRef::from(&listener).set_recv_buffer_size(64 << 10).unwrap();
        let stream = Socket::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        stream.set_send_buffer_size(4 * BYTES).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let peer = thread::spawn(move || {
            let mut some = [0; 64 << 10];
            let mut taken = 0;
            while taken < takes {
                taken += peer.read(&mut some).unwrap();
                thread::sleep(Duration::from_millis(100));
            }
            if takes == BYTES {
                let barrier = Header { kind: Kind::Barrier, extents: 0, round: 7 };
                peer.write_all(&barrier.encode()).unwrap();
            }
            // Open until the other side closes.
            while peer.read(&mut some).is_ok_and(|count| count > 0) {
                thread::sleep(4 * PATIENCE);
            }
        });
        let lane = TcpLane {
            channel: Channel::Clear(stream.into()),
            ram: ram_of(&[256]),
            timeout: PATIENCE,
            head: Vec::new(),
            stats: LaneStats::default(),
            interrupter: Arc::default(),
            renewal: None,
            records: 0,
        };
        (lane, peer)
    }

    #[test]
    fn a_peer_that_is_slow_is_not_silent() {
        let (mut lane, peer) = lane_to_slow_peer(BYTES);
        lane.channel.write_all(&vec![0; BYTES]).unwrap();
        lane.wait_barrier(7).unwrap();
        drop(lane);
        peer.join().unwrap();
    }

    #[test]
    fn a_peer_that_takes_nothing_is_silent() {
        let (mut lane, _peer) = lane_to_slow_peer(BYTES / 8);
        lane.channel.write_all(&vec![0; BYTES]).unwrap();
        let error = lane.wait_barrier(7).unwrap_err();
        assert!(matches!(error, PlaneError::Stalled { patience: PATIENCE, .. }), "{error}");
    }

    /// What a lane says that writes until it cannot, to a peer of which `fate` has decided.
    fn writes_to(fate: impl FnOnce(TcpStream)) -> PlaneError {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = Socket::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        stream::prepare(&stream, PATIENCE).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let ram = ram_of(&[256]);
        let mut lane = TcpLane {
            channel: Channel::Clear(stream.into()),
            ram,
            timeout: PATIENCE,
            head: Vec::new(),
            stats: LaneStats::default(),
            interrupter: Arc::default(),
            renewal: None,
            records: 0,
        };
        let all = [Extent { region: 0, offset: 0, len: 256 * PAGE_SIZE }];
        lane.write(&all).unwrap();
        fate(peer);
        loop {
            if let Err(error) = lane.write(&all) {
                return error;
            }
        }
    }

    #[test]
    fn a_peer_that_ends_is_told_from_one_that_stands_still() {
        let ended = writes_to(drop);
        assert!(matches!(ended, PlaneError::Closed(_) | PlaneError::Reset(_)), "{ended}");
        let mut kept = None;
        let stopped = writes_to(|peer| kept = Some(peer));
        assert!(matches!(stopped, PlaneError::Stalled { .. }), "{stopped}");
    }
}
