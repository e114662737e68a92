//! One reason to stop, seen by every thread of a plane.

use migration::transport::PlaneError;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Why a plane stopped; what [`PlaneError`] is made of, since that cannot be cloned.
#[derive(Debug)]
pub(crate) enum HaltReason {
    Interrupted,
    Io { what: &'static str, text: String },
    Protocol(String),
    Unavailable(String),
}

impl HaltReason {
    pub(crate) fn error(&self) -> PlaneError {
        match self {
            HaltReason::Interrupted => PlaneError::Interrupted,
            HaltReason::Io { what, text } => PlaneError::Io { what, source: io::Error::other(text.clone()) },
            HaltReason::Protocol(text) => PlaneError::Protocol(text.clone()),
            HaltReason::Unavailable(text) => PlaneError::Unavailable(text.clone()),
        }
    }
}

impl From<&PlaneError> for HaltReason {
    fn from(error: &PlaneError) -> Self {
        match error {
            PlaneError::Interrupted => HaltReason::Interrupted,
            PlaneError::Io { what, source } => HaltReason::Io { what, text: source.to_string() },
            PlaneError::Unavailable(text) => HaltReason::Unavailable(text.clone()),
            other => HaltReason::Protocol(other.to_string()),
        }
    }
}

/// A reason to stop, set once and for good. The first one stays, since those that come later follow from it.
pub(crate) struct Halt {
    reason: OnceLock<HaltReason>,
    /// Becomes readable with the reason, and is never read, so that it wakes every `poll` now and later.
    event: OwnedFd,
}

impl Halt {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else has it.
        Ok(Halt { reason: OnceLock::new(), event: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Stops everything that looks here.
    pub(crate) fn halt(&self, reason: HaltReason) {
        // A second reason is dropped.
        let _ = self.reason.set(reason);
        let one = 1u64;
        // SAFETY: eight bytes of a local. It fails only when the counter is full, and thus readable.
        unsafe { libc::write(self.event.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// The reason, if there is one.
    pub(crate) fn reason(&self) -> Option<&HaltReason> {
        self.reason.get()
    }

    /// Fails once there is a reason.
    ///
    /// # Errors
    /// The reason.
    pub(crate) fn check(&self) -> Result<(), PlaneError> {
        self.reason.get().map_or(Ok(()), |reason| Err(reason.error()))
    }

    /// Readable once halted.
    pub(crate) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// Waits until some of `fds` can be read or have failed, and says which. `None` at `deadline`; without one it
/// waits for ever.
pub(crate) fn wait_readable<const N: usize>(
    fds: [RawFd; N],
    deadline: Option<Instant>,
) -> io::Result<Option<[bool; N]>> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    loop {
        let left = match deadline {
            None => -1,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                // Rounded up, so that a wait of half a millisecond does not become a spin.
                (left + Duration::from_micros(999)).as_millis().min(i32::MAX as u128) as i32
            }
        };
        // SAFETY: the pointer and the count describe a local array.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, left) };
        if ready > 0 {
            return Ok(Some(polled.map(|p| p.revents != 0)));
        }
        if ready == 0 {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            continue;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes reads of a descriptor return at once.
pub(crate) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl with these commands takes no pointers.
    let result = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Locks a mutex even if a holder has panicked: what these guard is consistent between any two statements.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays_and_wakes_everybody() {
        let halt = Halt::new().unwrap();
        assert!(halt.check().is_ok());
        let soon = Some(Instant::now() + Duration::from_millis(5));
        assert_eq!(wait_readable([halt.fd()], soon).unwrap(), None);
        halt.halt(HaltReason::Interrupted);
        halt.halt(HaltReason::Protocol("later".into()));
        for _ in 0..2 {
            assert_eq!(wait_readable([halt.fd()], None).unwrap(), Some([true]));
            assert!(matches!(halt.check(), Err(PlaneError::Interrupted)));
        }
    }
}
