//! The source's streams: how they are opened, and how they are stopped.

mod lane;
mod send;

use self::lane::{Renewal, TcpLane};
use crate::channel::{Channel, Peer, Protection, SharedSocket};
use crate::opening::{self, Caller};
use crate::plane::lock;
use crate::stream::{self, PEER, Stream};
use crate::{Error, pacing};
use migration::preamble::Preamble;
use migration::transport::{Interrupt, Lane, PlaneError, Session, SourcePlane, SourceTransport};
use socket2::Socket;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
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
            lanes.push(Box::new(TcpLane::new(channel, session, renewal, &interrupter)));
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
