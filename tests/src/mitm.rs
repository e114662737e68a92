//! Somebody on the network, who sees all bytes, keeps them, and changes them.

use migration::message::Message;
use migration::{Code, Failure};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// How a TLS record begins that has a message of one byte in it, with its length, and nothing else.
const SMALLEST_RECORD: [u8; 5] = [23, 3, 3, 0, 22];

/// A relay to one receiver, which takes down what sources say.
pub struct Mitm {
    address: SocketAddr,
    recorded: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Mitm {
    /// A relay to `target` on a free loopback port. With `forge` it keeps what the destination says after
    /// `Commit` to itself, and says `GaveUp` in its place.
    pub fn start(target: SocketAddr, forge: bool) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let recorded = Arc::new(Mutex::new(Vec::new()));
        let recording = Arc::clone(&recorded);
        // It ends with the test.
        thread::spawn(move || {
            for caller in listener.incoming().flatten() {
                let Ok(receiver) = TcpStream::connect(target) else { return };
                let number = {
                    let mut all = recording.lock().unwrap_or_else(PoisonError::into_inner);
                    all.push(Vec::new());
                    all.len() - 1
                };
                let recording = Arc::clone(&recording);
                thread::spawn(move || relay(&caller, &receiver, &recording, number, forge));
            }
        });
        Mitm { address, recorded }
    }

    /// Where sources connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What sources have said on each connection, in the order in which they were made.
    pub fn recorded(&self) -> Vec<Vec<u8>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Relays one connection.
fn relay(
    caller: &TcpStream,
    receiver: &TcpStream,
    recorded: &Mutex<Vec<Vec<u8>>>,
    number: usize,
    forge: bool,
) {
    let (mut from, mut to) = (caller.try_clone().unwrap(), receiver.try_clone().unwrap());
    let committed = Arc::new(Mutex::new(false));
    let silenced = Arc::clone(&committed);
    let (mut answers, mut back) = (receiver.try_clone().unwrap(), caller.try_clone().unwrap());
    thread::spawn(move || {
        let mut buffer = [0; 64 << 10];
        while let Ok(count @ 1..) = answers.read(&mut buffer) {
            let silenced = silenced.lock().unwrap_or_else(PoisonError::into_inner);
            if !*silenced && back.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = back.shutdown(std::net::Shutdown::Write);
    });
    let mut buffer = [0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..count];
        recorded.lock().unwrap_or_else(PoisonError::into_inner)[number].extend_from_slice(bytes);
        if forge && is_commit(bytes) {
            let mut silenced = committed.lock().unwrap_or_else(PoisonError::into_inner);
            *silenced = true;
            let lie = Message::GaveUp(Failure::new(Code::OTHER, "this is a lie")).encode();
            let frame = [&(lie.len() as u32).to_le_bytes(), &lie[..]].concat();
            let _ = from.write_all(&frame);
        }
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// Whether bytes end with `Commit`: as it is, or in a TLS record, which nothing else of a source's fits.
fn is_commit(bytes: &[u8]) -> bool {
    let commit = Message::Commit.encode();
    let clear = [&(commit.len() as u32).to_le_bytes(), &commit[..]].concat();
    let record = SMALLEST_RECORD.len() + 22;
    bytes.ends_with(&clear)
        || (bytes.len() >= record && bytes[bytes.len() - record..].starts_with(&SMALLEST_RECORD))
}
