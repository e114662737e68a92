//! Output that never holds a vCPU up.
//!
//! A vCPU that blocked in a write to a full pipe could not be paused, and the machine could not be
//! moved, for as long as nobody reads the pipe. So every byte first asks whether it can be written;
//! a reader that stays away costs one short wait, and after that its bytes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How long a reader may keep the first byte waiting, in milliseconds.
const PATIENCE_MS: libc::c_int = 20;

/// A handle to the output; clones write to the same one.
#[derive(Clone)]
pub struct Output(Arc<Inner>);

struct Inner {
    file: Option<File>,
    /// The last byte found no reader: do not wait again until one is back.
    stalled: AtomicBool,
    lost: AtomicU64,
}

impl Output {
    /// Output to `file`.
    pub fn to(file: File) -> Self {
        Self::new(Some(file))
    }

    /// Output to nowhere.
    pub fn null() -> Self {
        Self::new(None)
    }

    fn new(file: Option<File>) -> Self {
        Output(Arc::new(Inner { file, stalled: AtomicBool::new(false), lost: AtomicU64::new(0) }))
    }

    /// Bytes dropped so far.
    pub fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Relaxed)
    }

    fn ready(&self, file: &File) -> bool {
        let patience = if self.0.stalled.load(Ordering::Relaxed) { 0 } else { PATIENCE_MS };
        let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, which lives across the call. A signal that asks the vCPU to pause
        // ends the wait early, which counts as not ready.
        let result = unsafe { libc::poll(&mut poll, 1, patience) };
        let ready = result == 1 && poll.revents & libc::POLLOUT != 0;
        self.0.stalled.store(!ready, Ordering::Relaxed);
        ready
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(mut file) = self.0.file.as_ref() else { return Ok(bytes.len()) };
        // A pipe that polls ready has room for PIPE_BUF bytes, far more than the port ever writes.
        if self.ready(file) && file.write_all(bytes).is_ok() {
            return Ok(bytes.len());
        }
        self.0.lost.fetch_add(bytes.len() as u64, Ordering::Relaxed);
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

    #[test]
    fn a_reader_that_stays_away_loses_bytes_and_blocks_nobody() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut output = Output::to(File::from(std::os::fd::OwnedFd::from(writer)));
        let total = 200_000u64;
        for _ in 0..total {
            assert_eq!(output.write(b"x").unwrap(), 1);
        }
        let lost = output.lost();
        assert!(lost > 0);
        drop(output);
        let mut arrived = Vec::new();
        reader.read_to_end(&mut arrived).unwrap();
        assert_eq!(arrived.len() as u64 + lost, total);
    }
}
