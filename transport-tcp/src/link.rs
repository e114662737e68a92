//! The control link: frames of a four-byte length and that many bytes.

use crate::{Error, socket};
use migration::link::{ControlLink, LinkError};
use migration::message::MAX_FRAME;
use migration::preamble::Preamble;
use migration::transport::Token;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Bytes read at a time. The buffer grows with what arrives, not with what is announced.
const STEP: usize = 64 << 10;

/// A control link over TCP.
pub struct Connection {
    token: Token,
    stream: TcpStream,
    peer: SocketAddr,
    arrived: Vec<u8>,
}

/// Connects to the receiver at `to` (`host:port`); each step may take `patience`. A name with several
/// addresses is tried at each in turn.
///
/// # Errors
/// [`Error`] says whether the name, the network or the program there is at fault.
pub fn connect_control(to: &str, token: Token, patience: Duration) -> Result<Connection, Error> {
    let resolve = |why: String| Error::Resolve { to: to.into(), why };
    let addresses = to.to_socket_addrs().map_err(|e| resolve(e.to_string()))?;
    let mut last = resolve("it has no address".into());
    for address in addresses {
        match socket::connect(address, Preamble::control(token), patience) {
            Ok(stream) => return Ok(Connection::new(token, stream, address)),
            Err(error @ Error::Connect { .. }) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

impl Connection {
    pub(crate) fn new(token: Token, stream: TcpStream, peer: SocketAddr) -> Self {
        Connection { token, stream, peer, arrived: Vec::new() }
    }

    /// The other end's address.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// This end's address: the one at which the other end reaches this host.
    ///
    /// # Errors
    /// When the connection has been reset.
    pub fn local(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }

    /// A whole frame, if one has arrived.
    fn take_frame(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        let Some((head, rest)) = self.arrived.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*head) as usize;
        if length > MAX_FRAME {
            return Err(LinkError::TooLong(length as u64));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let frame = rest[..length].to_vec();
        self.arrived.drain(..4 + length);
        Ok(Some(frame))
    }
}

impl ControlLink for Connection {
    fn token(&self) -> Token {
        self.token
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        // One write, so that the length does not travel alone.
        let mut bytes = Vec::with_capacity(4 + frame.len());
        bytes.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        bytes.extend_from_slice(frame);
        Ok(self.stream.write_all(&bytes)?)
    }

    fn receive(&mut self, wait: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(frame) = self.take_frame()? {
                return Ok(Some(frame));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // A time-out of zero would mean none at all.
            self.stream.set_read_timeout(Some(left.max(Duration::from_micros(1))))?;
            let filled = self.arrived.len();
            self.arrived.resize(filled + STEP, 0);
            let read = self.stream.read(&mut self.arrived[filled..]);
            self.arrived.truncate(filled + read.as_ref().copied().unwrap_or(0));
            match read {
                Ok(0) => return Err(LinkError::Closed),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
