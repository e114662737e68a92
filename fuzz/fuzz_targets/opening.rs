//! All that a receiver reads before it knows who calls: the preamble, TLS or none, the proof. The first byte
//! says whether it has certificates. Nobody is let in, and every caller is answered or hung up on.

#![no_main]

use libfuzzer_sys::fuzz_target;
use socket2::SockRef;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::OnceLock;
use std::time::Duration;
use transport_tcp::tls::{Files, Renewed};
use transport_tcp::{Listener, Protection};
use whimbrel_fuzz::tls;

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

fuzz_target!(init: whimbrel_fuzz::ignore_broken_pipes(), |bytes: &[u8]| {
    let Some((first, sent)) = bytes.split_first() else { return };
    let listener = &listeners()[usize::from(first & 1)];
    let mut stream = TcpStream::connect(listener.local_addr()).expect("a connection");
    // So many connections would use up the ports.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
    stream.set_read_timeout(Some(Duration::from_secs(8))).expect("a time-out");
    // The listener may hang up before it has read all.
    let _ = stream.write_all(sent);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no answer and no end");
    }
    let session = listener.next_control(Duration::ZERO).expect("a listener that listens");
    assert!(session.is_none(), "a caller who has proved nothing was let in");
});
