//! Standard input as a guest's keyboard: `--serial stdio`.
//!
//! A terminal's own keys (Ctrl-C, Ctrl-Z, line editing) go to the guest as well. Only Ctrl-A is kept for the
//! operator of the machine, as in QEMU.

use anyhow::Context;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm::Error;
use vmm::serial::SerialPort;

const ESCAPE: u8 = 1; // Ctrl-A
const QUIT: u8 = b'x';

/// What the terminal was set to before; while it is set to something else.
static BEFORE: Mutex<Option<libc::termios>> = Mutex::new(None);

fn before() -> MutexGuard<'static, Option<libc::termios>> {
    // Nothing that holds it can leave it half changed.
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A terminal that a guest has; dropping this gives it back.
pub struct Terminal(());

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Feeds standard input to a serial port. A terminal is raw as long as what is returned exists.
pub fn connect(port: &SerialPort) -> anyhow::Result<Terminal> {
    let input = open().context("cannot read standard input")?;
    let terminal = Terminal(());
    if io::stdin().is_terminal() {
        make_raw().context("cannot set the terminal up")?;
        let mut keys = Keys::default();
        port.attach_input(input, move |byte| keys.press(byte, quit)).map_err(Error::Thread)?;
    } else {
        port.attach_input(input, Some).map_err(Error::Thread)?;
    }
    Ok(terminal)
}

/// Gives the terminal back, if it was taken.
pub fn restore() {
    if let Some(before) = before().take() {
        // SAFETY: the settings are those that the terminal had. If it has gone, there is nothing to be
        // restored.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &before) };
    }
}

/// Standard input, opened once more: reading must not block, and whoever else has it must not notice.
fn open() -> io::Result<File> {
    let again =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open("/proc/self/fd/0");
    // A socket cannot be opened, nor can another user's terminal.
    again.or_else(|_| io::stdin().as_fd().try_clone_to_owned().map(File::from))
}

/// Passes every key on as it is; what this host writes still begins at the left.
fn make_raw() -> io::Result<()> {
    let fd = io::stdin().as_raw_fd();
    let mut settings = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the structure lives across the call, which fills it in if it succeeds.
    let before = unsafe {
        if libc::tcgetattr(fd, settings.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        settings.assume_init()
    };
    let mut raw = before;
    // SAFETY: the structure lives across the call.
    unsafe { libc::cfmakeraw(&mut raw) };
    raw.c_oflag = before.c_oflag;
    *self::before() = Some(before);
    // SAFETY: the structure lives across the call.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// As Ctrl-C would, were it not the guest's.
fn quit() {
    // Fails for no signal that there is.
    let _ = signal_hook::low_level::raise(libc::SIGINT);
}

#[derive(Default)]
struct Keys {
    /// The last key was the escape.
    escaped: bool,
}

impl Keys {
    /// What of a key goes to the guest.
    fn press(&mut self, byte: u8, quit: impl FnOnce()) -> Option<u8> {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => self.escaped = true,
            (true, QUIT) => quit(),
            (true, ESCAPE) | (false, _) => return Some(byte),
            (true, _) => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_is_not_the_guest_s() {
        let mut keys = Keys::default();
        let mut quits = 0;
        let passed: Vec<_> = b"a\x01\x01b\x01qx\x03\x01xc"
            .iter()
            .filter_map(|byte| keys.press(*byte, || quits += 1))
            .collect();
        assert_eq!((passed.as_slice(), quits), (&b"a\x01bx\x03c"[..], 1));
    }
}
