//! Registered buffers for messages, all of one size.

use crate::domain::{Domain, MemoryRegion};
use rdma_sys::{ibv_access_flags, ibv_sge};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// Length of a buffer in bytes.
pub(crate) const SLOT: usize = 4096;

/// `count` buffers of [`SLOT`] bytes.
///
/// Who may touch a buffer is a matter of what has been posted: between posting and completion it is the card's,
/// at all other times its owner's.
pub(crate) struct Slots {
    region: MemoryRegion,
    address: NonNull<u8>,
    count: usize,
}

// SAFETY: the struct is the only handle to its mapping apart from the registration.
unsafe impl Send for Slots {}

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

impl Slots {
    pub(crate) fn new(domain: &Arc<Domain>, count: usize) -> io::Result<Slots> {
        let len = count * SLOT;
        let mapping = Arc::new(Mapping::new(len)?);
        let address = mapping.address;
        // The peer never writes here on its own: only messages that we have posted a buffer for.
        let access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        // SAFETY: the mapping is readable and writable, lives as long as its `Arc`, and only raw bytes are
        // read from and written to it, through this struct.
        let region =
            unsafe { domain.register(address.as_ptr(), len, address.as_ptr() as u64, access, mapping) }?;
        Ok(Slots { region, address, count })
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn at(&self, slot: usize) -> NonNull<u8> {
        assert!(slot < self.count, "no such buffer");
        // SAFETY: `slot < count`, so the sum stays inside the mapping of `count * SLOT` bytes.
        unsafe { self.address.add(slot * SLOT) }
    }

    /// The first `len` bytes of a buffer, for a work request.
    pub(crate) fn sge(&self, slot: usize, len: usize) -> ibv_sge {
        let len = len.min(SLOT) as u32;
        ibv_sge { addr: self.at(slot).as_ptr() as u64, length: len, lkey: self.region.lkey() }
    }

    /// What a buffer holds.
    ///
    /// # Safety
    /// The buffer must not be posted.
    pub(crate) unsafe fn get(&self, slot: usize, len: usize) -> &[u8] {
        // SAFETY: inside the mapping; the caller vouches that the card does not write to it.
        unsafe { std::slice::from_raw_parts(self.at(slot).as_ptr(), len.min(SLOT)) }
    }

    /// A buffer, to be filled.
    ///
    /// # Safety
    /// The buffer must not be posted.
    pub(crate) unsafe fn get_mut(&mut self, slot: usize) -> &mut [u8; SLOT] {
        // SAFETY: inside the mapping, and bytes have no alignment; the caller vouches that the card does not
        // use it, and `&mut self` that nobody else of this process does.
        unsafe { &mut *self.at(slot).as_ptr().cast() }
    }
}
