//! Why a data connection is of no more use.
//!
//! An error number alone does not tell. A `sendfile` that has moved a part swallows the error that stopped
//! it, and whatever is sent next meets "broken pipe". So TCP itself is asked: a connection that ended because
//! the other side took nothing still has the number of its vain attempts, and says when it last heard
//! anything.

use migration::transport::PlaneError;
use socket2::Socket;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// What TCP knows of a connection.
#[derive(Clone, Copy, Debug)]
struct Knowledge {
    /// Something was sent again, or a closed window probed, without success.
    in_vain: bool,
    /// The peer's host has something to confirm.
    pending: bool,
    /// Since the peer's host confirmed anything.
    heard: Duration,
}

impl Knowledge {
    /// `None` for what is no TCP connection.
    fn of(stream: &Socket) -> Option<Knowledge> {
        let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
        let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes into `info`, which has as many.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &mut length,
            )
        };
        if result != 0 {
            return None;
        }
        // SAFETY: it was zero, which is a value of each of its fields, and the kernel has filled a part.
        let info = unsafe { info.assume_init() };
        Some(Knowledge {
            in_vain: info.tcpi_retransmits > 0 || info.tcpi_probes > 0,
            pending: unconfirmed(stream).is_ok_and(|bytes| bytes > 0),
            heard: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        })
    }
}

/// Bytes that the peer's kernel has not confirmed.
pub(crate) fn unconfirmed(stream: &Socket) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request (SIOCOUTQ by its other name) writes one int, which lives across the call.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    if result == 0 { Ok(bytes.unsigned_abs()) } else { Err(io::Error::last_os_error()) }
}

/// What `error`, which `stream` met while `what` was being done, means for its lane. The peer may have been
/// silent for `patience`.
pub(crate) fn of(stream: &Socket, what: &'static str, error: io::Error, patience: Duration) -> PlaneError {
    explain(Knowledge::of(stream), what, error, patience)
}

fn explain(tcp: Option<Knowledge>, what: &'static str, error: io::Error, patience: Duration) -> PlaneError {
    let waited = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    let gone = matches!(error.kind(), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable);
    let closed = matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof);
    match tcp {
        None if waited => PlaneError::Timeout(patience),
        // A host that has nothing to confirm is silent by right: only the program's answer is missing.
        Some(tcp) if error.kind() == ErrorKind::WouldBlock && !tcp.pending => PlaneError::Timeout(patience),
        // Confirmations of probes come rarer and rarer: half of the time is silence enough.
        Some(tcp) if waited || gone || (closed && tcp.in_vain) => {
            PlaneError::Stalled { what, patience, reachable: !gone && tcp.heard < patience / 2 }
        }
        _ if closed => PlaneError::Closed(what),
        _ if error.kind() == ErrorKind::ConnectionReset => PlaneError::Reset(what),
        _ => PlaneError::Io { what, source: error },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn text(in_vain: bool, heard: u64, error: ErrorKind) -> String {
        let tcp = Knowledge { in_vain, pending: true, heard: Duration::from_secs(heard) };
        explain(Some(tcp), "sending memory", error.into(), PATIENCE).to_string()
    }

    #[test]
    fn a_broken_pipe_has_many_causes() {
        assert!(text(false, 0, ErrorKind::BrokenPipe).contains("the destination closed the connection"));
        assert!(text(true, 1, ErrorKind::BrokenPipe).contains("stopped or stuck"));
        assert!(text(true, 10, ErrorKind::BrokenPipe).contains("the network"));
        assert!(text(true, 1, ErrorKind::TimedOut).contains("stopped or stuck"));
        assert!(text(false, 9, ErrorKind::WouldBlock).contains("the network"));
        assert!(text(true, 1, ErrorKind::HostUnreachable).contains("the network"));
        assert!(text(false, 0, ErrorKind::ConnectionReset).contains("reset"));
    }
}
