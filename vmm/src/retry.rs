//! System calls that a signal may interrupt.

use std::io;

/// Makes a system call, again for as long as a signal interrupts it. `clippy.toml` holds that those which the
/// kernel may interrupt are made through this.
macro_rules! retry {
    ($call:expr) => {{
        #[allow(clippy::disallowed_methods)] // only here
        let call = || $call;
        $crate::retry::repeat(call)
    }};
}
pub(crate) use retry;

/// What [`retry`] does.
pub(crate) fn repeat<T: Copy + Default + PartialOrd>(mut call: impl FnMut() -> T) -> io::Result<T> {
    loop {
        let result = call();
        if result >= T::default() {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says of a call that it failed.
    fn fail(with: libc::c_int) -> libc::c_int {
        // SAFETY: the pointer is to this thread's own number.
        unsafe { *libc::__errno_location() = with };
        -1
    }

    #[test]
    fn what_is_interrupted_is_done_again_and_what_fails_is_not() {
        let mut calls = 0;
        let mut after = |times, then: fn() -> libc::c_int| {
            calls = 0;
            repeat(|| {
                calls += 1;
                if calls <= times { fail(libc::EINTR) } else { then() }
            })
        };
        assert_eq!(after(3, || 7).unwrap(), 7);
        assert_eq!(after(2, || fail(libc::EBADF)).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(calls, 3);
    }
}
