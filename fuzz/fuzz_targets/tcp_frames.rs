//! What a source sends on a lane, behind its preamble: frames of writes, zeros and barriers. What is placed
//! stays inside memory, and the fence returns.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::memory::{Ram, RegionLayout};
use migration::preamble::Preamble;
use migration::transport::{DestinationTransport, Session, Token};
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use transport_tcp::TcpDestination;
use transport_tcp::frame::{self, Header, UNIT};

const TOKEN: Token = Token([7; 16]);

fn ram() -> Arc<Ram> {
    static RAM: OnceLock<Arc<Ram>> = OnceLock::new();
    let layout =
        [(0, 1 << 20), (1 << 32, 4 << 20)].map(|(guest_address, len)| RegionLayout { guest_address, len });
    RAM.get_or_init(|| Arc::new(Ram::allocate(&layout).expect("memory"))).clone()
}

/// Bytes that the other end has not read.
fn unread(stream: &UnixStream) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, writes an integer.
    let asked = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    if asked == 0 { bytes } else { 0 }
}

fuzz_target!(init: whimbrel_fuzz::ignore_broken_pipes(), |frames: &[u8]| {
    for unit in frames.as_chunks::<UNIT>().0 {
        if let Ok(header) = Header::decode(unit) {
            assert_eq!(header.encode(), *unit);
        }
        let _ = ram().check(&frame::get_extent(unit));
    }
    let (mut source, destination) = UnixStream::pair().expect("a pair of sockets");
    let mut transport = TcpDestination::from_streams([destination]).expect("a lane");
    let session = Session::new(TOKEN, ram(), Duration::from_secs(5));
    let (_, mut plane) = transport.offer(&session).expect("an offer");
    // A lane that is shut for what it was sent takes no more.
    let preamble = Preamble::data(TOKEN, 0, 1).encode();
    let proof = session.secret.proof(&preamble);
    let _ = source.write_all(&[&preamble[..], &proof, frames].concat());
    let _ = source.shutdown(Shutdown::Write);
    // Until the lane has taken it all, or has refused it.
    while unread(&source) != 0 && plane.error().is_none() {
        std::thread::yield_now();
    }
    plane.fence().expect("a fence");
});
