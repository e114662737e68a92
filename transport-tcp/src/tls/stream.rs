//! The connecting end of a connection through TLS, encrypted in user space. From here memory is sent.
//!
//! What is written is encrypted at once, from where it lies into records of 16 KiB, of which several are sent
//! by one system call.

use super::explain;
use super::kernel::{self, KernelStream};
use crate::Untrusted;
use crate::channel::{At, Decrypted, Peer, Protected, SharedSocket};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, SupportedCipherSuite};
use std::io::{self, BufRead, Read, Write};
use std::time::Instant;

/// Most encrypted bytes that wait to be sent together.
const BATCH_BYTES: usize = 1 << 20;

/// Tells who the other end is, of its certificates and the cipher.
pub(super) type PeerOf = fn(Option<&[CertificateDer<'static>]>, Option<SupportedCipherSuite>) -> Option<Peer>;

/// An open connection.
pub(super) struct TlsStream {
    connection: ClientConnection,
    socket: SharedSocket,
    /// Bytes that are decrypted and not yet taken.
    plain: usize,
    ended: bool,
    /// Nothing is decrypted any more.
    failed: Option<rustls::Error>,
    peer: Peer,
}

/// What rustls found, as an error of the stream.
pub(super) fn trouble(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Untrusted(explain::fault(error)))
}

/// Reads of a socket no further than to the end of a TLS record, so that whoever reads on misses nothing.
pub(super) struct Records<'a> {
    socket: &'a SharedSocket,
    /// The record's head: its type, a version, and the length of what follows.
    head: [u8; 5],
    /// Bytes of the head that have been read.
    filled: usize,
    /// Bytes that follow.
    left: usize,
}

impl<'a> Records<'a> {
    /// Of a socket from which nothing of a record has been read.
    pub(super) fn new(socket: &'a SharedSocket) -> Self {
        Records { socket, head: [0; 5], filled: 0, left: 0 }
    }
}

impl Read for Records<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let in_head = self.left == 0;
        let most = if in_head { self.head.len() - self.filled } else { self.left };
        let most = most.min(bytes.len());
        let count = self.socket.clone().read(&mut bytes[..most])?;
        if in_head {
            self.head[self.filled..][..count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            if self.filled == self.head.len() {
                self.left = usize::from(u16::from_be_bytes([self.head[3], self.head[4]]));
                self.filled = 0;
            }
        } else {
            self.left -= count;
        }
        Ok(count)
    }
}

/// Makes the handshake before the deadline, and encrypts from then on in that place. Afterwards reads wait as
/// long as the socket is told.
pub(super) fn open(
    mut connection: ClientConnection,
    socket: SharedSocket,
    place: At,
    deadline: Instant,
    peer_of: PeerOf,
) -> io::Result<Box<dyn Protected>> {
    let mut incoming = Records::new(&socket);
    let mut outgoing = socket.clone();
    while connection.is_handshaking() || connection.wants_write() {
        if connection.wants_write() {
            send(&mut connection, &mut outgoing)?;
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        if receive(&mut connection, &mut incoming)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Err(error) = connection.process_new_packets() {
            // The other side is told what is wrong, if it still listens.
            let _ = send(&mut connection, &mut outgoing);
            return Err(trouble(&error));
        }
    }
    let peer = peer_of(connection.peer_certificates(), connection.negotiated_cipher_suite());
    let peer = peer.ok_or_else(|| trouble(&rustls::Error::NoCertificatesPresented))?;
    if place == At::Kernel && kernel::prepare(&socket) {
        let secrets = connection.dangerous_extract_secrets().map_err(|error| trouble(&error))?;
        return Ok(Box::new(KernelStream::new(socket, &secrets, peer)?));
    }
    connection.set_buffer_limit(Some(BATCH_BYTES));
    Ok(Box::new(TlsStream { connection, socket, plain: 0, ended: false, failed: None, peer }))
}

impl TlsStream {
    /// Decrypts what has arrived. What came before an error is read before the error is met.
    fn process(&mut self) {
        match self.connection.process_new_packets() {
            Ok(state) => {
                self.plain = state.plaintext_bytes_to_read();
                self.ended |= state.peer_has_closed();
            }
            Err(error) => {
                let _ = send(&mut self.connection, &mut self.socket);
                self.failed = Some(error);
            }
        }
    }
}

/// Sends all that is encrypted.
fn send(connection: &mut ClientConnection, socket: &mut SharedSocket) -> io::Result<()> {
    while connection.wants_write() {
        match connection.write_tls(socket) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes encrypted bytes; none are the end.
fn receive(connection: &mut ClientConnection, incoming: &mut impl Read) -> io::Result<usize> {
    loop {
        match connection.read_tls(incoming) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl Decrypted for TlsStream {
    fn deliver(&mut self, most: usize, to: &mut dyn FnMut(&[u8])) -> io::Result<usize> {
        while self.plain == 0 && !self.ended {
            if let Some(error) = &self.failed {
                let left = self.connection.reader().into_first_chunk().map_or(0, <[u8]>::len);
                if left == 0 {
                    return Err(trouble(error));
                }
                self.plain = left;
                break;
            }
            match receive(&mut self.connection, &mut self.socket)? {
                0 => self.ended = true,
                _ => self.process(),
            }
        }
        if self.plain == 0 {
            return Ok(0);
        }
        let chunk = self.connection.reader().into_first_chunk()?;
        let count = chunk.len().min(most);
        to(&chunk[..count]);
        self.connection.reader().consume(count);
        self.plain -= count.min(self.plain);
        Ok(count)
    }
}

impl Read for TlsStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_into(bytes)
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let taken = self.connection.writer().write(bytes)?;
            if taken < bytes.len() {
                send(&mut self.connection, &mut self.socket)?;
            }
            if taken > 0 || bytes.is_empty() {
                return Ok(taken);
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        send(&mut self.connection, &mut self.socket)
    }
}

impl Protected for TlsStream {
    fn socket(&self) -> &SharedSocket {
        &self.socket
    }

    fn peer(&self) -> &Peer {
        &self.peer
    }

    fn in_kernel(&self) -> bool {
        false
    }

    fn decrypted(&mut self) -> Option<&mut dyn Decrypted> {
        Some(self)
    }
}
