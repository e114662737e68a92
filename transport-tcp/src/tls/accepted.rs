//! The accepting end of a connection through TLS, encrypted in user space. This is where memory arrives.
//!
//! As much as has come is read at once into one buffer, decrypted there record by record, and each record is
//! handed on as soon as it is, while the processor's cache has it. Rustls' unbuffered API makes this
//! possible: the other one would read 4 KiB at a time into a buffer of its own, in which what is left moves
//! up after each record.

use super::kernel::{self, KernelStream};
use super::stream::{PeerOf, Records, trouble};
use crate::channel::{At, Decrypted, Peer, Protected, SharedSocket};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use std::io::{self, Read, Write};
use std::time::Instant;

/// Bytes that are read at a time where much is expected. The more, the more seldom threads change places on a
/// processor.
const READ_BYTES: usize = 1 << 20;

/// From this length on, much is expected.
const MUCH: usize = 128 << 10;

/// Bytes that are read at a time elsewhere: more than a record has.
const FEW_BYTES: usize = 32 << 10;

/// Room for the largest record, and some more.
const RECORD_ROOM: usize = 18 << 10;

/// Most bytes that a caller's messages of the handshake may have together.
const MAX_HANDSHAKE: usize = 64 << 10;

/// An open connection.
pub(super) struct Accepted {
    session: Session,
    socket: SharedSocket,
    peer: Peer,
}

/// What rustls and its buffers hold of a connection.
struct Session {
    connection: UnbufferedServerConnection,
    /// What has arrived: the bytes from `start` to `end` are still to be decrypted.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// What has been decrypted and not delivered: the bytes from `delivered` on.
    plain: Vec<u8>,
    delivered: usize,
    /// What is encrypted and not sent.
    outgoing: Vec<u8>,
    /// The other end sends nothing more.
    ended: bool,
    /// Nothing is decrypted any more.
    failed: Option<rustls::Error>,
}

/// What is wanted of a session.
enum Want<'a> {
    /// At most so many bytes of the program, handed over here.
    Read(usize, &'a mut dyn FnMut(&[u8])),
    /// To encrypt these.
    Write(&'a [u8]),
}

/// What a session has done.
enum Step {
    /// Bytes of the program have been decrypted, and so many were handed over.
    Read(usize),
    /// All was encrypted.
    Written,
    /// Something of TLS itself is to be sent.
    Send,
    /// The other end sends nothing more.
    Ended,
    /// Nothing: it goes on when more has arrived.
    Waits,
}

/// Makes the handshake before the deadline, and encrypts from then on in that place. Afterwards reads wait as
/// long as the socket is told.
pub(super) fn open(
    connection: UnbufferedServerConnection,
    mut socket: SharedSocket,
    place: At,
    deadline: Instant,
    peer_of: PeerOf,
) -> io::Result<Box<dyn Protected>> {
    let mut session = Session::new(connection);
    let of_socket = socket.clone();
    let mut records = Records::new(&of_socket);
    loop {
        match session.step(Want::Read(0, &mut |_| {})) {
            Ok(Step::Send) => session.send(&mut socket)?,
            Ok(Step::Ended) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) if !session.connection.is_handshaking() => break,
            Ok(_) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                if session.end - session.start > MAX_HANDSHAKE {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                socket.set_read_timeout(Some(left))?;
                if session.fill(&mut records, FEW_BYTES)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Err(error) => {
                session.tell(&mut socket);
                return Err(trouble(&error));
            }
        }
    }
    let connection = &session.connection;
    let peer = peer_of(connection.peer_certificates(), connection.negotiated_cipher_suite());
    let peer = peer.ok_or_else(|| trouble(&rustls::Error::NoCertificatesPresented))?;
    if place == At::Kernel && kernel::prepare(&socket) {
        let secrets = session.connection.dangerous_into_kernel_connection();
        let (secrets, _) = secrets.map_err(|error| trouble(&error))?;
        return Ok(Box::new(KernelStream::new(socket, &secrets, peer)?));
    }
    Ok(Box::new(Accepted { session, socket, peer }))
}

impl Session {
    fn new(connection: UnbufferedServerConnection) -> Self {
        Session {
            connection,
            incoming: Vec::new(),
            start: 0,
            end: 0,
            plain: Vec::new(),
            delivered: 0,
            outgoing: Vec::new(),
            ended: false,
            failed: None,
        }
    }

    /// Lets rustls do the next thing, with what has arrived first. What it decrypts and nobody wants now is
    /// kept.
    fn step(&mut self, mut want: Want<'_>) -> Result<Step, rustls::Error> {
        loop {
            let arrived = &mut self.incoming[self.start..self.end];
            let UnbufferedStatus { discard, state } = self.connection.process_tls_records(arrived);
            self.start += discard;
            let state = match state {
                Ok(state) => state,
                Err(error) => return Err(self.failed.insert(error).clone()),
            };
            match state {
                ConnectionState::ReadTraffic(mut traffic) => {
                    let mut given = 0;
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        self.start += record.discard;
                        let mut kept = record.payload;
                        if let Want::Read(most, to) = &mut want {
                            let (now, later) = kept.split_at(kept.len().min(*most - given));
                            to(now);
                            (given, kept) = (given + now.len(), later);
                        }
                        self.plain.extend_from_slice(kept);
                    }
                    if let Want::Read(..) = want {
                        return Ok(Step::Read(given));
                    }
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    append(&mut self.outgoing, RECORD_ROOM, |room| match data.encode(room) {
                        Ok(written) => Ok(written),
                        Err(EncodeError::InsufficientSize(needed)) => Err(needed.required_size),
                        Err(EncodeError::AlreadyEncoded) => Ok(0),
                    });
                }
                ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    return Ok(Step::Send);
                }
                ConnectionState::PeerClosed => {
                    self.ended = true;
                    return Ok(Step::Ended);
                }
                ConnectionState::WriteTraffic(mut traffic) => {
                    let Want::Write(bytes) = want else { return Ok(Step::Waits) };
                    let mut exhausted = false;
                    append(&mut self.outgoing, bytes.len() + RECORD_ROOM, |room| {
                        match traffic.encrypt(bytes, room) {
                            Ok(written) => Ok(written),
                            Err(EncryptError::InsufficientSize(needed)) => Err(needed.required_size),
                            Err(EncryptError::EncryptExhausted) => {
                                exhausted = true;
                                Ok(0)
                            }
                        }
                    });
                    return if exhausted { Err(rustls::Error::EncryptError) } else { Ok(Step::Written) };
                }
                // There is no early data, since it is not offered, and what has ended says so only once.
                _ => return Ok(Step::Waits),
            }
        }
    }

    /// Reads behind what has arrived, with so much room at least; no bytes are the end.
    fn fill(&mut self, from: &mut impl Read, room: usize) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.incoming.len() < room {
            self.incoming.resize(room, 0);
        }
        // A record that has arrived in part is moved up where the rest of it might find no room.
        if self.incoming.len() - self.end < RECORD_ROOM {
            self.incoming.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            self.incoming.resize(self.incoming.len().max(self.end + RECORD_ROOM), 0);
        }
        loop {
            match from.read(&mut self.incoming[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => {
                    self.end += result.as_ref().unwrap_or(&0);
                    return result;
                }
            }
        }
    }

    /// Sends what is encrypted.
    fn send(&mut self, socket: &mut SharedSocket) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match socket.write(&self.outgoing) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// After an error: the other end is told what is wrong, if it still listens.
    fn tell(&mut self, socket: &mut SharedSocket) {
        let arrived = &mut self.incoming[self.start..self.end];
        if let Ok(ConnectionState::EncodeTlsData(mut alert)) =
            self.connection.process_tls_records(arrived).state
        {
            append(&mut self.outgoing, RECORD_ROOM, |room| Ok(alert.encode(room).unwrap_or(0)));
        }
        let _ = self.send(socket);
    }
}

/// Appends what `write` puts into so much room and tells the length of, or into as much as it says instead.
fn append(to: &mut Vec<u8>, mut room: usize, mut write: impl FnMut(&mut [u8]) -> Result<usize, usize>) {
    let end = to.len();
    loop {
        to.resize(end + room, 0);
        match write(&mut to[end..]) {
            Ok(written) => return to.truncate(end + written),
            Err(needed) => room = needed,
        }
    }
}

impl Decrypted for Accepted {
    fn deliver(&mut self, most: usize, to: &mut dyn FnMut(&[u8])) -> io::Result<usize> {
        let session = &mut self.session;
        loop {
            let kept = &session.plain[session.delivered..];
            if !kept.is_empty() {
                let count = kept.len().min(most);
                to(&kept[..count]);
                session.delivered += count;
                return Ok(count);
            }
            session.plain.clear();
            session.delivered = 0;
            if let Some(error) = &session.failed {
                return Err(trouble(error));
            }
            if session.ended || most == 0 {
                return Ok(0);
            }
            match session.step(Want::Read(most, to)) {
                Ok(Step::Read(0) | Step::Written | Step::Ended) => {}
                Ok(Step::Read(count)) => return Ok(count),
                Ok(Step::Send) => session.send(&mut self.socket)?,
                Ok(Step::Waits) => {
                    let room = if most >= MUCH { READ_BYTES } else { FEW_BYTES };
                    session.ended = session.fill(&mut self.socket, room)? == 0;
                }
                Err(_) => session.tell(&mut self.socket),
            }
        }
    }
}

impl Read for Accepted {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_into(bytes)
    }
}

impl Write for Accepted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(error) = &self.session.failed {
            return Err(trouble(error));
        }
        loop {
            match self.session.step(Want::Write(bytes)) {
                Ok(Step::Written) => return Ok(bytes.len()),
                // What of TLS itself is to be sent goes with it.
                Ok(Step::Send | Step::Ended | Step::Read(_)) => {}
                Ok(Step::Waits) => return Err(io::ErrorKind::BrokenPipe.into()),
                Err(error) => {
                    self.session.tell(&mut self.socket);
                    return Err(trouble(&error));
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.session.send(&mut self.socket)
    }
}

impl Protected for Accepted {
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
