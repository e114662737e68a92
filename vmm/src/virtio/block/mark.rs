//! Whether somebody else has used an image since its lock was released here.
//!
//! A lock tells who has the image now. It does not tell a source that takes it back whether the destination
//! had it in between: one that ran the guest and died has left no lock. But what it wrote is on the disk, and
//! memory at the source is older than that: a guest that went on from there would find another disk than it
//! left, and ruin it. So whoever takes an image to run its guest marks it, before the guest runs, by its time
//! of last modification: the one thing that every file system has, that all hosts see, and that anybody who
//! writes to the image changes anyway.

use super::statx::statx;
use crate::retry::retry;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

/// A file system may keep time in ticks: 10 ms and less.
const TICK: Duration = Duration::from_millis(1);
const MAX_TICKS: usize = 100;

/// The time of last modification: seconds and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(i64, u32);

/// The image's mark, as all hosts see it.
///
/// # Errors
/// What the system says.
pub fn read(file: &File) -> io::Result<Mark> {
    // What this host remembers of a file on a server may be old.
    let stat = statx(file, libc::AT_STATX_FORCE_SYNC, libc::STATX_MTIME)?;
    Ok(Mark(stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec))
}

/// Gives the image another mark.
///
/// # Errors
/// What the system says, or if its clock stands still.
pub fn change(file: &File) -> io::Result<()> {
    let before = read(file)?;
    for _ in 0..MAX_TICKS {
        touch(file)?;
        if read(file)? != before {
            return Ok(());
        }
        thread::sleep(TICK);
    }
    Err(io::Error::other("its time of last modification does not change"))
}

/// Sets the time of last modification to now.
fn touch(file: &File) -> io::Result<()> {
    // Whoever may write to a file may do that, its owner or not.
    // SAFETY: no times are passed, and the descriptor is open.
    match retry!(unsafe { libc::futimens(file.as_raw_fd(), std::ptr::null()) }) {
        // It was opened with privileges that this process has given up. What is open for writing can still be
        // given a length: the one that it has.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let len = file.metadata()?.len();
            file.set_len(len).map_err(|_| error)
        }
        result => result.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn each_change_and_each_write_shows() {
        let file = tempfile::tempfile().unwrap();
        let mut last = read(&file).unwrap();
        for _ in 0..20 {
            assert_eq!(read(&file).unwrap(), last, "by itself it stays");
            change(&file).unwrap();
            let now = read(&file).unwrap();
            assert_ne!(now, last);
            last = now;
        }
        thread::sleep(Duration::from_millis(20));
        file.write_at(b"x", 0).unwrap();
        assert_ne!(read(&file).unwrap(), last);
    }
}
