//! One port for everything.
//!
//! Each accepted connection gets a short-lived thread that reads its preamble, so that a caller who
//! says nothing delays nobody else; their number and their patience are bounded. A control connection
//! becomes the session, if there is none; a data connection goes to the plane of its token.

use crate::destination::Plane;
use crate::link::Connection;
use crate::{Error, socket};
use migration::link::{ControlLink, LinkError};
use migration::preamble::{Kind, LEN, Preamble, PreambleError, Status};
use migration::transport::Token;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Most connections whose preamble is awaited at once; more are closed.
const MAX_PENDING: usize = 64;

/// How long a caller may take for its preamble.
const PREAMBLE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a peer's network may be gone before its connections count as lost.
const SILENCE: Duration = Duration::from_secs(20);

/// A listening port.
pub struct Listener {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// A session is under way, or waits to be taken.
    busy: bool,
    waiting: Option<Call>,
    planes: HashMap<Token, Arc<Plane>>,
    failed: Option<io::Error>,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    pending: AtomicUsize,
    closed: AtomicBool,
}

/// A session's control link, accepted. Dropping it lets the next caller in.
pub struct Call {
    connection: Connection,
    shared: Arc<Shared>,
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

impl Drop for Call {
    fn drop(&mut self) {
        self.shared.lock().busy = false;
    }
}

impl Listener {
    /// Listens on `address`; port 0 chooses a free one.
    ///
    /// # Errors
    /// [`Error::Bind`].
    pub fn bind(address: SocketAddr) -> Result<Self, Error> {
        let failed = |source| Error::Bind { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
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
        let idle = |state: &mut State| state.waiting.is_none() && state.failed.is_none();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), wait, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        match state.failed.take() {
            Some(error) => Err(Error::Stopped(error)),
            None => Ok(state.waiting.take()),
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
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
        // A call takes the lock when it is dropped: it must leave the lock's reach first.
        let waiting = self.shared.lock().waiting.take();
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
        if self.pending.fetch_add(1, Ordering::Relaxed) >= MAX_PENDING {
            return;
        }
        let shared = Arc::clone(self);
        // Without a thread the connection is closed, as if there were too many.
        let _ = thread::Builder::new().name("preamble".into()).spawn(move || {
            let _pending = pending;
            // A caller that breaks off or talks nonsense is no event for us: it was told, if it listens.
            let _ = shared.admit(stream, peer);
        });
    }

    /// Reads a connection's preamble and gives it to whom it is for.
    fn admit(self: &Arc<Self>, mut stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        socket::prepare(&stream, SILENCE)?;
        let Some(bytes) = read_preamble(&mut stream)? else { return Ok(()) };
        let preamble = match Preamble::decode(&bytes) {
            Ok(preamble) => preamble,
            Err(PreambleError::Version { .. }) => {
                return stream.write_all(&Preamble::version_mismatch().encode());
            }
            Err(PreambleError::Magic | PreambleError::Malformed) => return Ok(()),
        };
        match preamble.kind {
            Kind::Control => {
                let mut state = self.lock();
                let status = if state.busy { Status::Busy } else { Status::Ok };
                state.busy = true;
                drop(state);
                let answered = stream.write_all(&preamble.answer(status).encode());
                if status == Status::Busy {
                    return answered;
                }
                let connection = Connection::new(preamble.token, stream, peer);
                // If the answer failed, dropping the call lets the next caller in.
                let call = Call { connection, shared: Arc::clone(self) };
                answered?;
                self.lock().waiting = Some(call);
                self.changed.notify_all();
                Ok(())
            }
            Kind::Data => {
                let plane = self.lock().planes.get(&preamble.token).cloned();
                match plane {
                    Some(plane) => plane.join(stream, preamble),
                    None => stream.write_all(&preamble.answer(Status::Session).encode()),
                }
            }
        }
    }

    pub(crate) fn register(&self, token: Token, plane: Arc<Plane>) -> bool {
        self.lock().planes.insert(token, plane).is_none()
    }

    pub(crate) fn unregister(&self, token: Token) {
        self.lock().planes.remove(&token);
    }
}

/// The preamble, or `None` if the caller did not manage to send one in time.
fn read_preamble(stream: &mut TcpStream) -> io::Result<Option<[u8; LEN]>> {
    let deadline = std::time::Instant::now() + PREAMBLE_PATIENCE;
    let mut bytes = [0; LEN];
    let mut filled = 0;
    while filled < LEN {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Ok(None),
            Ok(n) => filled += n,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Some(bytes))
}
