//! Sockets as every connection here wants them.

use crate::Error;
use migration::preamble::{LEN, Preamble, Status};
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// No Nagle: a message that waits for another's acknowledgement costs 40 ms of blackout. Keep-alive
/// and user time-out: a peer whose network went away is noticed after `silence`, not after hours.
pub fn prepare(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let interval = (silence / 3).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new().with_time(interval).with_interval(interval).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(silence))?;
    stream.set_write_timeout(Some(silence))
}

/// Connects, sends `preamble` and reads the answer, each within `patience`.
pub fn connect(to: SocketAddr, preamble: Preamble, patience: Duration) -> Result<TcpStream, Error> {
    let failed = |source| Error::Connect { to, source };
    let mut stream = TcpStream::connect_timeout(&to, patience).map_err(failed)?;
    prepare(&stream, patience).map_err(failed)?;
    stream.set_read_timeout(Some(patience)).map_err(failed)?;
    stream.write_all(&preamble.encode()).map_err(failed)?;
    let mut answer = [0; LEN];
    stream.read_exact(&mut answer).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Silent { to, waited: patience },
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Error::HungUp { to },
        _ => failed(error),
    })?;
    match Preamble::decode(&answer).map_err(|why| Error::Preamble { to, why })?.status {
        Status::Ok => Ok(stream),
        Status::Busy => Err(Error::Busy { to }),
        Status::Session => Err(Error::Session { to }),
        // Its version is ours, or decoding would have failed: it misread us.
        Status::Version => Err(Error::Preamble { to, why: migration::preamble::PreambleError::Malformed }),
    }
}
