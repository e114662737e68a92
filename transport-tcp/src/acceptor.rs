//! Which session a lane belongs to.

use crate::Error;
use crate::plane::{Plane, lock};
use crate::stream::{self, MAX_PREAMBLE_WAIT};
use migration::preamble::{Preamble, Status};
use migration::transport::Token;
use socket2::Socket;
use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

/// Takes lanes that were accepted elsewhere, and gives each to its session. A
/// [`Listener`](crate::Listener) has one of its own. Clones are the same acceptor.
#[derive(Clone, Default)]
pub struct LaneAcceptor {
    planes: Arc<Mutex<HashMap<Token, Arc<Plane>>>>,
}

impl LaneAcceptor {
    /// An acceptor that knows no session yet.
    pub fn new() -> Self {
        LaneAcceptor::default()
    }

    /// Takes a lane: a connected stream socket of any family, from which nothing has been read. Waits up to
    /// five seconds for the preamble, tells the source when it names no session that is offered, and returns.
    ///
    /// # Errors
    /// [`Error`], when the descriptor is no stream socket, or its peer no source.
    pub fn accept(&self, stream: impl Into<OwnedFd>) -> Result<(), Error> {
        let mut stream = stream::lane(stream)?;
        let preamble = stream::hear(&mut stream, Some(MAX_PREAMBLE_WAIT))?;
        self.give(stream, preamble).map_err(Error::NoPreamble)
    }

    /// Gives a lane that has sent `preamble` to its session.
    pub(crate) fn give(&self, mut stream: Socket, preamble: Preamble) -> io::Result<()> {
        let plane = lock(&self.planes).get(&preamble.token).cloned();
        match plane {
            Some(plane) => plane.join(stream, preamble),
            None => stream.write_all(&preamble.answer(Status::Session).encode()),
        }
    }

    /// Whether there was no such session.
    pub(crate) fn register(&self, token: Token, plane: Arc<Plane>) -> bool {
        lock(&self.planes).insert(token, plane).is_none()
    }

    pub(crate) fn unregister(&self, token: Token) {
        lock(&self.planes).remove(&token);
    }
}
