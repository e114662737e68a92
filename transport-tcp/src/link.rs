//! The control link: frames of a four-byte length and that many bytes.

use crate::Error;
use crate::stream::{self, MAX_PREAMBLE_WAIT, PEER, Stream};
use migration::link::MAX_FRAME;
use migration::link::{ControlLink, LinkError};
use migration::preamble::{Kind, Preamble, PreambleError, Status};
use migration::transport::Token;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Bytes read at a time. The buffer grows with what arrives, not with what is announced.
const READ_BYTES: usize = 64 << 10;

/// A control link over any [`Stream`].
pub struct StreamLink<S> {
    token: Token,
    stream: S,
    arrived: Vec<u8>,
}

impl<S: Stream> StreamLink<S> {
    /// The source's end of a stream that is connected already: sends the session's preamble and has it
    /// answered, each within `patience`. Afterwards a write waits at most `patience`, too.
    ///
    /// # Errors
    /// [`Error`] says what the other end did instead.
    pub fn connect(mut stream: S, token: Token, patience: Duration) -> Result<Self, Error> {
        let failed = |source| Error::Connect { to: PEER.into(), source };
        stream.set_write_timeout(Some(patience)).map_err(failed)?;
        stream::call(&mut stream, PEER, Preamble::control(token), patience)?;
        Ok(StreamLink::new(stream, token))
    }

    /// The destination's end: waits for the preamble and answers it. The source has five seconds for it;
    /// afterwards a write waits at most `patience`.
    ///
    /// # Errors
    /// [`Error`] says what the other end sent instead.
    pub fn accept(mut stream: S, patience: Duration) -> Result<Self, Error> {
        let failed = |source| Error::Connect { to: PEER.into(), source };
        stream.set_write_timeout(Some(patience)).map_err(failed)?;
        let preamble = stream::hear(&mut stream, Some(MAX_PREAMBLE_WAIT))?;
        if preamble.kind != Kind::Control {
            return Err(Error::Preamble { to: PEER.into(), why: PreambleError::Malformed });
        }
        stream.write_all(&preamble.answer(Status::Ok).encode()).map_err(failed)?;
        Ok(StreamLink::new(stream, preamble.token))
    }

    /// A link over a stream on which `token`'s preamble has been sent and answered before, by whoever
    /// hands it over. The stream's write time-out stays as it is.
    pub fn new(stream: S, token: Token) -> Self {
        StreamLink { token, stream, arrived: Vec::new() }
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

impl<S: Stream> ControlLink for StreamLink<S> {
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
            self.arrived.resize(filled + READ_BYTES, 0);
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

/// Whether `to` has the form of a destination, whatever its name means. The library would take an IPv6
/// address without brackets for a shorter one with a port.
fn check_form(to: &str) -> Result<(), Error> {
    let form = |why: String| Err(Error::Form { to: to.into(), why });
    if to.parse::<SocketAddr>().is_ok() {
        return Ok(());
    }
    let Some((host, port)) = to.rsplit_once(':') else { return form("it has no port".into()) };
    if host.contains(':') {
        return form(match host.parse::<Ipv6Addr>() {
            Ok(_) => format!("an IPv6 address stands in brackets: [{host}]:{port}"),
            Err(_) => "an IPv6 address stands in brackets: [address]:port".into(),
        });
    }
    if host.is_empty() {
        return form("it has no host".into());
    }
    if port.parse::<u16>().is_err() {
        return form(format!("{port:?} is no port, which is a number up to 65535"));
    }
    Ok(())
}

/// A control link over TCP.
pub struct Connection {
    link: StreamLink<TcpStream>,
    peer: SocketAddr,
}

/// Connects to the receiver at `to` (`host:port`); each step may take `patience`. A name with several
/// addresses is tried at each in turn.
///
/// # Errors
/// [`Error`] says whether the name, the network or the program there is at fault.
pub fn connect_control(to: &str, token: Token, patience: Duration) -> Result<Connection, Error> {
    check_form(to)?;
    let resolve = |why: String| Error::Resolve { to: to.into(), why };
    let addresses = to.to_socket_addrs().map_err(|e| resolve(e.to_string()))?;
    let mut last = resolve("it has no address".into());
    for address in addresses {
        match stream::connect(address, Preamble::control(token), patience) {
            Ok(socket) => return Ok(Connection::new(OwnedFd::from(socket).into(), token, address)),
            Err(error @ Error::Connect { .. }) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

impl Connection {
    pub(crate) fn new(stream: TcpStream, token: Token, peer: SocketAddr) -> Self {
        Connection { link: StreamLink::new(stream, token), peer }
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
        self.link.stream.local_addr()
    }
}

impl ControlLink for Connection {
    fn token(&self) -> Token {
        self.link.token()
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        self.link.send(frame)
    }

    fn receive(&mut self, wait: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        self.link.receive(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(to: &str) -> String {
        match connect_control(to, Token([0; 16]), Duration::from_secs(5)) {
            Ok(_) => panic!("{to} was connected to"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_address_of_another_form_is_told_from_a_name_that_means_nothing() {
        for (to, hint) in [
            ("host", "it has no port"),
            (":4444", "it has no host"),
            ("host:77777", "\"77777\" is no port"),
            ("fd00:1::2:4444", "[fd00:1::2]:4444"),
            ("fd00:1::2", "[address]:port"),
        ] {
            let error = refused(to);
            assert!(error.contains(hint) && error.contains("write the destination as host:port"), "{error}");
        }
        let error = refused("no-such-host.invalid:4444");
        assert!(error.contains("cannot find") && !error.contains("host:port"), "{error}");
        for to in ["host:4444", "10.0.0.1:4444", "[fd00:1::2]:4444"] {
            check_form(to).unwrap();
        }
    }
}
