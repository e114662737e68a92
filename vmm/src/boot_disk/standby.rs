//! Reading a guest's disk when the guest reboots, in a process of its own.
//!
//! By then the machine has threads, and may start no process. So one is forked before, while there is a
//! single thread. It waits on a socket, and forks once more for each disk that it is to have read: that
//! process takes the disk's open file and one end of a pipe along, gives up what it does not need for that
//! disk (`sandbox::reader`), and answers as [`apart`](super::apart) tells. The one that waits looks at no
//! disk, and ends when nobody has the other end of the socket: with the machine.

use super::apart::{answer, fate, take};
use super::{Boot, Error, find};
use crate::lock::lock;
use crate::sandbox::{Mode, beside, reader};
use crate::virtio::block::{DiskImage, Geometry};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longest request, in bytes: a path, a command line, and a few numbers.
const MAX_REQUEST: usize = 64 << 10;

/// Seconds that reading a disk may take. The machine can neither be paused nor moved meanwhile.
const SECONDS: u32 = 300;

/// What is to be read. The disk's file and the pipe for the answer come with it.
#[derive(Serialize, Deserialize)]
struct Request {
    path: PathBuf,
    geometry: Geometry,
    alignment: usize,
    index: usize,
    cmdline: String,
}

/// A process that waits for disks to read.
#[derive(Clone, Debug)]
pub struct BootReader(Arc<Mutex<UnixStream>>);

impl BootReader {
    /// Starts it, confined by `mode`. To be called before this process is confined, and while it has a single
    /// thread.
    ///
    /// # Errors
    /// The system's answer, also if this process has other threads: a copy of it could find a lock taken for
    /// ever.
    pub fn start(mode: Mode) -> io::Result<Self> {
        let socket = beside::fork("the process that reads disks", |socket| stand_by(mode, socket))?;
        Ok(BootReader(Arc::new(Mutex::new(socket))))
    }

    /// Has an image read that is open and under its lock.
    pub(crate) fn read(&self, image: &DiskImage, index: usize, cmdline: &str) -> Result<Boot, Error> {
        let path = image.path().to_path_buf();
        let failed = |what: String| Error::Reader { path: path.clone(), what };
        let gone = |error: io::Error| failed(format!("the process that reads it has gone ({error})"));
        let request = Request {
            path: path.clone(),
            geometry: image.geometry(),
            alignment: image.alignment(),
            index,
            cmdline: cmdline.into(),
        };
        let request = postcard::to_stdvec(&request).map_err(|error| failed(error.to_string()))?;
        if request.len() > MAX_REQUEST {
            return Err(failed("its path and command line are too long".into()));
        }
        let mut socket = lock(&self.0);
        let (answer, question) = io::pipe().map_err(gone)?;
        socket
            .send_with_fds(&[&request[..]], &[image.fd(), question.as_raw_fd()])
            .map_err(|error| gone(io::Error::from_raw_os_error(error.errno())))?;
        drop(question);
        let taken = take(answer);
        if taken.is_err() && !ended_early(&taken) {
            // It says what makes no sense: nothing is asked of it any more, and nobody waits for it.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        // How the one that read has ended. Without it, the next would take it for its own.
        let mut status = [0; 4];
        let ended = socket.read_exact(&mut status).ok();
        let ended = ended.map(|()| ExitStatus::from_raw(i32::from_le_bytes(status)));
        match taken {
            Ok(Ok(gathered)) => gathered.into_boot().map_err(|error| failed(error.to_string())),
            Ok(Err(told)) => Err(Error::Told(told)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(failed(fate(ended))),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

fn ended_early<T>(taken: &io::Result<T>) -> bool {
    taken.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
}

/// Waits for requests in the new process.
fn stand_by(mode: Mode, mut socket: UnixStream) {
    let size = reader::size();
    let end_of_socket = socket.as_raw_fd();
    let confine = || {
        wake_by_alarm();
        reader::stand_by(mode, end_of_socket)
    };
    if beside::begin(&mut socket, confine) {
        let mut request = vec![0; MAX_REQUEST];
        while let Some((len, files)) = next(&socket, &mut request) {
            // SAFETY: there is one thread.
            let child = match unsafe { libc::fork() } {
                0 => serve(mode, size, &request[..len], files),
                child => child,
            };
            drop(files);
            let status = if child > 0 { end(child) } else { libc::SIGABRT };
            if socket.write_all(&status.to_le_bytes()).is_err() {
                break;
            }
        }
    }
}

/// Has SIGALRM interrupt what this process waits for.
fn wake_by_alarm() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all zeros is a valid value of the structure: no flags, and no signals blocked.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = nothing as *const () as usize;
    // SAFETY: the structure lives across the call, and the handler does nothing.
    unsafe { libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()) };
}

/// Waits for the end of a child, and brings it about if it takes too long; its status.
fn end(child: libc::pid_t) -> libc::c_int {
    let mut status = libc::SIGABRT;
    // SAFETY: the calls take integers, and one writes an int, which lives across it. Nobody else has waited
    // for the child, so the number is its own.
    unsafe {
        libc::alarm(SECONDS);
        while libc::waitpid(child, &mut status, 0) != child
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {
            libc::kill(child, libc::SIGKILL);
        }
        libc::alarm(0);
    }
    status
}

/// The next request, and the disk and the pipe that come with it; `None` when there will be none.
fn next(socket: &UnixStream, request: &mut [u8]) -> Option<(usize, [OwnedFd; 2])> {
    let (len, files) = beside::receive(socket, request).ok()??;
    Some((len, files.try_into().ok()?))
}

/// Answers in a further process, and ends it.
fn serve(mode: Mode, size: u64, request: &[u8], files: [OwnedFd; 2]) -> ! {
    let [disk, question] = files;
    let confined = reader::narrow(mode, size, disk.as_raw_fd(), question.as_raw_fd());
    let request = postcard::from_bytes::<Request>(request);
    answer(question.into(), |sink| {
        confined.map_err(|error| error.to_string())?;
        let Request { path, geometry, alignment, index, cmdline } =
            request.map_err(|error| error.to_string())?;
        let image = DiskImage::to_be_read(path.clone(), File::from(disk), geometry, alignment);
        // It is not closed: this process may not even do that.
        let image = ManuallyDrop::new(Rc::new(image));
        find(&image, &path, index, &cmdline, sink).map_err(|error| error.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_copied() {
        let refused = BootReader::start(Mode::Off).map(drop).unwrap_err();
        assert!(refused.to_string().contains("other threads"), "{refused}");
    }
}
