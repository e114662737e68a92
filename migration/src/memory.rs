//! Guest RAM as the engine and the transports see it: regions, extents and their bounds.
//!
//! A [`Ram`] is a list of regions, each one mapping of one or more memfds. Both sides of a migration hold
//! equal lists (the layout is agreed on in Prepare), so that an [`Extent`] names the same bytes at
//! both ends. Nobody reads or writes through an extent that [`Ram::check`] has not passed.

use serde::{Deserialize, Serialize};
use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// The unit of dirty tracking, in bytes, whatever pages back the region.
pub const PAGE_SIZE: u64 = 4096;

/// Most regions that a machine may have. Bounds what a peer can make us allocate.
pub const MAX_REGIONS: usize = 64;

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

/// One contiguous mapping of guest RAM.
///
/// The files behind it follow each other, each holding a *part* of the same length; only the last may be shorter.
/// There are several of them because the kernel lets one thread at a time write to a file, and a transport may
/// want to write by file. Both sides are free to cut their regions differently.
pub struct RamRegion {
    layout: RegionLayout,
    address: NonNull<u8>,
    backing_page: u64,
    files: Vec<OwnedFd>,
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
    /// `files` (memfds or hugetlbfs files) hold the same bytes, `part_len` in each; `backing_page` is the size in
    /// bytes of the pages behind it (4096, or a huge page's size).
    ///
    /// # Panics
    /// When the files are not as many as there are parts.
    ///
    /// # Safety
    /// `address..address + layout.len` must be a shared, readable and writable mapping of those
    /// files, each from its start, and must stay mapped for as long as `owner` lives.
    pub unsafe fn new(
        layout: RegionLayout,
        address: NonNull<u8>,
        backing_page: u64,
        files: Vec<OwnedFd>,
        part_len: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        assert_eq!(files.len() as u64, layout.len.div_ceil(part_len), "a file for each part");
        RamRegion { layout, address, backing_page, files, part_len, _owner: owner }
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

    /// Where `len` bytes from `offset` are in the files: a piece for each part that they touch. What lies beyond
    /// the region is left out.
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
            Some(Piece { file: self.files[part].as_fd(), part, offset: in_file, len })
        })
    }
}

/// Bytes of a region that are in one file.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Number of the part.
    pub part: usize,
    /// Where in the file they begin.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
}

/// All of a machine's RAM.
pub struct Ram {
    regions: Vec<RamRegion>,
}

impl Ram {
    /// RAM of these regions, in the order both sides agreed on.
    pub fn new(regions: Vec<RamRegion>) -> Self {
        Ram { regions }
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
