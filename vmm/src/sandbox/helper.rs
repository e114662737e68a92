//! A process beside a machine's: it keeps a privilege that the machine's process gives up, and does one thing
//! with it when it is asked to.
//!
//! It is forked while the machine's process has a single thread, and is confined as that is, but for what it
//! is there for. It ends when nobody has the other end of its socket: with the machine.

use super::{Mode, Needs, enter, reader};
use crate::boot_disk::standby::{READY, pair};
use crate::boot_disk::{assert_single, forget_panics};
use crate::lock::lock;
use std::ffi::c_void;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longest question or answer, in bytes.
const MAX_MESSAGE: usize = 16 << 10;
/// Most files that come with an answer.
const MAX_FILES: usize = 16;

/// A process that does something for this one.
#[derive(Clone, Debug)]
pub struct Helper(Arc<Mutex<UnixStream>>);

impl Helper {
    /// Starts it, confined by `mode` to what `needs` names, and has it answer questions by `serve`. To be
    /// called before this process is confined, and while it has a single thread.
    ///
    /// # Errors
    /// The system's answer, also if this process has other threads: a copy of it could find a lock taken for
    /// ever.
    pub fn start(
        mode: Mode,
        needs: &Needs,
        serve: impl FnMut(&[u8]) -> (Vec<u8>, Vec<OwnedFd>),
    ) -> io::Result<Self> {
        assert_single()?;
        let [mut own, other] = pair()?;
        // SAFETY: this process has one thread, as was just seen, so that nothing is half done that the copy
        // could meet, and the copy may do whatever this process may. It never returns from here.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(own);
                stand_by(mode, needs, other, serve)
            }
            _ => {
                drop(other);
                let mut said = vec![0; MAX_MESSAGE];
                let len = own.read(&mut said)?;
                match &said[..len] {
                    READY => Ok(Helper(Arc::new(Mutex::new(own)))),
                    [] => Err(io::Error::other("it has ended at once")),
                    why => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
                }
            }
        }
    }

    /// Asks it; its answer, and the files that come with it.
    ///
    /// # Errors
    /// If it has gone, or the question is too long.
    pub fn ask(&self, question: &[u8]) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        if question.is_empty() || question.len() > MAX_MESSAGE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut socket = lock(&self.0);
        socket.write_all(question)?;
        receive(&socket)?.ok_or_else(|| io::Error::other("the process that is asked has gone"))
    }
}

/// Answers questions in the new process, and ends it.
fn stand_by(
    mode: Mode,
    needs: &Needs,
    mut socket: UnixStream,
    mut serve: impl FnMut(&[u8]) -> (Vec<u8>, Vec<OwnedFd>),
) -> ! {
    forget_panics();
    // Signals of the terminal are for the machine.
    // SAFETY: takes nothing.
    unsafe { libc::setsid() };
    let closed = reader::close_others(&[socket.as_raw_fd(), libc::STDERR_FILENO]);
    let confined = closed.and_then(|()| enter(mode, needs)).map_err(|error| error.to_string());
    let said = socket.write_all(confined.as_ref().err().map_or(READY, |why| why.as_bytes()));
    if confined.is_ok() && said.is_ok() {
        while let Ok(Some((question, _))) = receive(&socket) {
            let (answer, files) = serve(&question);
            let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
            let sent = socket.send_with_fds(&[&answer[..]], &files);
            if sent.is_err() {
                break;
            }
        }
    }
    // SAFETY: the call takes an integer. Nothing that this process has is to be put in order.
    unsafe { libc::_exit(0) }
}

/// The next message with its files; `None` when nobody is left to send one.
fn receive(socket: &UnixStream) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut message = vec![0; MAX_MESSAGE];
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
                message.truncate(len);
                return Ok((len > 0).then_some((message, files)));
            }
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_copied() {
        let started = Helper::start(Mode::Off, &Needs::default(), |_| Default::default());
        assert!(started.unwrap_err().to_string().contains("other threads"));
    }
}
