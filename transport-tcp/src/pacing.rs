//! Avoids pacing where it gains nothing.
//!
//! BBR sends by a clock: the kernel sets a timer for every few packets, so that the queues of a long line
//! stay short. On a short line there are no such queues, and the timers only cost. Over loopback in a virtual
//! machine, where setting one leaves the machine, they took half of what a migration can carry; see
//! `docs/measurements.md`. So data streams of a host whose default is BBR use another algorithm if their peer
//! is near. Every other default stays, because a network may depend on it (DCTCP), and so does BBR on long
//! lines.

use socket2::Socket;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// A peer is near up to this round trip: within a site, where queues are short.
const NEAR: Duration = Duration::from_millis(2);

/// What replaces BBR, best first: Linux's usual choice, and the one that every user may choose.
const UNPACED: [&[u8]; 2] = [b"cubic", b"reno"];

/// Stops pacing on a connection that has had its first exchange, if pacing gains nothing there. If the round
/// trip is unknown, or the algorithm cannot be changed, the connection stays as it is: slower, but working.
pub fn stop_if_near(socket: &Socket) {
    let paces = socket.tcp_congestion().is_ok_and(|name| name.starts_with(b"bbr"));
    if paces && least_round_trip(socket).is_ok_and(|time| time <= NEAR) {
        UNPACED.iter().any(|name| socket.set_tcp_congestion(name).is_ok());
    }
}

/// The shortest round trip that the kernel has seen on this connection.
fn least_round_trip(socket: &Socket) -> io::Result<Duration> {
    // SAFETY: the structure is of integers only, for which zero is a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    // A kernel that does not know the figure leaves it as it is.
    info.tcpi_min_rtt = u32::MAX;
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of the structure that the pointer is
    // to.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::from_micros(info.tcpi_min_rtt.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn algorithm(stream: &Socket) -> String {
        let name = stream.tcp_congestion().unwrap();
        String::from_utf8(name).unwrap().trim_end_matches('\0').into()
    }

    /// A connection over loopback after one exchange, which began with `first`.
    fn near(first: &str) -> io::Result<Socket> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut stream = Socket::from(TcpStream::connect(listener.local_addr()?)?);
        stream.set_tcp_congestion(first.as_bytes())?;
        let (mut peer, _) = listener.accept()?;
        stream.write_all(b"?")?;
        peer.read_exact(&mut [0])?;
        peer.write_all(b"!")?;
        stream.read_exact(&mut [0])?;
        Ok(stream)
    }

    #[test]
    fn loopback_is_near() {
        let stream = near("reno").unwrap();
        let time = least_round_trip(&stream).unwrap();
        assert!(!time.is_zero() && time < Duration::from_secs(1), "{time:?}");
    }

    #[test]
    fn only_bbr_is_replaced() {
        let stream = near("reno").unwrap();
        stop_if_near(&stream);
        assert_eq!(algorithm(&stream), "reno");
        match near("bbr") {
            Ok(stream) => {
                stop_if_near(&stream);
                assert!(["cubic", "reno"].contains(&algorithm(&stream).as_str()), "{}", algorithm(&stream));
            }
            Err(why) => println!("SKIPPED: this kernel gives no BBR ({why})"),
        }
    }
}
