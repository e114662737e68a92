//! One port for everything.
//!
//! Each accepted connection gets a short-lived thread that reads its preamble, so that a silent caller delays
//! nobody else. The number of these threads, and how long they wait, are bounded. A control connection
//! becomes a session if there is room for one more. A data connection goes to the session of its token.

use crate::Error;
use crate::acceptor::LaneAcceptor;
use crate::link::Connection;
use crate::stream::{self, MAX_PREAMBLE_WAIT, MAX_SILENCE};
use migration::link::{ControlLink, LinkError};
use migration::preamble::{Kind, Status};
use migration::transport::Token;
use socket2::Socket;
use std::collections::{HashSet, VecDeque};
use std::fmt::Display;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most connections whose preamble is awaited at once; more are closed.
const MAX_PENDING_CONNECTIONS: usize = 64;

/// How often refused callers are told of at most.
const REFUSAL_INTERVAL: Duration = Duration::from_secs(1);

/// A caller that was not let in.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// Who called.
    pub peer: SocketAddr,
    /// What was wrong, for a person.
    pub why: String,
    /// Callers that were refused since the last one that was told of.
    pub untold: u64,
}

type OnRefused = Box<dyn Fn(&Refused) + Send>;

/// Tells of refused callers, though not of each: anybody can call as often as he likes.
#[derive(Default)]
struct Refusals {
    callback: Option<OnRefused>,
    last: Option<Instant>,
    untold: u64,
}

impl Refusals {
    fn tell(&mut self, peer: SocketAddr, why: impl Display) {
        let Some(callback) = &self.callback else { return };
        if self.last.is_some_and(|last| last.elapsed() < REFUSAL_INTERVAL) {
            self.untold += 1;
            return;
        }
        self.last = Some(Instant::now());
        callback(&Refused { peer, why: why.to_string(), untold: std::mem::take(&mut self.untold) });
    }
}

/// A listening port.
pub struct Listener {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// Those that are under way and those that wait to be taken.
    sessions: HashSet<Token>,
    waiting: VecDeque<Call>,
    failed: Option<io::Error>,
}

struct Shared {
    /// How many may be under way at once.
    max_sessions: usize,
    lanes: LaneAcceptor,
    state: Mutex<State>,
    changed: Condvar,
    refusals: Mutex<Refusals>,
    pending: AtomicUsize,
    closed: AtomicBool,
}

/// One of the listener's sessions, for as long as its call lives.
struct Slot {
    token: Token,
    shared: Arc<Shared>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.lock().sessions.remove(&self.token);
    }
}

/// A session's control link, accepted. Dropping it lets the next caller in.
pub struct Call {
    /// Given back before the connection is closed: who sees it closed can call again.
    _slot: Slot,
    connection: Connection,
}

impl Call {
    /// Who called.
    pub fn peer(&self) -> SocketAddr {
        self.connection.peer()
    }

    /// The address that it called, as [`Connection::local`].
    ///
    /// # Errors
    /// When the connection has been reset.
    pub fn local(&self) -> io::Result<SocketAddr> {
        self.connection.local()
    }
}

impl ControlLink for Call {
    fn token(&self) -> Token {
        self.connection.token()
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        self.connection.send(frame)
    }

    fn receive(&mut self, wait: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        self.connection.receive(wait)
    }
}

impl Listener {
    /// Listens on `address` for one session at a time; port 0 chooses a free one.
    ///
    /// # Errors
    /// [`Error::Bind`].
    pub fn bind(address: SocketAddr) -> Result<Self, Error> {
        Listener::bind_for(1, address)
    }

    /// Listens on `address` for up to `sessions` at once. One that calls when there are as many is told that
    /// this side is busy, as is one whose token a session already has.
    ///
    /// # Errors
    /// [`Error::Bind`].
    pub fn bind_for(sessions: usize, address: SocketAddr) -> Result<Self, Error> {
        let failed = |source| Error::Bind { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared {
            max_sessions: sessions,
            lanes: LaneAcceptor::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
            refusals: Mutex::default(),
            pending: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("listen".into())
            .spawn(move || accepting.accept(&listener))
            .map_err(failed)?;
        Ok(Listener { shared, address, thread: Some(thread) })
    }

    /// The address, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The next session's control link; `None` when nobody called for `wait`.
    ///
    /// # Errors
    /// [`Error::Stopped`] when no more connections can be accepted.
    pub fn next_control(&self, wait: Duration) -> Result<Option<Call>, Error> {
        let idle = |state: &mut State| state.waiting.is_empty() && state.failed.is_none();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), wait, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match state.failed.take() {
            Some(error) => Err(Error::Stopped(error)),
            None => Ok(state.waiting.pop_front()),
        }
    }

    /// Calls `callback` when a caller is not let in: one that sends no preamble, that finds this side busy,
    /// or that is one too many. At most once a second; the next call tells how many it left out. It comes
    /// from a thread of the listener's.
    pub fn on_refused(&self, callback: impl Fn(&Refused) + Send + 'static) {
        self.shared.refusals().callback = Some(Box::new(callback));
    }

    /// Where data connections go. Lanes that were accepted elsewhere can be given to it as well.
    pub fn lanes(&self) -> &LaneAcceptor {
        &self.shared.lanes
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        // Wakes the accepting thread; if that fails it has ended already.
        let ip = match self.address.ip() {
            ip if ip.is_unspecified() && ip.is_ipv4() => std::net::Ipv4Addr::LOCALHOST.into(),
            ip if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let woken = TcpStream::connect_timeout(&(ip, self.address.port()).into(), Duration::from_secs(1));
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
        // A call takes the lock when it is dropped, so none may be dropped under it.
        let waiting = std::mem::take(&mut self.shared.lock().waiting);
        drop(waiting);
    }
}

/// Gives its place among the pending connections back.
struct Pending(Arc<Shared>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refusals(&self) -> MutexGuard<'_, Refusals> {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        while !self.closed.load(Ordering::Acquire) {
            match listener.accept() {
                Ok((stream, peer)) => self.welcome(stream, peer),
                // The caller was gone before it was accepted, or we are out of descriptors for now.
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                    thread::sleep(Duration::from_millis(100));
                }
                Err(e) => {
                    self.lock().failed = Some(e);
                    self.changed.notify_all();
                    return;
                }
            }
        }
    }

    fn welcome(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let pending = Pending(Arc::clone(self));
        if self.pending.fetch_add(1, Ordering::Relaxed) >= MAX_PENDING_CONNECTIONS {
            self.refusals().tell(peer, "too many callers have not yet said what they want");
            return;
        }
        let shared = Arc::clone(self);
        // Without a thread the connection is closed, as if there were too many.
        let _ = thread::Builder::new().name("preamble".into()).spawn(move || {
            let _pending = pending;
            // It has been answered, if it listens.
            if let Err(why) = shared.admit(stream, peer)
                // The listener itself calls to wake the accepting thread.
                && !shared.closed.load(Ordering::Acquire)
            {
                shared.refusals().tell(peer, why);
            }
        });
    }

    /// Reads a connection's preamble and gives it to whom it is for.
    fn admit(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) -> Result<(), Error> {
        let broken = |source| Error::Connect { to: peer.to_string(), source };
        let mut socket = Socket::from(stream);
        stream::prepare(&socket, MAX_SILENCE).map_err(broken)?;
        let preamble = stream::hear(&mut socket, Some(MAX_PREAMBLE_WAIT))?;
        match preamble.kind {
            Kind::Data => self.lanes.give(socket, preamble).map_err(broken),
            Kind::Control => {
                let slot = self.slot(preamble.token);
                let status = if slot.is_some() { Status::Ok } else { Status::Busy };
                // If the answer fails, the slot is given back.
                socket.write_all(&preamble.answer(status).encode()).map_err(broken)?;
                if slot.is_none() {
                    self.refusals().tell(peer, "this side is busy taking in another guest");
                }
                if let Some(slot) = slot {
                    let connection = Connection::new(OwnedFd::from(socket).into(), preamble.token, peer);
                    self.lock().waiting.push_back(Call { _slot: slot, connection });
                    self.changed.notify_all();
                }
                Ok(())
            }
        }
    }

    /// A place for one more session, if there is one.
    fn slot(self: &Arc<Self>, token: Token) -> Option<Slot> {
        let mut state = self.lock();
        let room = state.sessions.len() < self.max_sessions && state.sessions.insert(token);
        room.then(|| Slot { token, shared: Arc::clone(self) })
    }
}
