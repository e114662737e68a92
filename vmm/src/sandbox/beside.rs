//! Processes beside a machine's: forked while that has a single thread, confined, and asked by a socket for
//! as long as the machine is there.

use std::ffi::c_void;
use std::fmt::Display;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// What such a process says when it is confined. Otherwise it says why not.
const READY: &[u8] = b".";

/// Most bytes of what it says then.
const MAX_SAID: usize = 16 << 10;

/// Most files that come with a message.
const MAX_FILES: usize = 16;

/// Forks a process that runs `child`, which [begins](begin). Returns the end of a socket by which it is
/// asked. The socket keeps messages apart. Errors call the process `what`.
///
/// # Errors
/// The system's answer, also if this process has other threads: a copy of it could find a lock taken for
/// ever. What the new process says instead of being ready.
pub fn fork(what: &str, child: impl FnOnce(UnixStream)) -> io::Result<UnixStream> {
    assert_single()?;
    let [mut own, other] = pair()?;
    // SAFETY: this process has one thread, as was just seen, so that nothing is half done that the copy
    // could meet, and the copy may do whatever this process may. It never returns from here, unless `child`
    // panics.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(own);
            child(other);
            // SAFETY: the call takes an integer. Nothing that this process has is to be put in order.
            unsafe { libc::_exit(0) }
        }
        _ => {
            drop(other);
            let mut said = vec![0; MAX_SAID];
            let len = own.read(&mut said)?;
            match &said[..len] {
                READY => Ok(own),
                [] => Err(io::Error::other(format!("{what} has ended at once"))),
                why => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
            }
        }
    }
}

/// Begins in the new process: `confine` confines it, and the one that has forked it is told. Whether it is
/// confined, and is wanted.
pub fn begin<E: Display>(socket: &mut UnixStream, confine: impl FnOnce() -> Result<(), E>) -> bool {
    forget_panics();
    // Signals of the terminal are for the machine.
    // SAFETY: takes nothing.
    unsafe { libc::setsid() };
    let confined = confine().map_err(|error| error.to_string());
    let said = socket.write_all(confined.as_ref().err().map_or(READY, |why| why.as_bytes()));
    confined.is_ok() && said.is_ok()
}

/// The next message, its length, and the files that come with it; `None` when nobody is left to send one.
///
/// # Errors
/// The system's answer.
pub fn receive(socket: &UnixStream, message: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    loop {
        let mut pieces =
            [libc::iovec { iov_base: message.as_mut_ptr().cast::<c_void>(), iov_len: message.len() }];
        let mut files: [RawFd; MAX_FILES] = [-1; MAX_FILES];
        // SAFETY: the piece is all of `message`, which is borrowed until the call returns.
        match unsafe { socket.recv_with_fds(&mut pieces, &mut files) } {
            Ok((len, count)) => {
                // SAFETY: these were just received, and nobody else knows them.
                let files =
                    files[..count].iter().map(|file| unsafe { OwnedFd::from_raw_fd(*file) }).collect();
                return Ok((len > 0).then_some((len, files)));
            }
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}

/// Nothing if this process has one thread.
pub fn assert_single() -> io::Result<()> {
    match std::fs::read_dir("/proc/self/task")?.count() {
        1 => Ok(()),
        _ => Err(io::Error::other("this process has other threads by now")),
    }
}

/// What a panic says is for this process's own error output, which it no longer has.
pub fn forget_panics() {
    panic::set_hook(Box::new(|_| {}));
}

/// Two ends of a socket that keeps messages apart.
fn pair() -> io::Result<[UnixStream; 2]> {
    let mut ends = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two integers, which live across it.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just opened, and nobody else knows them.
    Ok(ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) }.into()))
}
