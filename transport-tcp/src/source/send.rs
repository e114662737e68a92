//! How content gets from guest memory into a stream.
//!
//! Large extents are sent with `sendfile` from the guest's memfd: the kernel puts references to the guest's
//! own pages into the socket, and nothing is copied on this side. A page may change before it leaves; the
//! contract allows that. Small extents, and memory whose file cannot be sent (hugetlbfs), are sent with
//! `sendmsg` from the mapping, many at a time. This is the same for a socket to which the kernel encrypts. If
//! this process has to encrypt, it does so from the mapping.

use crate::channel::Protected;
use crate::iovec::{self, MAX_IOVECS};
use migration::memory::{Extent, PAGE_SIZE, Ram};
use socket2::Socket;
use std::io;
use std::os::fd::AsRawFd;

/// From this length on, an extent is sent with `sendfile`; below it, the call costs more than the copy.
const MIN_SENDFILE_BYTES: u64 = 32 << 10;

/// Through a socket, to which the content goes as it is. Copies nothing of large extents.
pub(super) fn send_through(stream: &Socket, head: &[u8], ram: &Ram, extents: &[Extent]) -> io::Result<()> {
    let mut batch = Batch::new(stream);
    batch.add(head.as_ptr(), head.len(), true)?;
    for (index, extent) in extents.iter().enumerate() {
        let more = index + 1 < extents.len();
        // `check` has passed all extents.
        let Ok(region) = ram.check(extent) else { continue };
        let address = region.address().wrapping_add(extent.offset as usize);
        if extent.len < MIN_SENDFILE_BYTES || region.backing_page() > PAGE_SIZE {
            batch.add(address, extent.len as usize, more)?;
        } else {
            batch.flush(true)?;
            for piece in region.pieces(extent.offset, extent.len) {
                send_file(stream, piece.fd, piece.offset, piece.len)?;
            }
        }
    }
    batch.flush(false)
}

/// Encrypts straight from guest memory.
pub(super) fn send_protected(
    channel: &mut dyn Protected,
    head: &[u8],
    ram: &Ram,
    extents: &[Extent],
) -> io::Result<()> {
    channel.write_all(head)?;
    for extent in extents {
        // `check` has passed all extents.
        let Ok(address) = ram.address(extent) else { continue };
        // SAFETY: the extent lies inside a mapping that `ram` keeps alive across the call, and no thread of
        // this process writes to it through a reference. The guest may, from outside of this program: whoever
        // encrypts copies each byte into a record of its own before it looks at any, as the kernel does in
        // `sendmsg`, so that a page which changes meanwhile is torn, which the contract allows.
        let content = unsafe { std::slice::from_raw_parts(address, extent.len as usize) };
        channel.write_all(content)?;
    }
    channel.flush()
}

/// Collects buffers for one `sendmsg`.
struct Batch<'a> {
    stream: &'a Socket,
    iovecs: [libc::iovec; MAX_IOVECS],
    filled: usize,
}

impl<'a> Batch<'a> {
    fn new(stream: &'a Socket) -> Self {
        Batch { stream, iovecs: [iovec::EMPTY; MAX_IOVECS], filled: 0 }
    }

    /// Adds a buffer, which must stay readable until the next flush; `more`: others follow.
    fn add(&mut self, address: *const u8, len: usize, more: bool) -> io::Result<()> {
        self.iovecs[self.filled] = libc::iovec { iov_base: address.cast_mut().cast(), iov_len: len };
        self.filled += 1;
        if self.filled == MAX_IOVECS { self.flush(more) } else { Ok(()) }
    }

    /// Sends what was added; with `more` the last segment waits for what follows.
    fn flush(&mut self, more: bool) -> io::Result<()> {
        let flags = libc::MSG_NOSIGNAL | if more { libc::MSG_MORE } else { 0 };
        let mut first = 0;
        while first < self.filled {
            // SAFETY: an all-zero msghdr is a valid empty one.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = self.iovecs[first..].as_mut_ptr();
            message.msg_iovlen = self.filled - first;
            // SAFETY: the iovecs from `first` to `filled` describe the frame's head, which the lane
            // owns, and guest memory inside checked regions; both outlive the call. The kernel
            // only reads them, and racing guest writes are the contract's own.
            let sent = unsafe { libc::sendmsg(self.stream.as_raw_fd(), &message, flags) };
            if sent < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            first = iovec::advance(&mut self.iovecs, first, self.filled, sent as usize);
        }
        self.filled = 0;
        Ok(())
    }
}

/// Whether a connection is still there. Linux 6.1 takes what it is to encrypt without an error after the peer
/// has gone, and drops it.
pub(super) fn check_open(socket: &Socket) -> io::Result<()> {
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one entry, which lives across the call.
    let result = unsafe { libc::poll(&mut polled, 1, 0) };
    let gone = result > 0 && polled.revents & (libc::POLLHUP | libc::POLLERR) != 0;
    if gone { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
}

fn send_file(stream: &Socket, file: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let mut at = offset as libc::off_t;
    let end = at + len as libc::off_t;
    while at < end {
        // SAFETY: `at` is a local that the kernel advances; no other memory is involved.
        let sent = unsafe { libc::sendfile(stream.as_raw_fd(), file, &mut at, (end - at) as usize) };
        match sent {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n if n < 0 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            _ => {}
        }
    }
    Ok(())
}
