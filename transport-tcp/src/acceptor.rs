//! Which session a lane belongs to.

use crate::Error;
use crate::channel::{Channel, Protection, SharedSocket};
use crate::opening;
use crate::plane::{Plane, lock};
use crate::stream::{self, MAX_OPENING};
use migration::preamble::{Preamble, Status};
use migration::transport::Token;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

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
    /// five seconds for it to prove that it belongs to a session that is offered, tells the source if it does
    /// not, and returns.
    ///
    /// # Errors
    /// [`Error`], when the descriptor is no stream socket, or its peer no source.
    pub fn accept(&self, stream: impl Into<OwnedFd>) -> Result<(), Error> {
        let mut stream = SharedSocket::from(stream::lane(stream)?);
        let deadline = Instant::now() + MAX_OPENING;
        let preamble = stream::hear(&mut stream, Some(deadline))?;
        if !self.knows(preamble.token) {
            return opening::answer(&mut stream, &preamble, Status::Session).map_err(Error::NoPreamble);
        }
        opening::agree(&mut stream, &preamble, &Protection::none())?;
        self.open(Channel::Clear(stream), &preamble, Some(deadline))
    }

    /// Whether there is such a session.
    pub(crate) fn knows(&self, token: Token) -> bool {
        lock(&self.planes).contains_key(&token)
    }

    /// Has a lane whose `preamble` has been answered prove that it belongs to its session, and gives it to
    /// it.
    pub(crate) fn open(
        &self,
        mut channel: Channel,
        preamble: &Preamble,
        deadline: Option<Instant>,
    ) -> Result<(), Error> {
        let plane = lock(&self.planes).get(&preamble.token).cloned();
        match plane {
            Some(plane) => plane.join(channel, preamble, deadline),
            // It has ended meanwhile.
            None => opening::answer(&mut channel, preamble, Status::Session).map_err(Error::NoPreamble),
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
