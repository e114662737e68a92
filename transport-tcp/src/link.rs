//! The control link: frames of a four-byte length and that many bytes.

use crate::channel::{Channel, Peer, Protection};
use crate::opening::{self, Caller};
use crate::stream::{self, MAX_OPENING, PEER, Stream};
use crate::{Error, TcpSource};
use migration::link::MAX_FRAME;
use migration::link::{ControlLink, LinkError};
use migration::preamble::{Kind, Preamble, Status};
use migration::transport::{Secret, Token};
use std::io;
use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Bytes read at a time. The buffer grows with what arrives, not with what is announced.
const READ_BYTES: usize = 64 << 10;

/// A control link over any [`Stream`].
pub struct StreamLink<S> {
    token: Token,
    secret: Secret,
    stream: S,
    arrived: Vec<u8>,
}

impl<S: Stream> StreamLink<S> {
    /// The source's end of a stream that is connected already: sends the session's preamble, has it answered,
    /// and takes the session's secret, each within `patience`. Afterwards a write waits at most `patience`,
    /// too.
    ///
    /// # Errors
    /// [`Error`] says what the other end did instead.
    pub fn connect(mut stream: S, token: Token, patience: Duration) -> Result<Self, Error> {
        let failed = |source| Error::Connect { to: PEER.into(), source };
        stream.set_write_timeout(Some(patience)).map_err(failed)?;
        let preamble = Preamble::control(token);
        stream::call(&mut stream, PEER, preamble, patience)?;
        let secret = opening::take_secret(&mut stream, PEER, &preamble, patience)?;
        Ok(StreamLink::opened(stream, token, secret))
    }

    /// The destination's end: waits for the preamble, and has the session's secret proved. The source has
    /// five seconds for it; afterwards a write waits at most `patience`.
    ///
    /// # Errors
    /// [`Error`] says what the other end sent instead.
    pub fn accept(mut stream: S, patience: Duration) -> Result<Self, Error> {
        let failed = |source| Error::Connect { to: PEER.into(), source };
        stream.set_write_timeout(Some(patience)).map_err(failed)?;
        let deadline = Instant::now() + MAX_OPENING;
        let preamble = stream::hear(&mut stream, Some(deadline))?;
        if preamble.kind != Kind::Control {
            return Err(opening::misplaced());
        }
        opening::agree(&mut stream, &preamble, &Protection::none())?;
        let secret = opening::give_secret(&mut stream, &preamble, deadline)?;
        opening::answer(&mut stream, &preamble, Status::Ok).map_err(failed)?;
        Ok(StreamLink::opened(stream, preamble.token, secret))
    }

    /// A link over a stream whose two ends have agreed on `token` before, by whatever means. It has no
    /// secret, so whoever knows the token can open a lane. The stream's write time-out stays as it is.
    pub fn new(stream: S, token: Token) -> Self {
        StreamLink::opened(stream, token, Secret::NONE)
    }

    /// A link that is open.
    pub(crate) fn opened(stream: S, token: Token, secret: Secret) -> Self {
        StreamLink { token, secret, stream, arrived: Vec::new() }
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

    fn secret(&self) -> Secret {
        self.secret
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        // One write, so that the length does not travel alone.
        let mut bytes = Vec::with_capacity(4 + frame.len());
        bytes.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        bytes.extend_from_slice(frame);
        self.stream.write_all(&bytes)?;
        Ok(self.stream.flush()?)
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

/// The host in `to`, which is written as `host:port`: what the certificate of whoever listens there has to be
/// for.
///
/// # Errors
/// [`Error::Form`].
pub fn host_of(to: &str) -> Result<&str, Error> {
    check_form(to)?;
    let host = to.rsplit_once(':').map_or(to, |(host, _)| host);
    Ok(host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host))
}

/// A control link over TCP.
pub struct Connection {
    link: StreamLink<Channel>,
    peer: SocketAddr,
    /// Of the connections that this end makes.
    protection: Protection,
    host: String,
}

/// Makes connections to receivers.
#[derive(Clone, Default)]
pub struct Connector {
    protection: Protection,
    near_only: bool,
}

impl Connector {
    /// Connects anywhere, and protects the connections so.
    pub fn new(protection: Protection) -> Self {
        Connector { protection, near_only: false }
    }

    /// Connects without any protection, and therefore only to this host.
    pub fn near_only() -> Self {
        Connector { protection: Protection::none(), near_only: true }
    }

    /// Connects to the receiver at `to` (`host:port`); each step may take `patience`. A name with several
    /// addresses is tried at each in turn.
    ///
    /// # Errors
    /// [`Error`] says whether the name, the network, the program there or its certificate is at fault.
    pub fn connect(&self, to: &str, token: Token, patience: Duration) -> Result<Connection, Error> {
        let host = host_of(to)?;
        let resolve = |why: String| Error::Resolve { to: to.into(), why };
        let addresses = to.to_socket_addrs().map_err(|e| resolve(e.to_string()))?;
        let mut last = resolve("it has no address".into());
        for address in addresses {
            if self.near_only && !address.ip().to_canonical().is_loopback() {
                return Err(Error::Exposed { to: address });
            }
            match opening::insist(|| self.open(host, address, token, patience)) {
                Ok(connection) => return Ok(connection),
                Err(error @ Error::Connect { .. }) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// `streams` connections to `to`, which is to prove that it is `host`; 0 for
    /// [`DEFAULT_STREAMS`](crate::DEFAULT_STREAMS). They are not bound to a control link's peer, as those of
    /// [`Connection::lanes`] are.
    pub fn lanes(&self, to: SocketAddr, host: &str, streams: u16) -> TcpSource {
        TcpSource::protected(to, streams, host, self.protection.of_lanes(), None)
    }

    fn open(
        &self,
        host: &str,
        address: SocketAddr,
        token: Token,
        patience: Duration,
    ) -> Result<Connection, Error> {
        let preamble = Preamble::control(token).encrypted(self.protection.is_some());
        let to = address.to_string();
        let caller = Caller { to: &to, host, protection: &self.protection, patience };
        let socket = stream::connect(address, patience, |_| {})?;
        let mut channel = caller.call(Channel::Clear(socket), preamble)?;
        let secret = opening::take_secret(&mut channel, &to, &preamble, patience)?;
        let link = StreamLink::opened(channel, token, secret);
        Ok(Connection { link, peer: address, protection: self.protection.clone(), host: host.into() })
    }
}

/// Connects to the receiver at `to` (`host:port`) without any protection; each step may take `patience`. A
/// name with several addresses is tried at each in turn.
///
/// # Errors
/// [`Error`] says whether the name, the network or the program there is at fault.
pub fn connect_control(to: &str, token: Token, patience: Duration) -> Result<Connection, Error> {
    Connector::new(Protection::none()).connect(to, token, patience)
}

impl Connection {
    /// The accepting end of a connection that is open.
    pub(crate) fn accepted(channel: Channel, token: Token, secret: Secret, peer: SocketAddr) -> Self {
        let link = StreamLink::opened(channel, token, secret);
        Connection { link, peer, protection: Protection::none(), host: String::new() }
    }

    /// `streams` connections to the same receiver, 0 for [`DEFAULT_STREAMS`](crate::DEFAULT_STREAMS). They
    /// are protected as this connection is, unless its [`Protection`] makes an exception of them, and lead to
    /// the holder of the same certificate or fail.
    pub fn lanes(&self, streams: u16) -> TcpSource {
        let peer = self.link.stream.peer().cloned();
        TcpSource::protected(self.peer, streams, &self.host, self.protection.of_lanes(), peer)
    }

    /// Who is at the other end, if the connection is protected.
    pub fn identity(&self) -> Option<&Peer> {
        self.link.stream.peer()
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
        let local = self.link.stream.socket().local_addr()?;
        local.as_socket().ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }
}

impl ControlLink for Connection {
    fn token(&self) -> Token {
        self.link.token()
    }

    fn secret(&self) -> Secret {
        self.link.secret()
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

    #[test]
    fn a_host_is_what_a_certificate_may_be_for() {
        for (to, host) in
            [("a.example:1", "a.example"), ("10.0.0.1:4444", "10.0.0.1"), ("[fd00::2]:1", "fd00::2")]
        {
            assert_eq!(host_of(to).unwrap(), host);
        }
    }

    #[test]
    fn without_protection_the_way_leads_to_this_host_only() {
        let connect = |to| Connector::near_only().connect(to, Token([0; 16]), Duration::from_secs(5));
        assert!(matches!(connect("192.0.2.1:1"), Err(Error::Exposed { .. })));
        assert!(matches!(connect("[::ffff:192.0.2.1]:1"), Err(Error::Exposed { .. })));
        // Nobody listens on port 1 of this host, which is another matter.
        assert!(matches!(connect("127.0.0.1:1"), Err(Error::Connect { .. })));
    }
}
