//! All that a receiver reads before it knows who calls: the preamble, TLS or none, the proof. The first byte
//! says whether it has certificates, and whether the caller has one as well and speaks through TLS, as a host
//! of the same fleet that has no session may. Nobody is let in, and every caller is answered or hung up on.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::preamble::{self, Preamble, Status};
use migration::transport::Token;
use socket2::SockRef;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;
use transport_tcp::tls::{Files, Renewed};
use transport_tcp::{Listener, Protection};
use whimbrel_fuzz::tls;

const TOKEN: Token = Token([7; 16]);

/// A listener without protection, and one with.
fn listeners() -> &'static [Listener; 2] {
    static LISTENERS: OnceLock<[Listener; 2]> = OnceLock::new();
    LISTENERS.get_or_init(|| {
        let folder = tls::folder();
        let renewed = Renewed::new(Files::in_folder(folder.path()), Vec::new());
        let protection = renewed.protection().expect("certificates");
        [Protection::none(), protection].map(|protection| {
            let any = (Ipv4Addr::LOCALHOST, 0).into();
            Listener::bind_protected(1, any, move || Ok(protection.clone())).expect("a listener")
        })
    })
}

/// Says this, and reads what is answered until the end.
fn say(stream: &mut TcpStream, sent: &[u8]) -> io::Result<usize> {
    // The listener may hang up before it has read all.
    let _ = stream.write_all(sent);
    let _ = stream.shutdown(Shutdown::Write);
    stream.read_to_end(&mut Vec::new())
}

/// Says this after a good preamble, and through TLS if the answer to that is that it goes on (a lane of no
/// session is refused before).
fn say_through_tls(stream: &mut TcpStream, preamble: &Preamble, sent: &[u8]) -> io::Result<usize> {
    stream.write_all(&preamble.encrypted(true).encode())?;
    let mut answer = [0; preamble::LEN];
    stream.read_exact(&mut answer)?;
    if Preamble::decode(&answer).map(|answer| answer.status) != Ok(Status::Ok) {
        return stream.read_to_end(&mut Vec::new());
    }
    let mut caller = tls::caller();
    while caller.is_handshaking() {
        caller.complete_io(stream)?;
    }
    let _ = caller.writer().write_all(sent);
    caller.send_close_notify();
    while caller.wants_write() {
        let _ = caller.write_tls(stream);
    }
    let _ = stream.shutdown(Shutdown::Write);
    stream.read_to_end(&mut Vec::new())
}

fuzz_target!(init: whimbrel_fuzz::ignore_broken_pipes(), |bytes: &[u8]| {
    let Some((first, sent)) = bytes.split_first() else { return };
    let listener = &listeners()[usize::from(first & 3 != 0)];
    let mut stream = TcpStream::connect(listener.local_addr()).expect("a connection");
    // So many connections would use up the ports.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
    stream.set_read_timeout(Some(Duration::from_secs(8))).expect("a time-out");
    let ended = match first & 3 {
        0 | 1 => say(&mut stream, sent),
        2 => say_through_tls(&mut stream, &Preamble::control(TOKEN), sent),
        _ => say_through_tls(&mut stream, &Preamble::data(TOKEN, 1, 4), sent),
    };
    if let Err(error) = ended {
        assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "no answer and no end");
    }
    let session = listener.next_control(Duration::ZERO).expect("a listener that listens");
    assert!(session.is_none(), "a caller who has proved nothing was let in");
});
