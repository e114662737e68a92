//! What the system tells of an open file beyond `std`'s metadata.

use crate::retry::retry;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Asks for the fields of `mask`, in the way that `flags` say.
///
/// # Errors
/// What the system says.
pub fn statx(file: &File, flags: libc::c_int, mask: libc::c_uint) -> io::Result<libc::statx> {
    // SAFETY: all zeros is a valid value of the structure, and the kernel fills it in.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | flags;
    // SAFETY: an empty path with that flag means the descriptor itself; the structure lives across the call.
    retry!(unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, &mut stat) })?;
    Ok(stat)
}
