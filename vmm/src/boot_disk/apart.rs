//! Reading a disk in a process of its own, which can read the disk and answer, and nothing else.
//!
//! The process is a fork of this one, made while this one has a single thread. It gives up what it does not
//! need (`sandbox::reader`) before it looks at the disk, so that a file system which misleads its reader
//! gains nothing, and one which kills it costs no more than an error here. What it answers is not trusted
//! either.

use super::filesystem::PIECE;
use super::{Boot, Error, Gathered, MAX_TEXT, Part, Sink, find, open};
use crate::sandbox::beside::{assert_single, forget_panics};
use crate::sandbox::{Mode, reader};
use crate::virtio::block::{BlockConfig, DiskImage, Images};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitStatus;
use std::rc::Rc;

/// What an answer consists of: each piece is a byte that says what it is, its length in four bytes, and so
/// many bytes.
const KERNEL: u8 = b'k';
const INITRAMFS: u8 = b'i';
const CMDLINE: u8 = b'c';
/// The last piece: all is there, or what is wrong.
const DONE: u8 = b'.';
const FAILED: u8 = b'!';

/// Reads as [`read`](super::read) does, a disk that is one of `images`, in a process that `mode` confines to
/// that.
///
/// # Errors
/// [`Error`]. [`Error::Reader`] if that process ends before it has answered, and if this process has other
/// threads: a copy of it could find a lock taken for ever.
pub fn read_apart(
    disk: &BlockConfig,
    images: &Images,
    index: usize,
    cmdline: &str,
    mode: Mode,
) -> Result<Boot, Error> {
    let image = open(disk, images)?;
    let failed = |what: String| Error::Reader { path: image.path().into(), what };
    let system = |error: io::Error| failed(format!("no process can be started for it ({error})"));
    assert_single().map_err(system)?;
    let (answer, question) = io::pipe().map_err(system)?;
    // SAFETY: this process has one thread, as was just seen, so that nothing is half done that the copy
    // could meet, and the copy may do whatever this process may. It never returns from here.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(system(io::Error::last_os_error())),
        0 => {
            drop(answer);
            serve(&image, index, cmdline, mode, question)
        }
        child => {
            drop(question);
            let taken = take(answer);
            if !matches!(taken, Ok(Ok(_))) {
                // Whatever it may still want to say.
                // SAFETY: the call takes integers. Nobody has waited for the child, so the number is its own.
                unsafe { libc::kill(child, libc::SIGKILL) };
            }
            let ended = wait(child);
            match taken {
                Ok(Ok(gathered)) => gathered.into_boot().map_err(|error| failed(error.to_string())),
                Ok(Err(told)) => Err(Error::Told(told)),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(failed(fate(ended))),
                Err(error) => Err(failed(error.to_string())),
            }
        }
    }
}

/// Answers in the new process, and ends it.
fn serve(image: &Rc<DiskImage>, index: usize, cmdline: &str, mode: Mode, question: PipeWriter) -> ! {
    forget_panics();
    let confined = reader::confine(mode, image.fd(), question.as_raw_fd());
    answer(question, |sink| {
        confined.map_err(|error| error.to_string())?;
        find(image, image.path(), index, cmdline, sink).map_err(|error| error.to_string())
    })
}

/// Answers with what `read` gives its sink, or with what it says is wrong, and ends this process.
pub(super) fn answer(mut answer: PipeWriter, read: impl FnOnce(&mut Sink<'_>) -> Result<(), String>) -> ! {
    let read = panic::catch_unwind(AssertUnwindSafe(|| {
        read(&mut |part, piece: &[u8]| put(&mut answer, kind(part), piece))
    }));
    // Whoever asked may have gone.
    let _ = match read {
        Ok(Ok(())) => put(&mut answer, DONE, &[]),
        Ok(Err(what)) => put(&mut answer, FAILED, what.as_bytes()),
        Err(_) => put(&mut answer, FAILED, PANICKED.as_bytes()),
    };
    // SAFETY: the call takes an integer. Nothing that this process has is to be put in order.
    unsafe { libc::_exit(0) }
}

/// What is said if reading panics.
const PANICKED: &str = "the file systems of the disk image are such that their reader fails; check them, or pass \
                        --kernel and --initramfs";

fn kind(part: Part) -> u8 {
    match part {
        Part::Kernel => KERNEL,
        Part::Initramfs => INITRAMFS,
        Part::Cmdline => CMDLINE,
    }
}

fn put(answer: &mut PipeWriter, kind: u8, piece: &[u8]) -> io::Result<()> {
    let len = u32::try_from(piece.len()).map_err(io::Error::other)?;
    let mut head = [kind; 5];
    head[1..].copy_from_slice(&len.to_le_bytes());
    answer.write_all(&head)?;
    answer.write_all(piece)
}

/// Reads an answer: what there is to boot, or what is wrong.
pub(super) fn take(mut answer: PipeReader) -> io::Result<Result<Gathered, String>> {
    let mut gathered = Gathered::default();
    let mut piece = Vec::new();
    loop {
        let mut head = [0; 5];
        answer.read_exact(&mut head)?;
        let [kind, len @ ..] = head;
        let len = u32::from_le_bytes(len) as usize;
        if len > PIECE {
            return Err(io::Error::other("its reader answers out of turn"));
        }
        piece.resize(len, 0);
        answer.read_exact(&mut piece)?;
        match kind {
            KERNEL => gathered.add(Part::Kernel, &piece)?,
            INITRAMFS => gathered.add(Part::Initramfs, &piece)?,
            CMDLINE => gathered.add(Part::Cmdline, &piece)?,
            DONE => return Ok(Ok(gathered)),
            FAILED => return Ok(Err(printable(&piece))),
            _ => return Err(io::Error::other("its reader answers out of turn")),
        }
    }
}

/// A message for a terminal, which is not to be misled either.
fn printable(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(&text[..text.len().min(MAX_TEXT as usize)]);
    text.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect()
}

/// Waits for the end of a child; `None` if the system keeps no record of it.
fn wait(child: libc::pid_t) -> Option<ExitStatus> {
    let mut status = 0;
    loop {
        // SAFETY: the call writes one int, which lives across it.
        if unsafe { libc::waitpid(child, &mut status, 0) } == child {
            return Some(ExitStatus::from_raw(status));
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

/// What became of a reader that ended before it had answered.
pub(super) fn fate(ended: Option<ExitStatus>) -> String {
    let Some(status) = ended else { return "its reader has ended".into() };
    let Some(signal) = status.signal() else { return format!("its reader has ended ({status})") };
    let why = match signal {
        libc::SIGABRT => "it needs more memory than it may have, or found an error in itself",
        libc::SIGXCPU | libc::SIGKILL => "it took too long",
        // Also those by which a process reports that it has no memory left.
        libc::SIGSYS => "it made a system call that it has no business with, or has no memory left",
        _ => "it failed",
    };
    format!("its reader was ended by signal {signal}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of an answer that consists of these bytes.
    fn taken(bytes: &[u8]) -> io::Result<Result<Gathered, String>> {
        let (answer, mut question) = io::pipe().unwrap();
        question.write_all(bytes).unwrap();
        drop(question);
        take(answer)
    }

    #[test]
    fn an_answer_is_not_trusted() {
        let whole = taken(
            b"k\x02\0\0\0ab\
                            k\x01\0\0\0c\
                            i\0\0\0\0\
                            c\x03\0\0\0r=1\
                            .\0\0\0\0",
        );
        let whole = whole.unwrap().unwrap();
        assert_eq!(
            (whole.kernel, whole.initramfs, whole.cmdline),
            (b"abc".into(), Some(vec![]), b"r=1".into())
        );
        for (bytes, kind) in [
            (&b""[..], io::ErrorKind::UnexpectedEof),
            (b"k\x02\0\0\0a", io::ErrorKind::UnexpectedEof),
            (b"k\x01\0\0\0a", io::ErrorKind::UnexpectedEof),
            (b"k\xff\xff\xff\xff", io::ErrorKind::Other),
            (b"x\0\0\0\0", io::ErrorKind::Other),
        ] {
            assert_eq!(taken(bytes).map(drop).unwrap_err().kind(), kind, "{bytes:?}");
        }
        assert_eq!(taken(b"!\x05\0\0\0no\x1b[m").unwrap().map(drop).unwrap_err(), "no?[m");
        // No part is longer than it may be.
        let mut gathered = Gathered::default();
        let text = vec![b'a'; MAX_TEXT as usize];
        gathered.add(Part::Cmdline, &text).unwrap();
        assert!(gathered.add(Part::Cmdline, b"a").is_err());
    }

    #[test]
    fn a_process_with_other_threads_is_not_copied() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, [0; 8192]).unwrap();
        // The harness has a thread for the test.
        let refused = std::thread::scope(|scope| {
            let (go, wait) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || wait.recv());
            let config = BlockConfig { cached: true, ..BlockConfig::new(path) };
            let refused =
                read_apart(&config, &Images::Any, 0, "", Mode::Off).map(drop).unwrap_err().to_string();
            drop(go);
            refused
        });
        assert!(refused.contains("other threads"), "{refused}");
    }
}
