//! Output that never holds a vCPU up, and loses nothing to a reader that is only slow.
//!
//! A vCPU that blocked in a write to a full pipe could not be paused, and the machine could not be moved, for
//! as long as nobody reads the pipe. (Making the guest wait by its own means is no better: Linux's driver for
//! virtio consoles spins with interrupts off until its bytes are taken.) So what cannot be written at once is
//! kept here, and a thread that lives for as long as there is such a backlog writes it. Only what a backlog
//! of [`MAX_BACKLOG`] bytes cannot take is lost.
//!
//! A file that others read later has a greatest length, so that a guest cannot fill the host's disk. What
//! does not fit any more is lost too, until somebody makes the file shorter.

use crate::lock::lock;
use crate::poll::poll;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes kept for a reader at most.
const MAX_BACKLOG: usize = 1 << 20;
/// The longest that a file becomes, in bytes.
pub(super) const MAX_FILE: u64 = 256 << 20;
/// How often the thread looks whether anybody still wants it to go on, in milliseconds.
const LOOK_AGAIN_MS: libc::c_int = 1000;

/// A handle to the output; clones write to the same one.
#[derive(Clone)]
pub struct Output(Arc<Inner>);

struct Inner {
    file: Option<File>,
    backlog: Mutex<Backlog>,
    written: Condvar,
    lost: AtomicU64,
    /// The longest that the file may become.
    limit: Option<u64>,
    /// Somebody was told that it is full.
    told: AtomicBool,
}

#[derive(Default)]
struct Backlog {
    bytes: VecDeque<u8>,
    /// A thread is there to write them.
    writer: bool,
}

impl Output {
    /// Output to `file`.
    pub fn to(file: File) -> Self {
        Self::new(Some(file), None)
    }

    /// Output to the end of `file`, as long as that has at most `limit` bytes.
    pub(super) fn bounded(file: File, limit: u64) -> Self {
        Self::new(Some(file), Some(limit))
    }

    /// Output to nowhere.
    pub fn null() -> Self {
        Self::new(None, None)
    }

    fn new(file: Option<File>, limit: Option<u64>) -> Self {
        let (backlog, written, lost) = (Mutex::default(), Condvar::new(), AtomicU64::new(0));
        Output(Arc::new(Inner { file, backlog, written, lost, limit, told: AtomicBool::new(false) }))
    }

    /// Bytes dropped so far.
    pub fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Relaxed)
    }

    /// Waits until all is written, for at most `patience`.
    pub fn drain(&self, patience: Duration) {
        let waited = self.0.written.wait_timeout_while(self.0.backlog(), patience, |backlog| backlog.writer);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Keeps `bytes` for later, behind what is kept already.
    fn keep(&self, backlog: &mut Backlog, bytes: &[u8]) {
        if !backlog.writer {
            let inner = Arc::clone(&self.0);
            let writer = thread::Builder::new().name("output".into()).spawn(move || inner.write_backlog());
            backlog.writer = writer.is_ok();
        }
        let room = if backlog.writer { MAX_BACKLOG - backlog.bytes.len() } else { 0 };
        let kept = room.min(bytes.len());
        backlog.bytes.extend(&bytes[..kept]);
        self.0.lose(bytes.len() - kept);
    }
}

impl Inner {
    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        lock(&self.backlog)
    }

    /// Whether the file has no room for `bytes` more.
    fn is_full(&self, mut file: &File, bytes: usize) -> bool {
        let Some(limit) = self.limit else { return false };
        // Where the end is now: somebody may have made it shorter. Writes go to the end wherever this leaves
        // the position.
        let full = file.seek(SeekFrom::End(0)).is_ok_and(|len| len + bytes as u64 > limit);
        if full && !self.told.swap(true, Ordering::Relaxed) {
            eprintln!(
                "whimbrel: a file that takes the guest's output has reached {limit} bytes; what follows is dropped \
                 until the file is truncated"
            );
        } else if !full && self.told.load(Ordering::Relaxed) {
            self.told.store(false, Ordering::Relaxed);
        }
        full
    }

    fn lose(&self, bytes: usize) {
        self.lost.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Writes the backlog until there is none, or nobody is left who has the output and it takes nothing.
    fn write_backlog(self: Arc<Self>) {
        let Some(mut file) = self.file.as_ref() else { return };
        let mut piece = Vec::with_capacity(libc::PIPE_BUF);
        loop {
            if !ready(file, LOOK_AGAIN_MS) {
                if Arc::strong_count(&self) == 1 {
                    return;
                }
                continue;
            }
            // What is being written stays in the backlog, so that nothing overtakes it, and the lock is not
            // held: a write to a terminal can block even though it was ready for a byte.
            piece.clear();
            piece.extend(self.backlog().bytes.iter().take(libc::PIPE_BUF));
            if self.is_full(file, piece.len()) || file.write_all(&piece).is_err() {
                self.lose(piece.len());
            }
            let mut backlog = self.backlog();
            backlog.bytes.drain(..piece.len());
            if backlog.bytes.is_empty() {
                backlog.writer = false;
                self.written.notify_all();
                return;
            }
        }
    }
}

/// Whether a write to `file` is over at once, now or within `patience_ms`: it takes bytes, or refuses them
/// because nobody is there to read them. A signal that asks the vCPU to pause ends the wait early, which
/// counts as not ready.
fn ready(file: &File, patience_ms: libc::c_int) -> bool {
    poll([Some(file.as_raw_fd())], libc::POLLOUT, patience_ms)
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(mut file) = self.0.file.as_ref() else { return Ok(bytes.len()) };
        let mut backlog = self.0.backlog();
        // A pipe that polls ready has room for PIPE_BUF bytes, as much as is ever written here at once.
        if backlog.writer || !ready(file, 0) {
            self.keep(&mut backlog, bytes);
        } else if self.0.is_full(file, bytes.len()) || file.write_all(bytes).is_err() {
            self.0.lose(bytes.len());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn pipe() -> (io::PipeReader, Output) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Output::to(File::from(OwnedFd::from(writer))))
    }

    #[test]
    fn a_reader_that_stays_away_loses_bytes_and_blocks_nobody() {
        let (mut reader, mut output) = pipe();
        let total = 2 * MAX_BACKLOG;
        for _ in 0..total / 16 {
            assert_eq!(output.write(&[b'x'; 16]).unwrap(), 16);
        }
        let lost = output.lost();
        assert!(lost > 0);
        drop(output);
        let mut arrived = Vec::new();
        reader.read_to_end(&mut arrived).unwrap();
        assert_eq!(arrived.len() + lost as usize, total);
    }

    #[test]
    fn a_file_becomes_no_longer_than_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = || File::options().append(true).create(true).open(&path).unwrap();
        let mut output = Output::bounded(file(), 1000);
        for _ in 0..300 {
            assert_eq!(output.write(b"0123456").unwrap(), 7, "the guest goes on");
        }
        assert_eq!((path.metadata().unwrap().len(), output.lost()), (994, 2100 - 994));
        // It counts what was there before, and what was taken away since.
        assert_eq!(Output::bounded(file(), 1000).write(b"0123456").unwrap(), 7);
        assert_eq!(path.metadata().unwrap().len(), 994);
        file().set_len(0).unwrap();
        output.write_all(b"again").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"again");
    }

    #[test]
    fn a_slow_reader_gets_everything_in_order() {
        let (mut reader, mut output) = pipe();
        let sent: Vec<u8> = (0..400_000u32).map(|n| (n % 251) as u8).collect();
        let mut arrived = Vec::new();
        // Now and then the reader takes something, while some is kept and more is written.
        for (number, bytes) in sent.chunks(17).enumerate() {
            output.write_all(bytes).unwrap();
            if number > 10_000 && number % 64 == 0 {
                let mut buffer = [0; 500];
                let read = reader.read(&mut buffer).unwrap();
                arrived.extend(&buffer[..read]);
            }
        }
        assert!(output.0.backlog().writer, "the pipe took everything: this proves nothing");
        let rest = thread::spawn(move || reader.read_to_end(&mut arrived).map(|_| arrived));
        output.drain(Duration::from_secs(60));
        assert_eq!(output.lost(), 0);
        drop(output);
        assert!(rest.join().unwrap().unwrap() == sent);
    }

    #[test]
    fn nobody_waits_for_a_reader_that_has_gone() {
        let (reader, mut output) = pipe();
        while !output.0.backlog().writer {
            output.write_all(&[0; 4096]).unwrap();
        }
        let inner = Arc::downgrade(&output.0);
        drop(reader);
        output.drain(Duration::from_secs(60));
        drop(output);
        while inner.upgrade().is_some() {
            thread::yield_now();
        }
    }
}
