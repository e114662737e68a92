//! One port for several processes.
//!
//! A [`Dispatcher`] accepts connections and looks at what each is for, of which it takes nothing: the
//! preamble stays in the socket, and whoever the socket is handed to opens the connection as if it had
//! accepted it itself ([`Listener::fed`](crate::Listener::fed)). The number of callers that have not been
//! handed on is bounded, and so is their time (`pending`).

use crate::Error;
use crate::accepting::Accepting;
use crate::channel::SharedSocket;
use crate::opening;
use crate::pending::{Pending, Place};
use crate::refusals::{Refusals, Refused};
use crate::stream::{self, MAX_OPENING};
use migration::preamble::{LEN, Preamble, PreambleError, Status};
use socket2::Socket;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How often a caller that has said a part of its preamble is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// A listening port whose connections are handed on.
pub struct Dispatcher {
    accepting: Accepting,
    refusals: Arc<Refusals>,
}

/// A caller that has said what it wants. Dropping it hangs up, unless another process has the socket as well.
pub struct Caller {
    socket: SharedSocket,
    preamble: Preamble,
    peer: SocketAddr,
    place: Place,
    refusals: Arc<Refusals>,
}

impl AsFd for Caller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Caller {
    /// What it wants.
    pub fn preamble(&self) -> &Preamble {
        &self.preamble
    }

    /// Who it is.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// It is about to be handed on. Whether it is still there, and has not lost its place to another; its
    /// connection is down then.
    pub fn leave(&self) -> bool {
        self.place.leave()
    }

    /// Nobody is there for it: says so, and hangs up.
    pub fn refuse(mut self, status: Status, why: &str) {
        self.refusals.tell(self.peer, why);
        // If it does not listen to the answer, it need not be told.
        let _ = opening::answer(&mut self.socket, &self.preamble, status);
    }
}

impl Dispatcher {
    /// Gives each caller to `take`, in a thread of its own. What takes long there costs the caller its place
    /// if many others call.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the socket does not listen, or there can be no further thread.
    pub fn start(
        listener: TcpListener,
        take: impl Fn(Caller) + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let refusals = Arc::<Refusals>::default();
        let (pending, take, told) = (Arc::<Pending>::default(), Arc::new(take), Arc::clone(&refusals));
        let accepting = Accepting::start(listener, move |accepted| {
            let Ok((stream, peer)) = accepted else { return };
            let socket = SharedSocket::from(Socket::from(stream));
            let Some(place) = pending.enter(peer.ip(), &socket) else {
                return told.tell(peer, "too many callers have not yet been handed on");
            };
            let (take, refusals) = (Arc::clone(&take), Arc::clone(&told));
            // Without a thread the connection is closed, as if there were too many.
            let _ = thread::Builder::new().name("dispatch".into()).spawn(move || match look(&socket) {
                Ok(preamble) => take(Caller { socket, preamble, peer, place, refusals }),
                Err(why) => refusals.tell(peer, why),
            });
        });
        Ok(Dispatcher { accepting: accepting.map_err(Error::Stopped)?, refusals })
    }

    /// The address, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.accepting.address()
    }

    /// Calls `callback` when a caller is not handed on, as
    /// [`Listener::on_refused`](crate::Listener::on_refused) does.
    pub fn on_refused(&self, callback: impl Fn(&Refused) + Send + 'static) {
        self.refusals.tell_to(callback);
    }
}

/// The caller's preamble, which stays in the socket. One of another version is told so.
fn look(socket: &SharedSocket) -> Result<Preamble, Error> {
    let stream = || socket.try_clone().map(TcpStream::from);
    let deadline = Instant::now() + MAX_OPENING;
    let bytes = stream().and_then(|stream| peek(&stream, deadline)).map_err(Error::NoPreamble)?;
    Preamble::decode(&bytes).map_err(|why| {
        if matches!(why, PreambleError::Version { .. }) {
            let _ = socket.clone().write_all(&Preamble::version_mismatch().encode());
        }
        Error::Preamble { to: stream::PEER.into(), why }
    })
}

/// The first bytes that can be read, all of them before the deadline.
fn peek(stream: &TcpStream, deadline: Instant) -> io::Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.peek(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(LEN) => return Ok(bytes),
            // What is there does not go away: a wait for more would not wait.
            Ok(_) => thread::sleep(LOOK),
            // The deadline decides.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
