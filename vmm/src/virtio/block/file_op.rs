//! An operation on an image's file: one system call, or one entry of an io_uring.

use super::image::DiskImage;
use std::io;

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the image into guest RAM.
    Read,
    /// From guest RAM into the image.
    Write,
}

/// Something to be done to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// Move data between the image, from byte `offset` on, and `count` vectors. The maker of the operation
    /// keeps them, and what they point to, in place until the operation has a result.
    Transfer {
        /// Which way.
        direction: Direction,
        /// The first of the vectors.
        vectors: *const libc::iovec,
        /// How many.
        count: u32,
        /// Where in the image.
        offset: u64,
    },
    /// Make durable what was written.
    Sync,
    /// `fallocate` in this mode, the size kept.
    Allocate {
        /// The mode.
        mode: libc::c_int,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
}

impl DiskImage {
    /// Executes an operation at once. Returns how many bytes a transfer moved.
    ///
    /// # Errors
    /// What the system says.
    pub fn execute(&self, op: FileOp) -> io::Result<usize> {
        let fd = self.fd();
        loop {
            let result = match op {
                FileOp::Transfer { direction, vectors, count, offset } => {
                    let (count, offset) = (count as libc::c_int, offset as i64);
                    // SAFETY: `count` vectors are there, each a part of guest RAM, or of constant zeros that
                    // are only written to the image, as the operation's maker promises; no reference into
                    // guest RAM exists that the kernel's writes could contradict.
                    unsafe {
                        match direction {
                            Direction::Read => libc::preadv(fd, vectors, count, offset),
                            Direction::Write => libc::pwritev(fd, vectors, count, offset),
                        }
                    }
                }
                // SAFETY: the call takes an open descriptor only.
                FileOp::Sync => unsafe { libc::fdatasync(fd) as isize },
                FileOp::Allocate { mode, offset, len } => {
                    // SAFETY: the call takes integers only.
                    unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) as isize }
                }
            };
            match usize::try_from(result) {
                Ok(result) => return Ok(result),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}
