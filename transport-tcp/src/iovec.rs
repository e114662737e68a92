//! Lists of buffers for one system call.

/// Most buffers in one `sendmsg` or `recvmsg`; the kernel takes 1024.
pub const MAX_IOVECS: usize = 512;

/// A buffer of nothing.
pub const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Takes `done` bytes off the iovecs from `first`; returns the first that is not used up.
pub fn advance(iovecs: &mut [libc::iovec], mut first: usize, end: usize, mut done: usize) -> usize {
    while first < end {
        let iovec = &mut iovecs[first];
        if done < iovec.iov_len {
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(done);
            iovec.iov_len -= done;
            break;
        }
        done -= iovec.iov_len;
        first += 1;
    }
    first
}
