//! One port for everything.
//!
//! Each accepted connection gets a short-lived thread that opens it (see `opening`), so that a silent caller
//! delays nobody else. The number of these threads, and how long they wait, are bounded (`pending`). A
//! control connection becomes a session if there is room for one more, after it has been opened: a caller
//! that has not shown who it is cannot keep others out. A data connection goes to the session of its token.

use crate::Error;
use crate::accepting::Accepting;
use crate::acceptor::LaneAcceptor;
use crate::channel::{Channel, Peer, Protection, SharedSocket};
use crate::link::Connection;
use crate::opening;
use crate::pending::{Pending, Place};
use crate::refusals::{Refusals, Refused};
use crate::stream::{self, MAX_OPENING, MAX_SILENCE};
use migration::link::{ControlLink, LinkError};
use migration::preamble::{Kind, Preamble, Status};
use migration::transport::{Secret, Token};
use socket2::Socket;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A listening port.
pub struct Listener {
    /// Ends before what it gives connections to is closed. `None` if others give them.
    accepting: Option<Accepting>,
    shared: Arc<Shared>,
}

/// Gives connections to a listener that accepts none itself. Clones give them to the same one.
#[derive(Clone)]
pub struct Feed(Arc<Shared>);

impl Feed {
    /// Gives it a connection, from which nothing has been read.
    ///
    /// # Errors
    /// When the connection is down already, or is none.
    pub fn give(&self, stream: TcpStream) -> io::Result<()> {
        let peer = stream.peer_addr()?;
        stream.set_nonblocking(false)?;
        if !self.0.closed.load(Ordering::Acquire) {
            self.0.welcome(stream, peer);
        }
        Ok(())
    }
}

#[derive(Default)]
struct State {
    /// Those that are under way and those that wait to be taken, with who has begun them.
    sessions: HashMap<Token, Option<Peer>>,
    waiting: VecDeque<Call>,
    failed: Option<io::Error>,
}

type Protecting = dyn Fn() -> Result<Protection, Error> + Send + Sync;

struct Shared {
    /// How the next connection is protected.
    protecting: Box<Protecting>,
    /// How many may be under way at once.
    max_sessions: usize,
    /// Whether others give it connections. Whoever is one too many is hung up on, and calls again.
    fed: bool,
    lanes: LaneAcceptor,
    state: Mutex<State>,
    changed: Condvar,
    refusals: Refusals,
    pending: Arc<Pending>,
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

    /// Who called, if the connection is protected.
    pub fn identity(&self) -> Option<&Peer> {
        self.connection.identity()
    }
}

impl ControlLink for Call {
    fn token(&self) -> Token {
        self.connection.token()
    }

    fn secret(&self) -> Secret {
        self.connection.secret()
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
        Listener::bind_protected(sessions, address, || Ok(Protection::none()))
    }

    /// The same with connections that are protected as `protecting` says, which is asked for each: what it
    /// has from files is renewed without this listener's noticing. While there is protection nobody is let in
    /// without. An error of it refuses the connection.
    ///
    /// # Errors
    /// [`Error::Bind`].
    pub fn bind_protected(
        sessions: usize,
        address: SocketAddr,
        protecting: impl Fn() -> Result<Protection, Error> + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Bind { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let shared = Shared::new(sessions, false, protecting);
        let welcoming = Arc::clone(&shared);
        let accepting = Accepting::start(listener, move |accepted| match accepted {
            Ok((stream, peer)) => welcoming.welcome(stream, peer),
            Err(error) => {
                welcoming.lock().failed = Some(error);
                welcoming.changed.notify_all();
            }
        });
        Ok(Listener { accepting: Some(accepting.map_err(failed)?), shared })
    }

    /// One that is given its connections by another program, which has accepted them, and takes `sessions` at
    /// once. A caller that is one too many is hung up on before it has an answer: it calls again by itself,
    /// and the other program can give it to somebody else then.
    pub fn fed(
        sessions: usize,
        protecting: impl Fn() -> Result<Protection, Error> + Send + Sync + 'static,
    ) -> (Self, Feed) {
        let shared = Shared::new(sessions, true, protecting);
        (Listener { accepting: None, shared: Arc::clone(&shared) }, Feed(shared))
    }

    /// The address, with the port that was chosen; all zeros for one that is fed.
    pub fn local_addr(&self) -> SocketAddr {
        let none = (Ipv4Addr::UNSPECIFIED, 0).into();
        self.accepting.as_ref().map_or(none, Accepting::address)
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
        self.shared.refusals.tell_to(callback);
    }

    /// Where data connections go. Lanes that were accepted elsewhere can be given to it as well.
    pub fn lanes(&self) -> &LaneAcceptor {
        &self.shared.lanes
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        // Its thread may be giving a connection, which sees that this is closed.
        drop(self.accepting.take());
        // A call takes the lock when it is dropped, so none may be dropped under it.
        let waiting = std::mem::take(&mut self.shared.lock().waiting);
        drop(waiting);
    }
}

impl Shared {
    fn new(
        max_sessions: usize,
        fed: bool,
        protecting: impl Fn() -> Result<Protection, Error> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Shared {
            protecting: Box::new(protecting),
            max_sessions,
            fed,
            lanes: LaneAcceptor::new(),
            state: Mutex::default(),
            changed: Condvar::new(),
            refusals: Refusals::default(),
            pending: Arc::default(),
            closed: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn welcome(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let socket = SharedSocket::from(Socket::from(stream));
        let Some(place) = self.pending.enter(peer.ip(), &socket) else {
            self.refusals.tell(peer, "too many callers have not yet shown who they are");
            return;
        };
        let shared = Arc::clone(self);
        // Without a thread the connection is closed, as if there were too many.
        let _ = thread::Builder::new().name("preamble".into()).spawn(move || {
            // It has been answered, if it listens.
            if let Err(why) = shared.admit(socket, peer, &place)
                // One that is closed refuses nobody.
                && !shared.closed.load(Ordering::Acquire)
            {
                shared.refusals.tell(peer, why);
            }
        });
    }

    /// Opens a connection and gives it to whom it is for. It has to be open soon.
    fn admit(
        self: &Arc<Self>,
        mut socket: SharedSocket,
        peer: SocketAddr,
        place: &Place,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + MAX_OPENING;
        let broken = |source| Error::Connect { to: peer.to_string(), source };
        stream::prepare(&socket, MAX_SILENCE).map_err(broken)?;
        let preamble = stream::hear(&mut socket, Some(deadline))?;
        if preamble.kind == Kind::Data && !self.lanes.knows(preamble.token) {
            // Which sessions there are is no secret.
            opening::answer(&mut socket, &preamble, Status::Session).map_err(broken)?;
            return Err(Error::Stray);
        }
        if preamble.kind == Kind::Control && self.fed && self.is_full() {
            return Ok(());
        }
        let protection = (self.protecting)()?;
        opening::agree(&mut socket, &preamble, &protection)?;
        let channel = match protection.get() {
            Some(protect) if preamble.encrypted => {
                let place = protection.place(preamble.kind);
                Channel::Protected(protect.accept(socket, place, deadline)?)
            }
            _ => Channel::Clear(socket),
        };
        match preamble.kind {
            Kind::Data => self.lane(channel, &preamble, &protection, deadline),
            Kind::Control => self.session(channel, &preamble, peer, place, &protection, deadline),
        }
    }

    /// Opens a control link, and makes a session of it if there is room for one more.
    fn session(
        self: &Arc<Self>,
        mut channel: Channel,
        preamble: &Preamble,
        peer: SocketAddr,
        place: &Place,
        protection: &Protection,
        deadline: Instant,
    ) -> Result<(), Error> {
        let broken = |source| Error::Connect { to: peer.to_string(), source };
        let secret = opening::give_secret(&mut channel, preamble, deadline)?;
        // From here on the caller is known, and nobody takes its place.
        if !place.leave() {
            return Err(Error::HungUp { to: peer.to_string() });
        }
        if let (Some(protect), Some(who)) = (protection.get(), channel.peer())
            && !protect.admits(who)
        {
            opening::answer(&mut channel, preamble, Status::Denied).map_err(broken)?;
            return Err(Error::NotAdmitted { name: who_is(&channel) });
        }
        let slot = self.slot(preamble.token, channel.peer().cloned());
        if slot.is_none() && self.fed {
            return Ok(());
        }
        let status = if slot.is_some() { Status::Ok } else { Status::Busy };
        // If the answer fails, the slot is given back.
        opening::answer(&mut channel, preamble, status).map_err(broken)?;
        match slot {
            None => self.refusals.tell(peer, "this side is busy taking in another guest"),
            Some(slot) => {
                let connection = Connection::accepted(channel, preamble.token, secret, peer);
                self.lock().waiting.push_back(Call { _slot: slot, connection });
                self.changed.notify_all();
            }
        }
        Ok(())
    }

    /// Opens a lane, which has to come from whoever has begun its session. One that is not protected shows by
    /// the session's secret that it does.
    fn lane(
        &self,
        mut channel: Channel,
        preamble: &Preamble,
        protection: &Protection,
        deadline: Instant,
    ) -> Result<(), Error> {
        let owner = self.lock().sessions.get(&preamble.token).cloned().flatten();
        let same = match (&owner, channel.peer()) {
            (Some(owner), Some(peer)) => owner.is(peer),
            // Sessions that were begun elsewhere have no owner here.
            (None, _) => true,
            (Some(_), None) => protection.has_clear_lanes(),
        };
        if !same {
            opening::answer(&mut channel, preamble, Status::Session).map_err(Error::NoPreamble)?;
            return Err(Error::Unproved);
        }
        self.lanes.open(channel, preamble, Some(deadline))
    }

    fn is_full(&self) -> bool {
        self.lock().sessions.len() >= self.max_sessions
    }

    /// A place for one more session, if there is one.
    fn slot(self: &Arc<Self>, token: Token, peer: Option<Peer>) -> Option<Slot> {
        let mut state = self.lock();
        if state.sessions.len() >= self.max_sessions || state.sessions.contains_key(&token) {
            return None;
        }
        state.sessions.insert(token, peer);
        Some(Slot { token, shared: Arc::clone(self) })
    }
}

fn who_is(channel: &Channel) -> String {
    channel.peer().map(|peer| peer.name.clone()).unwrap_or_default()
}
