//! Guest RAM as the engine and the transports see it: regions, extents and their bounds.
//!
//! A [`Ram`] is a list of regions, each one shared mapping of one or more files, mostly memfds. Both sides of
//! a migration hold equal lists (the layout is agreed on in Prepare), so that an [`Extent`] names the same
//! bytes at both ends. Nobody reads or writes through an extent that [`Ram::check`] has not passed.
//!
//! There are three ways to a `Ram`:
//!
//! - [`Ram::allocate`] makes memfds and maps them;
//! - `Ram::from_guest_memory` (feature `vm-memory`) describes what the crate `vm-memory` has mapped;
//! - [`RamRegion::new`] describes any other mapping, and is `unsafe`, because its lifetime is the caller's
//!   word. [`AddressSpace`], [`memfd`], [`part_len`] and [`map_parts`] help to make one.
//!
//! Whoever has a `Ram` may read it. To write to it takes a [`RamOwner`], which the VMM makes of a `Ram` that
//! nobody else has yet and keeps to itself, or `unsafe` code: a data plane that places what arrives.
//!
//! **Only shared mappings of files can be moved.** The engine asks the file which pages exist, and transports
//! read and write by file. Anonymous memory and private mappings are refused ([`MemoryError::NotShared`]).

mod allocate;
mod error;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod huge;
mod mapping;
mod owner;
#[cfg(test)]
mod tests;

pub use allocate::{ALIGNMENT, AddressSpace, map_parts, memfd, part_len};
pub use error::{MemoryError, check_layout};
pub use huge::making_huge_pages_hides_memory;
pub use owner::RamOwner;

use serde::{Deserialize, Serialize};
use std::any::Any;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// The unit of dirty tracking, in bytes, whatever pages back the region.
pub const PAGE_SIZE: u64 = 4096;

/// Most regions that a machine may have. Bounds what a peer can make us allocate.
pub const MAX_REGIONS: usize = 64;

/// Highest guest-physical address at which a region may end, in bytes: what x86-64 can address at most.
pub const MAX_ADDRESS: u64 = 1 << 52;

/// A piece of guest RAM: `len` bytes from `offset` in region number `region`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Index into the machine's regions.
    pub region: u32,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
}

/// What both sides must agree on about one region before a byte moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RegionLayout {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Length in bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
}

/// An extent that does not lie inside the machine's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("extent of {} bytes at {:#x} in region {} lies outside guest memory", extent.len, extent.offset, extent.region)]
pub struct OutOfBounds {
    /// The refused extent.
    pub extent: Extent,
}

/// A file behind a region, or behind a part of one.
#[derive(Debug)]
pub struct RamFile {
    /// The file: a memfd, a file of a tmpfs or of hugetlbfs.
    pub file: OwnedFd,
    /// Where in the file the region's bytes begin, in bytes; a multiple of [`PAGE_SIZE`].
    pub offset: u64,
}

impl From<File> for RamFile {
    /// The file from its start.
    fn from(file: File) -> Self {
        RamFile { file: file.into(), offset: 0 }
    }
}

/// One contiguous mapping of guest RAM.
///
/// The files behind it follow each other, each holding a *part* of the same length; only the last may be
/// shorter. There are several of them because the kernel lets one thread at a time write to a file, and a
/// transport may want to write by file. Both sides are free to cut their regions differently.
pub struct RamRegion {
    layout: RegionLayout,
    address: NonNull<u8>,
    backing_page: u64,
    files: Vec<RamFile>,
    part_len: u64,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the region is an address, a file and an owner that is itself Send + Sync. Access to the
// bytes goes through raw pointers whose users state their own claims; the region hands out no
// references to guest memory.
unsafe impl Send for RamRegion {}
// SAFETY: as for Send; no method gives access to interior state that is not atomic or immutable.
unsafe impl Sync for RamRegion {}

impl RamRegion {
    /// Describes a mapping of guest RAM.
    ///
    /// `files` hold the same bytes, `part_len` in each; `backing_page` is the size in bytes of the pages
    /// behind it (4096, or a huge page's size).
    ///
    /// # Errors
    /// [`MemoryError`] when no region can be like that, or when what is mapped there now is not those files,
    /// shared. That is asked of the kernel (`/proc/self/maps`).
    ///
    /// # Safety
    /// `address..address + layout.len` must be a shared, readable and writable mapping of those
    /// files, each from its offset, and must stay mapped for as long as `owner` lives.
    pub unsafe fn new(
        layout: RegionLayout,
        address: NonNull<u8>,
        backing_page: u64,
        files: Vec<RamFile>,
        part_len: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, MemoryError> {
        layout.check()?;
        if part_len == 0 || !part_len.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Length { region: RegionLayout { len: part_len, ..layout } });
        }
        let parts = layout.len.div_ceil(part_len);
        if files.len() as u64 != parts {
            return Err(MemoryError::Files { files: files.len(), parts });
        }
        let region = RamRegion { layout, address, backing_page, files, part_len, _owner: owner };
        region.check_mapping()?;
        huge::keep_small(address, region.len(), backing_page);
        Ok(region)
    }

    /// Asks the kernel whether each part is mapped as it is said to be.
    fn check_mapping(&self) -> Result<(), MemoryError> {
        let claims: Vec<_> = self
            .files
            .iter()
            .zip((0..self.len()).step_by(self.part_len as usize))
            .map(|(behind, start)| mapping::Claim {
                address: self.address().wrapping_add(start as usize) as usize,
                len: self.part_len.min(self.len() - start),
                file: &behind.file,
                offset: behind.offset,
            })
            .collect();
        mapping::check(&claims)
    }

    /// Where it lies in the guest, and its length.
    pub fn layout(&self) -> RegionLayout {
        self.layout
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)] // a region is never empty
    pub fn len(&self) -> u64 {
        self.layout.len
    }

    /// Number of [`PAGE_SIZE`] pages.
    pub fn pages(&self) -> u64 {
        self.layout.len / PAGE_SIZE
    }

    /// Address of the first byte in this process. The guest writes there at any time: go through
    /// system calls, the network card, or volatile or SIMD loads that tolerate a racing writer.
    pub fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Size in bytes of the pages that back the region.
    pub fn backing_page(&self) -> u64 {
        self.backing_page
    }

    /// How many parts it has.
    pub fn parts(&self) -> usize {
        self.files.len()
    }

    /// Length in bytes of each part but the last, which may be shorter.
    pub fn part_len(&self) -> u64 {
        self.part_len
    }

    /// Where `len` bytes from `offset` are in the files: a piece for each part that they touch. What lies
    /// beyond the region is left out.
    pub fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece<'_>> {
        let end = offset.saturating_add(len).min(self.len());
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (part, in_file) = ((at / self.part_len) as usize, at % self.part_len);
            let len = (self.part_len - in_file).min(end - at);
            at += len;
            let RamFile { file, offset } = &self.files[part];
            Some(Piece { fd: file.as_raw_fd(), part, offset: offset + in_file, len, _region: PhantomData })
        })
    }

    /// Copies bytes of guest memory from `offset` on into `into`, by file: pages that do not exist read as
    /// zeros and go on not to exist. A guest that runs may be writing them.
    ///
    /// # Errors
    /// `InvalidInput` for bytes outside the region; what the system says.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.check_inside(offset, into.len())?;
        let mut rest = into;
        for piece in self.pieces(offset, rest.len() as u64) {
            let (now, later) = rest.split_at_mut(piece.len as usize);
            piece.read(now)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes `bytes` to guest memory from `offset` on, by file: see [`RamOwner::write`].
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_inside(offset, bytes.len())?;
        let mut rest = bytes;
        for piece in self.pieces(offset, bytes.len() as u64) {
            let (now, later) = rest.split_at(piece.len as usize);
            piece.write(now)?;
            rest = later;
        }
        Ok(())
    }

    fn check_inside(&self, offset: u64, len: usize) -> io::Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "outside the memory region")),
        }
    }
}

/// Bytes of a region that are in one file.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The file's descriptor, open for as long as the region lives. It is a number, because a borrowed
    /// descriptor can be written to by safe code.
    pub fd: RawFd,
    /// Number of the part.
    pub part: usize,
    /// Where in the file they begin.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
    _region: PhantomData<&'a RamRegion>,
}

impl Piece<'_> {
    /// Reads all of the piece into `into`, which is as long.
    fn read(&self, mut into: &mut [u8]) -> io::Result<()> {
        let mut at = self.offset as i64;
        while !into.is_empty() {
            // SAFETY: the kernel writes at most `into.len()` bytes to a live, exclusive slice.
            let read = unsafe { libc::pread(self.fd, into.as_mut_ptr().cast(), into.len(), at) };
            let count = moved(read)?;
            into = &mut into[count..];
            at += count as i64;
        }
        Ok(())
    }

    /// Writes `bytes`, which are as many, to the piece.
    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        let mut at = self.offset as i64;
        while !bytes.is_empty() {
            // SAFETY: the kernel reads at most `bytes.len()` bytes of a live slice.
            let written = unsafe { libc::pwrite(self.fd, bytes.as_ptr().cast(), bytes.len(), at) };
            let count = moved(written)?;
            bytes = &bytes[count..];
            at += count as i64;
        }
        Ok(())
    }
}

/// Bytes that a system call moved; 0 for one that was interrupted.
fn moved(result: isize) -> io::Result<usize> {
    match usize::try_from(result) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => Ok(count),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            error => Err(error),
        },
    }
}

/// All of a machine's RAM.
pub struct Ram {
    regions: Vec<RamRegion>,
}

impl Ram {
    /// RAM of these regions, in the order both sides agreed on.
    ///
    /// # Errors
    /// [`MemoryError`] for no regions or more than [`MAX_REGIONS`], and for regions that overlap in the
    /// guest.
    pub fn new(regions: Vec<RamRegion>) -> Result<Self, MemoryError> {
        let ram = Ram { regions };
        check_layout(&ram.layout())?;
        Ok(ram)
    }

    /// Sets what pages the regions claim to be made of.
    #[cfg(any(test, feature = "conformance"))]
    pub(crate) fn claim_backing(&mut self, pages: impl Iterator<Item = u64>) {
        self.regions.iter_mut().zip(pages).for_each(|(region, page)| region.backing_page = page);
    }

    /// The regions, in order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The regions' layouts, in order.
    pub fn layout(&self) -> Vec<RegionLayout> {
        self.regions.iter().map(RamRegion::layout).collect()
    }

    /// Total bytes.
    pub fn len(&self) -> u64 {
        self.regions.iter().map(RamRegion::len).sum()
    }

    /// Whether there is no RAM at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The region an extent lies in, if all of it does.
    ///
    /// # Errors
    /// [`OutOfBounds`] for an unknown region, an empty extent, or one that leaves its region.
    pub fn check(&self, extent: &Extent) -> Result<&RamRegion, OutOfBounds> {
        let region = self.regions.get(extent.region as usize).ok_or(OutOfBounds { extent: *extent })?;
        match extent.offset.checked_add(extent.len) {
            Some(end) if extent.len > 0 && end <= region.len() => Ok(region),
            _ => Err(OutOfBounds { extent: *extent }),
        }
    }

    /// Address of an extent's first byte in this process; all `extent.len` bytes from there are
    /// mapped.
    ///
    /// # Errors
    /// [`OutOfBounds`] as for [`check`](Self::check).
    pub fn address(&self, extent: &Extent) -> Result<*mut u8, OutOfBounds> {
        let region = self.check(extent)?;
        // `check` proved offset + len <= region.len, so the sum stays inside the mapping.
        Ok(region.address().wrapping_add(extent.offset as usize))
    }
}
