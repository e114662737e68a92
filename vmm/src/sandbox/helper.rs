//! A process beside a machine's: it keeps a privilege that the machine's process gives up, and does one thing
//! with it when it is asked to.
//!
//! It is forked while the machine's process has a single thread, and is confined as that is, but for what it
//! is there for. It ends when nobody has the other end of its socket: with the machine.

use super::{Mode, Needs, beside, enter, reader};
use crate::lock::lock;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longest question or answer, in bytes.
const MAX_MESSAGE: usize = 16 << 10;

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
        let socket = beside::fork("it", |socket| stand_by(mode, needs, socket, serve))?;
        Ok(Helper(Arc::new(Mutex::new(socket))))
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
        let mut answer = vec![0; MAX_MESSAGE];
        let received = beside::receive(&socket, &mut answer)?;
        let (len, files) = received.ok_or_else(|| io::Error::other("the process that is asked has gone"))?;
        answer.truncate(len);
        Ok((answer, files))
    }
}

/// Answers questions in the new process.
fn stand_by(
    mode: Mode,
    needs: &Needs,
    mut socket: UnixStream,
    mut serve: impl FnMut(&[u8]) -> (Vec<u8>, Vec<OwnedFd>),
) {
    let kept = [socket.as_raw_fd(), libc::STDERR_FILENO];
    if beside::begin(&mut socket, || reader::close_others(&kept).and_then(|()| enter(mode, needs))) {
        let mut question = vec![0; MAX_MESSAGE];
        while let Ok(Some((len, _))) = beside::receive(&socket, &mut question) {
            let (answer, files) = serve(&question[..len]);
            let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
            let sent = socket.send_with_fds(&[&answer[..]], &files);
            if sent.is_err() {
                break;
            }
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
