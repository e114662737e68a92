//! The destination's side of the transport: where a session's streams come from.

use crate::acceptor::LaneAcceptor;
use crate::listener::Listener;
use crate::plane::Plane;
use crate::{Error, stream};
use migration::transport::{DestinationPlane, DestinationTransport, PlaneError, Session};
use socket2::Socket;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Lanes that are accepted by a [`Listener`] or a [`LaneAcceptor`], or that are there already.
pub struct TcpDestination {
    lanes: LaneAcceptor,
    /// Connected before the session was offered.
    streams: Vec<Socket>,
}

impl TcpDestination {
    /// Takes data connections from `listener`, as a rule the one on whose port the control link was accepted.
    pub fn new(listener: &Listener) -> Self {
        TcpDestination::from_acceptor(listener.lanes())
    }

    /// Takes data connections that are handed to `lanes`.
    pub fn from_acceptor(lanes: &LaneAcceptor) -> Self {
        TcpDestination { lanes: lanes.clone(), streams: Vec::new() }
    }

    /// One session's lanes, whose other ends [`TcpSource::from_streams`](crate::TcpSource::from_streams) has:
    /// stream sockets, connected already. They serve the first session that is offered.
    ///
    /// # Errors
    /// [`Error::Descriptor`] for what is no stream socket.
    pub fn from_streams(streams: impl IntoIterator<Item = impl Into<OwnedFd>>) -> Result<Self, Error> {
        let streams = streams.into_iter().map(stream::lane).collect::<Result<_, _>>()?;
        Ok(TcpDestination { lanes: LaneAcceptor::new(), streams })
    }
}

impl DestinationTransport for TcpDestination {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn offer(&mut self, session: &Session) -> Result<(Vec<u8>, Box<dyn DestinationPlane>), PlaneError> {
        let plane = Arc::new(Plane::new(session));
        if !self.lanes.register(session.token, Arc::clone(&plane)) {
            return Err(PlaneError::Unavailable("this session has been offered before".into()));
        }
        let served = Served { plane, lanes: self.lanes.clone() };
        for stream in std::mem::take(&mut self.streams) {
            let expected = served.plane.expect(stream);
            expected.map_err(|source| PlaneError::Io { what: "preparing a lane", source })?;
        }
        // Nothing to tell: the source knows the way, or has the other ends.
        Ok((Vec::new(), Box::new(served)))
    }
}

/// The plane as the engine has it.
struct Served {
    plane: Arc<Plane>,
    lanes: LaneAcceptor,
}

impl DestinationPlane for Served {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn fence(&mut self) -> Result<(), PlaneError> {
        // No new connection from here on.
        self.lanes.unregister(self.plane.token());
        self.plane.fence()
    }

    fn bytes_placed(&self) -> u64 {
        self.plane.bytes_placed()
    }

    fn newly_covered(&self) -> Option<u64> {
        Some(self.plane.newly_covered())
    }

    fn cpu_us(&self) -> u64 {
        self.plane.cpu_us()
    }

    fn error(&self) -> Option<String> {
        self.plane.error()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // A thread's panic has been reported by its own message.
        let _ = self.fence();
    }
}
