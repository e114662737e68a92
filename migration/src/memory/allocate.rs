//! RAM made for the purpose: memfds, mapped shared.

use super::{MemoryError, PAGE_SIZE, Ram, RamFile, RamRegion, RegionLayout, check_layout};
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Memfds behind a region, at most. See [`RamRegion`] for why there are several: twice the default number of
/// streams, for which two streams rarely meet at one of them.
const PARTS: u64 = 8;

/// What a part's length is a multiple of, in bytes: no chunk that the engine hands to a lane lies in two
/// parts.
const PART_UNIT: u64 = 8 << 20;

/// How long the parts of a region of `len` bytes should be, in bytes.
pub fn part_len(len: u64) -> u64 {
    len.div_ceil(PARTS).next_multiple_of(PART_UNIT)
}

impl Ram {
    /// Makes RAM of this layout: memfds of 4 KiB pages, mapped shared, readable and writable, all zero.
    /// Nothing is populated: a page comes to exist when it is first written to. Core dumps leave it out. It
    /// is unmapped when its last user drops it.
    ///
    /// # Errors
    /// As for [`Ram::new`]; [`MemoryError::System`] when the host has no address space or descriptors left.
    pub fn allocate(layout: &[RegionLayout]) -> Result<Ram, MemoryError> {
        Self::allocate_in_parts(layout, part_len)
    }

    /// The same, with `part_len` to say for a region's length how long its parts are.
    pub(crate) fn allocate_in_parts(
        layout: &[RegionLayout],
        part_len: impl Fn(u64) -> u64,
    ) -> Result<Ram, MemoryError> {
        // Before anything is asked of the host.
        check_layout(layout)?;
        let region = |layout: &RegionLayout| allocate(*layout, part_len(layout.len));
        Ram::new(layout.iter().map(region).collect::<Result<_, _>>()?)
    }
}

/// What reserved address space is aligned to, in bytes: the kernel maps a huge folio whole only where address
/// and place in the file are both multiples of its size. Parts are multiples of it too.
pub const ALIGNMENT: usize = 2 << 20;

/// Address space of this process's, from a multiple of [`ALIGNMENT`] on, to map files into. It is unmapped,
/// with all that was mapped there, when it is dropped.
#[derive(Debug)]
pub struct AddressSpace {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the struct is an address and a length, and is used for nothing but to unmap them.
unsafe impl Send for AddressSpace {}
// SAFETY: as for Send; no method reads or writes the mapping.
unsafe impl Sync for AddressSpace {}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its last user has dropped it.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

impl AddressSpace {
    /// Reserves `len` bytes, a multiple of [`PAGE_SIZE`]. Nothing of them can be touched yet.
    ///
    /// # Errors
    /// [`MemoryError::System`] when the process has no address space left.
    pub fn reserve(len: usize) -> Result<AddressSpace, MemoryError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // Room to align it in. If the sum overflows, the kernel refuses a mapping of that length.
        let room = len.saturating_add(ALIGNMENT);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let found = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
        if found == libc::MAP_FAILED {
            return Err(MemoryError::last("reserve address space for"));
        }
        let before = found.align_offset(ALIGNMENT);
        let start = found.wrapping_byte_add(before);
        for (at, len) in [(found, before), (start.wrapping_byte_add(len), ALIGNMENT - before)] {
            if len > 0 {
                // SAFETY: the range is a part of the mapping just made, outside of what is kept of it.
                unsafe { libc::munmap(at, len) };
            }
        }
        let address =
            NonNull::new(start.cast()).ok_or_else(|| MemoryError::last("reserve address space for"))?;
        Ok(AddressSpace { address, len })
    }

    /// Its first byte.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }
}

fn allocate(layout: RegionLayout, part_len: u64) -> Result<RamRegion, MemoryError> {
    let space = AddressSpace::reserve(layout.len as usize)?;
    let address = space.address();
    let starts = (0..layout.len).step_by(part_len as usize);
    let files: Result<Vec<File>, MemoryError> =
        starts.map(|start| memfd(c"guest-ram", part_len.min(layout.len - start), 0)).collect();
    let files = files?;
    // SAFETY: the range is the one reserved above, which nobody else knows yet.
    unsafe { map_parts(address, layout.len, part_len, &files) }?;
    // A core dump with the guest's memory in it would be as large as the guest, and hold its secrets.
    // SAFETY: the range is exactly the one reserved above; the advice changes no content.
    if unsafe { libc::madvise(address.as_ptr().cast(), space.len, libc::MADV_DONTDUMP) } != 0 {
        return Err(MemoryError::last("exclude from core dumps the"));
    }
    let files = files.into_iter().map(RamFile::from).collect();
    // SAFETY: the files were mapped above, shared, readable and writable, one behind the other for `len`
    // bytes; they are unmapped when their owner is dropped.
    unsafe { RamRegion::new(layout, address, PAGE_SIZE, files, part_len, Arc::new(space)) }
}

/// Maps `files` one behind the other over `len` bytes from `address` on, `part_len` bytes of each and what is
/// left of the last, shared, readable and writable.
///
/// # Errors
/// [`MemoryError::System`]; some may be mapped then.
///
/// # Safety
/// The range must be a mapping of the caller's, and nobody may be using it.
pub unsafe fn map_parts(
    address: NonNull<u8>,
    len: u64,
    part_len: u64,
    files: &[File],
) -> Result<(), MemoryError> {
    for (start, file) in (0..len).step_by(part_len as usize).zip(files) {
        let (at, access) =
            (address.as_ptr().wrapping_add(start as usize), libc::PROT_READ | libc::PROT_WRITE);
        let (part, flags) = (part_len.min(len - start) as usize, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: the range lies inside the one that the caller vouches for.
        let mapped = unsafe { libc::mmap(at.cast(), part, access, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            return Err(MemoryError::last("map"));
        }
    }
    Ok(())
}

/// Makes a memfd of `len` bytes whose length nobody can change. `flags` may ask for huge pages (`MFD_HUGETLB`
/// and their size).
///
/// # Errors
/// [`MemoryError::System`].
pub fn memfd(name: &CStr, len: u64, flags: libc::c_uint) -> Result<File, MemoryError> {
    let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string that lives across the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(MemoryError::last("create the file of"));
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(|source| MemoryError::System { what: "size", source })?;
    // Whoever else comes to hold the file must not be able to cut it off under our mapping, which
    // would turn our next access into SIGBUS.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer; the descriptor is ours.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
        return Err(MemoryError::last("seal"));
    }
    Ok(file)
}
