//! Waiting for file descriptors.

use std::os::fd::RawFd;

/// Waits, for at most `timeout_ms` milliseconds or for ever if that is negative, until one of `fds` is ready
/// for `events` or will never be. Those that are `None` are left out. False if none is: the time is over, or
/// a signal has ended the wait early.
pub(crate) fn poll<const N: usize>(
    fds: [Option<RawFd>; N],
    events: libc::c_short,
    timeout_ms: libc::c_int,
) -> bool {
    // A negative descriptor is one that poll(2) leaves out.
    let mut fds = fds.map(|fd| libc::pollfd { fd: fd.unwrap_or(-1), events, revents: 0 });
    // A signal is to end the wait, as it may ask a vCPU to pause.
    #[allow(clippy::disallowed_methods)]
    // SAFETY: that many pollfds are there, which live across the call.
    unsafe {
        libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, timeout_ms) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::os::fd::AsRawFd;

    #[test]
    fn what_is_ready_ends_the_wait() {
        let (reader, mut writer) = io::pipe().unwrap();
        assert!(!poll([Some(reader.as_raw_fd()), None], libc::POLLIN, 0));
        assert!(poll([Some(writer.as_raw_fd())], libc::POLLOUT, -1));
        writer.write_all(b"x").unwrap();
        assert!(poll([None, Some(reader.as_raw_fd())], libc::POLLIN, -1));
        drop(reader);
        assert!(poll([Some(writer.as_raw_fd())], libc::POLLOUT, -1), "it never takes anything again");
    }
}
