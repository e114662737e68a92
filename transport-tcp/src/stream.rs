//! Streams as every connection here wants them, and the preambles that are exchanged on them.

use crate::Error;
use crate::channel::SharedSocket;
use migration::preamble::{LEN, Preamble, PreambleError, Status};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a caller may take until it has proved to belong to a session: for its preamble, for TLS and for
/// the proof together.
pub const MAX_OPENING: Duration = Duration::from_secs(5);

/// How long a caller's network may be gone before the connection counts as lost.
pub const MAX_SILENCE: Duration = Duration::from_secs(20);

/// What the other end is called where it has no address.
pub const PEER: &str = "the other end of the stream";

/// A stream of bytes that can carry a control link: ordered, reliable, in both directions.
pub trait Stream: Read + Write + Send {
    /// How long a read may wait, after which it returns [`io::ErrorKind::WouldBlock`] or
    /// [`io::ErrorKind::TimedOut`]; `None` for ever, and never zero.
    ///
    /// # Errors
    /// When the stream has no such thing.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// The same for a write.
    ///
    /// # Errors
    /// When the stream has no such thing.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
}

macro_rules! impl_stream {
    ($($stream:ty)*) => {$(
        impl Stream for $stream {
            fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                <$stream>::set_read_timeout(self, timeout)
            }

            fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                <$stream>::set_write_timeout(self, timeout)
            }
        }
    )*};
}

impl_stream! { TcpStream UnixStream Socket }

/// Prepares a socket. A write waits at most `silence`. For TCP it also switches Nagle's algorithm off,
/// because a message that waits for another's acknowledgement costs 40 ms of blackout, and sets keep-alive
/// and the user time-out, so that a peer whose network has gone is noticed after `silence`, not after hours.
pub fn prepare(socket: &Socket, silence: Duration) -> io::Result<()> {
    if socket.protocol()? == Some(Protocol::TCP) {
        socket.set_tcp_nodelay(true)?;
        let interval = (silence / 3).max(Duration::from_secs(1));
        let keepalive = TcpKeepalive::new().with_time(interval).with_interval(interval).with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(silence))?;
    }
    socket.set_write_timeout(Some(silence))
}

/// A lane's socket, from a descriptor that came from elsewhere.
pub fn lane(descriptor: impl Into<OwnedFd>) -> Result<Socket, Error> {
    let socket = Socket::from(descriptor.into());
    let checked = socket.r#type().and_then(|kind| match kind {
        Type::STREAM => Ok(()),
        other => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is of type {other:?}"))),
    });
    checked
        .and_then(|()| socket.set_nonblocking(false))
        .and_then(|()| prepare(&socket, MAX_SILENCE))
        .map_err(Error::Descriptor)?;
    Ok(socket)
}

/// Connects within `patience`. Who is to shut the socket down is told of it `before`.
pub fn connect(
    to: SocketAddr,
    patience: Duration,
    before: impl FnOnce(&SharedSocket),
) -> Result<SharedSocket, Error> {
    let failed = |source| Error::Connect { to: to.to_string(), source };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).map_err(failed)?;
    let socket = SharedSocket::from(socket);
    before(&socket);
    socket.connect_timeout(&to.into(), patience).map_err(failed)?;
    prepare(&socket, patience).map_err(failed)?;
    Ok(socket)
}

/// Sends `preamble` to `to` and has it answered within `patience`.
pub fn call(stream: &mut impl Stream, to: &str, preamble: Preamble, patience: Duration) -> Result<(), Error> {
    let mut answer = [0; LEN];
    let deadline = Instant::now() + patience;
    let sent = stream.write_all(&preamble.encode());
    sent.and_then(|()| read_by(stream, &mut answer, Some(deadline)))
        .map_err(|error| unanswered(to, error, patience))?;
    judge(to, &answer)
}

/// What it means that `to` did not answer within `patience`.
pub fn unanswered(to: &str, error: io::Error, patience: Duration) -> Error {
    let to = to.to_owned();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Silent { to, waited: patience },
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            Error::HungUp { to }
        }
        _ => Error::refused_by(&error, &to).unwrap_or(Error::Connect { to, source: error }),
    }
}

/// What `to` has answered.
pub fn judge(to: &str, answer: &[u8; LEN]) -> Result<(), Error> {
    let to = || to.to_owned();
    match Preamble::decode(answer).map_err(|why| Error::Preamble { to: to(), why })?.status {
        Status::Ok => Ok(()),
        Status::Busy => Err(Error::Busy { to: to() }),
        Status::Session => Err(Error::Session { to: to() }),
        Status::Encrypted => Err(Error::WantsEncryption { to: to() }),
        Status::Clear => Err(Error::CannotEncrypt { to: to() }),
        Status::Denied => Err(Error::Denied { to: to() }),
        // Its version is ours, or decoding would have failed: it misread us.
        Status::Version => Err(Error::Preamble { to: to(), why: PreambleError::Malformed }),
    }
}

/// The preamble that the connecting end sends before the deadline; `None`: whenever it does. One of another
/// version is told so.
pub fn hear(stream: &mut impl Stream, deadline: Option<Instant>) -> Result<Preamble, Error> {
    let mut bytes = [0; LEN];
    read_by(stream, &mut bytes, deadline).map_err(Error::NoPreamble)?;
    Preamble::decode(&bytes).map_err(|why| {
        if matches!(why, PreambleError::Version { .. }) {
            // If it does not listen to the answer, it need not be told.
            let _ = stream.write_all(&Preamble::version_mismatch().encode());
        }
        Error::Preamble { to: PEER.into(), why }
    })
}

/// Fills `bytes` before the deadline, if there is one.
pub fn read_by(stream: &mut impl Stream, bytes: &mut [u8], deadline: Option<Instant>) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(left)?;
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            // The deadline decides.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
