//! What the accepting end makes of bytes, however they come: its peer here is rustls, with the socket in the
//! test's own hands.

use super::files::Files;
use super::{credentials::Credentials, stream::trouble};
use crate::channel::{At, Decrypted, Protect, Protected, SharedSocket};
use crate::copy;
use crate::place::Turns;
use crate::stream::Stream;
use migration::conformance::bed::{self, extent, ram_of};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{AlertDescription, ClientConnection, Error};
use socket2::{SockRef, Socket};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Longer than anything here takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes that a record has besides its content: the head, its type, and the tag.
const OVERHEAD: usize = 5 + 1 + 16;

/// What a host has that trusts itself alone.
fn credentials() -> Credentials {
    let folder = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    let ca = authority.self_signed(&authority_key).unwrap();
    let host = CertificateParams::new(vec!["host.example".into()]).unwrap();
    let certificate = host.signed_by(&key, &Issuer::new(authority, authority_key)).unwrap();
    fs::write(folder.path().join("ca.pem"), ca.pem()).unwrap();
    fs::write(folder.path().join("cert.pem"), certificate.pem()).unwrap();
    let private =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.path().join("key.pem"));
    private.unwrap().write_all(key.serialize_pem().as_bytes()).unwrap();
    Credentials::read(&Files::in_folder(folder.path()), &[]).unwrap()
}

/// The connecting end.
struct Caller {
    connection: ClientConnection,
    socket: TcpStream,
}

impl Caller {
    /// Records with these bytes.
    fn seal(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.connection.writer().write_all(bytes).unwrap();
        self.sealed()
    }

    /// What there is to be sent.
    fn sealed(&mut self) -> Vec<u8> {
        let mut records = Vec::new();
        while self.connection.wants_write() {
            self.connection.write_tls(&mut records).unwrap();
        }
        records
    }

    /// The next bytes that the accepting end has sent, or what it has found fault with.
    fn hear(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.connection.reader().read(&mut bytes[filled..]).unwrap_or(0);
            if filled < bytes.len() && self.connection.read_tls(&mut self.socket).unwrap() > 0 {
                self.connection.process_new_packets()?;
            }
        }
        Ok(())
    }
}

/// Both ends of a connection that is open.
fn pair(host: &Credentials) -> (Caller, Box<dyn Protected>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let accepting = SharedSocket::from(Socket::from(listener.accept().unwrap().0));
    let name = "host.example".try_into().unwrap();
    let mut connection = ClientConnection::new(Arc::clone(&host.client), name).unwrap();
    let accepted = thread::scope(|scope| {
        let accepted = scope.spawn(|| host.accept(accepting, At::UserSpace, Instant::now() + PATIENCE));
        while connection.is_handshaking() || connection.wants_write() {
            connection.complete_io(&mut socket).unwrap();
        }
        accepted.join().unwrap()
    });
    let accepted = accepted.unwrap();
    connection.set_buffer_limit(None);
    accepted.socket().set_read_timeout(Some(PATIENCE)).unwrap();
    (Caller { connection, socket }, accepted)
}

/// All that is delivered, by at most so many bytes, until the end or an error.
fn all_of(accepted: &mut dyn Decrypted, most: usize) -> (Vec<u8>, io::Result<()>) {
    let mut got = Vec::new();
    loop {
        match accepted.deliver(most, &mut |some| got.extend_from_slice(some)) {
            Ok(0) => return (got, Ok(())),
            Ok(count) => assert!(count <= most),
            Err(error) => return (got, Err(error)),
        }
    }
}

fn random(length: usize) -> Vec<u8> {
    std::iter::repeat_with(|| fastrand::u8(..)).take(length).collect()
}

#[test]
fn records_may_be_split_at_every_byte() {
    let (mut caller, mut accepted) = pair(&credentials());
    let accepted = accepted.decrypted().unwrap();
    let length = |sizes: [usize; 3]| sizes.iter().map(|size| size + OVERHEAD).sum::<usize>();
    let sizes = [1, 16, 60];
    for at in 0..=length(sizes) {
        let contents = sizes.map(random);
        let records = contents.each_ref().map(|content| caller.seal(content)).concat();
        assert_eq!(records.len(), length(sizes));
        let mut got = Vec::new();
        caller.socket.write_all(&records[..at]).unwrap();
        // What of it is whole is delivered before the rest comes.
        let whole: usize = (1..=3)
            .map(|count| sizes[..count].iter().map(|size| size + OVERHEAD).sum::<usize>())
            .filter(|end| *end <= at)
            .count();
        let whole: usize = sizes[..whole].iter().sum();
        while got.len() < whole {
            accepted.deliver(usize::MAX, &mut |some| got.extend_from_slice(some)).unwrap();
        }
        caller.socket.write_all(&records[at..]).unwrap();
        while got.len() < sizes.iter().sum() {
            accepted.deliver(7, &mut |some| got.extend_from_slice(some)).unwrap();
        }
        assert_eq!(got, contents.concat(), "split at {at}");
    }
}

#[test]
fn a_wait_that_ends_in_mid_record_loses_nothing() {
    let (mut caller, mut accepted) = pair(&credentials());
    let socket = accepted.socket().clone();
    let accepted = accepted.decrypted().unwrap();
    let records = caller.seal(b"all of it");
    for at in 0..records.len() {
        caller.socket.write_all(&records[at..=at]).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut got = Vec::new();
        let read = accepted.deliver(64, &mut |some| got.extend_from_slice(some));
        if at + 1 < records.len() {
            assert_eq!(read.unwrap_err().kind(), ErrorKind::WouldBlock, "byte {at}");
            continue;
        }
        socket.set_nonblocking(false).unwrap();
        while got.is_empty() {
            accepted.deliver(64, &mut |some| got.extend_from_slice(some)).unwrap_or(0);
        }
        assert_eq!(got, b"all of it");
    }
}

#[test]
fn small_and_large_are_interleaved() {
    let (mut caller, mut accepted) = pair(&credentials());
    let accepted = accepted.decrypted().unwrap();
    let sizes = [16, 16_384, 1, 16_385, 3 << 20, 16, 4096, 70_000, 2, 1 << 20, 16_383, 40];
    let contents: Vec<Vec<u8>> = sizes.iter().map(|size| random(*size)).collect();
    let sent = contents.concat();
    thread::scope(|scope| {
        scope.spawn(|| {
            for content in &contents {
                let mut records = &caller.seal(content)[..];
                while !records.is_empty() {
                    let (now, later) = records.split_at(fastrand::usize(1..=records.len()));
                    caller.socket.write_all(now).unwrap();
                    records = later;
                }
            }
            caller.socket.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        loop {
            let most = [1, 16, 5000, 64 << 10, 1 << 20][fastrand::usize(..5)];
            match accepted.deliver(most, &mut |some| got.extend_from_slice(some)).unwrap() {
                0 => break,
                count => assert!(count <= most),
            }
        }
        assert!(got == sent);
    });
}

#[test]
fn a_record_that_was_changed_ends_the_connection() {
    let host = credentials();
    for at in 0..OVERHEAD + 4 {
        let (mut caller, mut accepted) = pair(&host);
        let mut records = [caller.seal(b"good"), caller.seal(b"evil"), caller.seal(b"more")].concat();
        records[OVERHEAD + 4 + at] ^= 0x10;
        caller.socket.write_all(&records).unwrap();
        // A longer record might be waited for.
        caller.socket.shutdown(Shutdown::Write).unwrap();
        let (got, end) = all_of(accepted.decrypted().unwrap(), 64);
        if at == 2 {
            // The lower half of a version that has no meaning any more. It is not protected.
            assert_eq!(got, b"goodevilmore");
            continue;
        }
        assert_eq!(got, b"good", "byte {at}");
        let longer = at == 3;
        assert_eq!(end.is_ok(), longer, "byte {at}: {end:?}");
        if at >= 5 {
            assert_eq!(end.unwrap_err().to_string(), trouble(&Error::DecryptError).to_string());
            let told = caller.hear(&mut [0]).unwrap_err();
            assert_eq!(told, Error::AlertReceived(AlertDescription::BadRecordMac));
            // And nothing is written any more.
            let written = accepted.write(b"x").and_then(|_| accepted.flush());
            assert_eq!(written.unwrap_err().kind(), ErrorKind::InvalidData);
        }
    }
}

#[test]
fn what_was_cut_off_is_not_delivered() {
    let host = credentials();
    for at in 0..OVERHEAD + 4 {
        let (mut caller, mut accepted) = pair(&host);
        let (first, second) = (caller.seal(b"here"), caller.seal(b"gone"));
        caller.socket.write_all(&[&first, &second[..at]].concat()).unwrap();
        caller.socket.shutdown(Shutdown::Write).unwrap();
        let (got, end) = all_of(accepted.decrypted().unwrap(), 64);
        assert_eq!((&got[..], end.is_ok()), (&b"here"[..], true), "cut at {at}");
    }
}

#[test]
fn an_extent_that_ends_early_is_an_error() {
    let host = credentials();
    let ram = ram_of(&[64]);
    let page = random(4096);
    for reset in [false, true] {
        let (mut caller, mut accepted) = pair(&host);
        let records = [caller.seal(&page), caller.seal(&page)].concat();
        caller.socket.write_all(&records[..records.len() - 1]).unwrap();
        if reset {
            SockRef::from(&caller.socket).set_linger(Some(Duration::ZERO)).unwrap();
        }
        drop(caller.socket);
        let error = copy::place(accepted.decrypted().unwrap(), &ram, &Turns::new(&ram), &[extent(0, 0, 2)])
            .unwrap_err();
        if reset {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        } else {
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
            assert!(bed::read(&ram, &extent(0, 0, 1)) == page);
        }
    }
}

#[test]
fn nothing_follows_the_end() {
    let (mut caller, mut accepted) = pair(&credentials());
    let last = caller.seal(b"last");
    caller.connection.send_close_notify();
    let end = caller.sealed();
    caller
        .socket
        .write_all(&[last, end, b"\x17\x03\x03\0\x20 what is not looked at any more".to_vec()].concat())
        .unwrap();
    let decrypted = accepted.decrypted().unwrap();
    for _ in 0..2 {
        let (got, end) = all_of(decrypted, 64);
        assert!(end.is_ok());
        assert!(got == b"last" || got.is_empty());
    }
}

#[test]
fn answers_of_any_length_arrive_in_the_midst_of_what_comes() {
    let (mut caller, mut accepted) = pair(&credentials());
    for length in [1, 16, 16_384, 16_385, 100_000] {
        let (question, answer) = (random(length), random(length));
        let records = caller.seal(&question);
        // The answer is written while a part of a record has been read, and a whole one not yet.
        let (first, second) = records.split_at(records.len() / 2);
        caller.socket.write_all(first).unwrap();
        let mut got = vec![0; length];
        let early = length / 4;
        if length > 40_000 {
            accepted.read_exact(&mut got[..early]).unwrap();
        }
        accepted.write_all(&answer).unwrap();
        accepted.flush().unwrap();
        let mut heard = vec![0; length];
        caller.hear(&mut heard).unwrap();
        assert!(heard == answer);
        caller.socket.write_all(second).unwrap();
        let from = if length > 40_000 { early } else { 0 };
        accepted.read_exact(&mut got[from..]).unwrap();
        assert!(got == question);
    }
}

#[test]
fn a_peer_may_change_its_keys() {
    let (mut caller, mut accepted) = pair(&credentials());
    for round in 0..3u8 {
        caller.connection.refresh_traffic_keys().unwrap();
        let change = caller.sealed();
        let records = caller.seal(&[round; 100]);
        caller.socket.write_all(&[change, records].concat()).unwrap();
        let mut got = [0; 100];
        accepted.read_exact(&mut got).unwrap();
        assert_eq!(got, [round; 100]);
        // What it wants to be answered goes with the next bytes.
        accepted.write_all(&[round]).unwrap();
        accepted.flush().unwrap();
        let mut heard = [!round];
        caller.hear(&mut heard).unwrap();
        assert_eq!(heard, [round]);
    }
}

#[test]
fn half_of_what_tls_itself_has_to_say_does_no_harm() {
    let (mut caller, mut accepted) = pair(&credentials());
    caller.connection.refresh_traffic_keys().unwrap();
    let change = caller.sealed();
    caller.socket.write_all(&change[..change.len() / 2]).unwrap();
    // It is looked at when something is written.
    accepted.write_all(b"x").unwrap();
    accepted.flush().unwrap();
    caller.hear(&mut [0]).unwrap();
    caller.socket.write_all(&change[change.len() / 2..]).unwrap();
    let records = caller.seal(b"on");
    caller.socket.write_all(&records).unwrap();
    accepted.read_exact(&mut [0; 2]).unwrap();
}

#[test]
fn a_handshake_that_does_not_end_is_bounded() {
    let host = credentials();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let accepting = SharedSocket::from(Socket::from(listener.accept().unwrap().0));
    thread::scope(|scope| {
        let accepted = scope.spawn(|| host.accept(accepting, At::UserSpace, Instant::now() + PATIENCE));
        // A first message that says to be of 16 MiB, in records of 16 KiB.
        let mut record = vec![22, 3, 1, 0x40, 0];
        record.extend([1, 0xff, 0xff, 0xff]);
        record.resize(5 + (16 << 10), 0);
        while !accepted.is_finished() {
            if socket.write_all(&record).is_err() {
                break;
            }
            record[5..9].fill(0);
        }
        assert!(accepted.join().unwrap().is_err());
    });
}
