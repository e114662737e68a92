//! What a process says when it is ended for a system call that takes over hosts or processes.
//!
//! The kernel does not carry the call out, and sends SIGSYS instead. The handler says which call it was, and
//! then lets the same signal end the process. The filter keeps the handler from being exchanged; a thread
//! that blocks the signal is ended by it all the same.

use super::calls;
use std::io;
use std::mem::MaybeUninit;

/// Installs the handler.
///
/// # Errors
/// The kernel's answer.
pub fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid value of the structure: no flags, and no signals blocked.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handle as *const () as usize;
    // Once: within the handler, the signal already ends the process.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER | libc::SA_ONSTACK;
    // SAFETY: the structure lives across the call, and the handler makes none but system calls.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Where the structure has the number of the call, in this signal's form of it.
    const CALL: usize = 24;
    // SAFETY: the kernel hands over a whole structure, of 128 bytes, for as long as this runs.
    let call = unsafe { info.cast::<u8>().add(CALL).cast::<libc::c_int>().read() };
    let mut thread = [0u8; 16];
    // SAFETY: the call writes at most 16 bytes, with a zero at the end.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr(), 0, 0, 0) };
    let thread = thread.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut digits = [0; 10];
    let message = [
        b"whimbrel: the thread \"",
        thread,
        b"\" was about to make system call ",
        decimal(call.unsigned_abs(), &mut digits),
        b" (",
        calls::name(call.into()).as_bytes(),
        b"), which nothing here needs and which takes over processes or hosts: the sandbox ends this process. If \
          no attack is behind it, report it; --seccomp off runs without the sandbox\n",
    ];
    for piece in message {
        // SAFETY: the piece lives across the call. Nobody is left to tell of a failure.
        unsafe { libc::write(libc::STDERR_FILENO, piece.as_ptr().cast(), piece.len()) };
    }
    // SAFETY: the calls take integers. The signal's default action ends the process here.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGSYS) };
    // SAFETY: as above. Not reached unless the signal is blocked.
    unsafe { libc::_exit(128 + libc::SIGSYS) };
}

/// A number in decimal, without allocating.
fn decimal(mut number: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_out() {
        for number in [0, 9, 59, u32::MAX] {
            assert_eq!(decimal(number, &mut [0; 10]), number.to_string().as_bytes());
        }
    }
}
