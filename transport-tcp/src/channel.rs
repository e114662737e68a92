//! What a connection's bytes go through: a socket as it is, or one whose bytes are protected.

use crate::Error;
use crate::stream::Stream;
use migration::preamble::Kind;
use migration::transport::LaneEncryption;
use socket2::Socket;
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A socket that several have: who reads and writes, and who may shut it down meanwhile.
#[derive(Clone)]
pub(crate) struct SharedSocket(Arc<Socket>);

impl From<Socket> for SharedSocket {
    fn from(socket: Socket) -> Self {
        SharedSocket(Arc::new(socket))
    }
}

impl Deref for SharedSocket {
    type Target = Socket;

    fn deref(&self) -> &Socket {
        &self.0
    }
}

impl Read for SharedSocket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(bytes)
    }
}

impl Write for SharedSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        (&*self.0).write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for SharedSocket {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_write_timeout(timeout)
    }
}

/// Who is at the other end of a protected connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What its certificate calls it.
    pub name: String,
    /// Its certificate, in DER.
    pub certificate: Vec<u8>,
    /// How the connection is encrypted.
    pub cipher: String,
}

impl Peer {
    /// Whether both are the same, whatever their connections are encrypted with.
    pub(crate) fn is(&self, other: &Peer) -> bool {
        self.certificate == other.certificate
    }
}

/// A connection whose bytes are protected. It reads and writes what is protected; its waits are those that
/// the socket is told. The other end's going away is the end of what can be read, announced or not: whatever
/// travels here says by itself where it ends.
pub(crate) trait Protected: Read + Write + Send {
    fn socket(&self) -> &SharedSocket;

    fn peer(&self) -> &Peer;

    /// Whether the kernel encrypts and decrypts, so that memory goes through the socket as it does without
    /// protection.
    fn in_kernel(&self) -> bool;

    /// What has been decrypted in this process; `None` if the kernel does it.
    fn decrypted(&mut self) -> Option<&mut dyn Decrypted>;

    /// What an error of the socket means.
    fn explain(&mut self, error: io::Error) -> io::Error {
        error
    }
}

/// Bytes that are decrypted in this process.
pub(crate) trait Decrypted {
    /// Hands at most `most` of the next bytes over to `to`, as soon as there are any, and tells how many: 0
    /// at the end. Who expects many says so by `most`.
    fn deliver(&mut self, most: usize, to: &mut dyn FnMut(&[u8])) -> io::Result<usize>;

    /// Reads as [`Read`] does.
    fn read_into(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (most, mut filled) = (bytes.len(), 0);
        self.deliver(most, &mut |some| {
            bytes[filled..][..some.len()].copy_from_slice(some);
            filled += some.len();
        })
    }
}

/// Where bytes are encrypted and decrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// In the kernel, if it can.
    Kernel,
    /// In this process.
    UserSpace,
}

/// Protects connections.
pub(crate) trait Protect: Send + Sync {
    /// As the end that connects, to a program that is to prove that it is `host`'s. Within the deadline.
    fn connect(
        &self,
        socket: SharedSocket,
        to: &str,
        host: &str,
        place: At,
        deadline: Instant,
    ) -> Result<Box<dyn Protected>, Error>;

    /// As the end that accepts.
    fn accept(&self, socket: SharedSocket, place: At, deadline: Instant)
    -> Result<Box<dyn Protected>, Error>;

    /// Whether the peer of a connection that was accepted may begin a session.
    fn admits(&self, peer: &Peer) -> bool;
}

/// How the connections of a session are protected. By default they are not: whoever is on the network can
/// read and change what travels, and pretend to be either side.
#[derive(Clone, Default)]
pub struct Protection {
    protect: Option<Arc<dyn Protect>>,
    in_user_space: bool,
    clear_lanes: bool,
    /// If it is not [`RECORDS_PER_KEY`].
    records_per_key: Option<u64>,
}

/// Records that one key encrypts at most. AES-GCM is good for some 2^24.5 of them, says RFC 8446. Rustls
/// changes keys after 2^24, and the kernel cannot change them before Linux 6.14. So no lane gets as far: this
/// is 128 GiB of large records.
const RECORDS_PER_KEY: u64 = 1 << 23;

impl Protection {
    /// None.
    pub fn none() -> Self {
        Protection::default()
    }

    #[cfg(feature = "tls")]
    pub(crate) fn by(protect: Arc<dyn Protect>) -> Self {
        Protection { protect: Some(protect), ..Protection::none() }
    }

    /// The same by this process alone, also where the kernel could encrypt what lanes carry.
    pub fn in_user_space(self) -> Self {
        Protection { in_user_space: true, ..self }
    }

    /// The same for control links alone. Lanes prove that they belong to their session, and what they carry
    /// can be read and changed on its way. A destination that is told so takes encrypted lanes as well.
    pub fn with_clear_lanes(self) -> Self {
        Protection { clear_lanes: true, ..self }
    }

    pub(crate) fn has_clear_lanes(&self) -> bool {
        self.clear_lanes || !self.is_some()
    }

    /// That of lanes.
    pub(crate) fn of_lanes(&self) -> Self {
        if self.clear_lanes { Protection::none() } else { self.clone() }
    }

    /// The same with lanes of which each begins anew, with a connection and keys of its own, when it has sent
    /// so many records. By default this is so often as the cipher asks for.
    pub fn with_records_per_key(self, records: u64) -> Self {
        Protection { records_per_key: Some(records), ..self }
    }

    pub(crate) fn records_per_key(&self) -> u64 {
        self.records_per_key.unwrap_or(RECORDS_PER_KEY)
    }

    /// Whether there is any.
    pub fn is_some(&self) -> bool {
        self.protect.is_some()
    }

    pub(crate) fn get(&self) -> Option<&dyn Protect> {
        self.protect.as_deref()
    }

    /// Where a connection for `kind` is protected. A control link carries little, and what a peer has to say
    /// beside it is understood in user space only.
    pub(crate) fn place(&self, kind: Kind) -> At {
        if kind == Kind::Data && !self.in_user_space { At::Kernel } else { At::UserSpace }
    }
}

/// See the module.
pub(crate) enum Channel {
    Clear(SharedSocket),
    Protected(Box<dyn Protected>),
}

impl Channel {
    /// How what goes through it is encrypted.
    pub(crate) fn encryption(&self) -> LaneEncryption {
        match self {
            Channel::Clear(_) => LaneEncryption::None,
            Channel::Protected(protected) if protected.in_kernel() => LaneEncryption::TlsInKernel,
            Channel::Protected(_) => LaneEncryption::TlsInUserSpace,
        }
    }

    pub(crate) fn socket(&self) -> &SharedSocket {
        match self {
            Channel::Clear(socket) => socket,
            Channel::Protected(protected) => protected.socket(),
        }
    }

    /// Who is at the other end, if that is known.
    pub(crate) fn peer(&self) -> Option<&Peer> {
        match self {
            Channel::Clear(_) => None,
            Channel::Protected(protected) => Some(protected.peer()),
        }
    }
}

impl Read for Channel {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Channel::Clear(socket) => socket.read(bytes),
            Channel::Protected(protected) => protected.read(bytes),
        }
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Channel::Clear(socket) => socket.write(bytes),
            Channel::Protected(protected) => protected.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Channel::Clear(_) => Ok(()),
            Channel::Protected(protected) => protected.flush(),
        }
    }
}

impl Stream for Channel {
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket().set_read_timeout(timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket().set_write_timeout(timeout)
    }
}
