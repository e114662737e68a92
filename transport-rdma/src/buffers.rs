//! Registered buffers for messages, all of one size.

use crate::domain::{MemoryRegion, ProtectionDomain};
use crate::unavailable;
use migration::transport::PlaneError;
use rdma_sys::{ibv_access_flags, ibv_sge};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a buffer, and so of the largest message.
pub(crate) const MAX_MESSAGE_BYTES: usize = 4096;

/// A number of buffers of [`MAX_MESSAGE_BYTES`] bytes, numbered from 0.
///
/// What has been posted decides who may touch a buffer: it is the card's between posting and completion, and
/// its owner's at all other times.
pub(crate) struct MessageBuffers {
    region: MemoryRegion,
    address: NonNull<u8>,
    count: usize,
}

// SAFETY: the struct is the only handle to its mapping apart from the registration.
unsafe impl Send for MessageBuffers {}

/// Anonymous memory of its own.
struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: used for nothing but to unmap.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize) -> io::Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        // Were the process to fork, the child would take pages from under the card.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(address.as_ptr().cast(), len, libc::MADV_DONTFORK) };
        Ok(Mapping { address, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the registration that holds it is gone.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

impl MessageBuffers {
    /// Allocates and registers `count` buffers.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when the memory cannot be had or pinned.
    pub(crate) fn new(domain: &Arc<ProtectionDomain>, count: usize) -> Result<MessageBuffers, PlaneError> {
        MessageBuffers::register(domain, count)
            .map_err(|error| unavailable::resource("registering message buffers", error))
    }

    fn register(domain: &Arc<ProtectionDomain>, count: usize) -> io::Result<MessageBuffers> {
        let len = count * MAX_MESSAGE_BYTES;
        let mapping = Arc::new(Mapping::new(len)?);
        let address = mapping.address;
        // The peer never writes here on its own: only messages that we have posted a buffer for.
        let access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        // SAFETY: the mapping is readable and writable, lives as long as its `Arc`, and only raw bytes are
        // read from and written to it, through this struct.
        let region =
            unsafe { domain.register(address.as_ptr(), len, address.as_ptr() as u64, access, mapping) }?;
        Ok(MessageBuffers { region, address, count })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn address_of(&self, buffer: usize) -> NonNull<u8> {
        assert!(buffer < self.count, "no such buffer");
        // SAFETY: `buffer < count`, so the sum stays inside the mapping of `count * MAX_MESSAGE_BYTES` bytes.
        unsafe { self.address.add(buffer * MAX_MESSAGE_BYTES) }
    }

    /// The first `len` bytes of a buffer, for a work request.
    pub(crate) fn sge(&self, buffer: usize, len: usize) -> ibv_sge {
        let len = len.min(MAX_MESSAGE_BYTES) as u32;
        ibv_sge { addr: self.address_of(buffer).as_ptr() as u64, length: len, lkey: self.region.lkey() }
    }

    /// The first `len` bytes of a buffer.
    ///
    /// # Safety
    /// The buffer must not be posted.
    pub(crate) unsafe fn get(&self, buffer: usize, len: usize) -> &[u8] {
        // SAFETY: inside the mapping; the caller vouches that the card does not write to it.
        unsafe { std::slice::from_raw_parts(self.address_of(buffer).as_ptr(), len.min(MAX_MESSAGE_BYTES)) }
    }

    /// A buffer, to be filled.
    ///
    /// # Safety
    /// The buffer must not be posted.
    pub(crate) unsafe fn get_mut(&mut self, buffer: usize) -> &mut [u8; MAX_MESSAGE_BYTES] {
        // SAFETY: inside the mapping, and bytes have no alignment; the caller vouches that the card does not
        // use it, and `&mut self` that nobody else of this process does.
        unsafe { &mut *self.address_of(buffer).as_ptr().cast() }
    }
}
