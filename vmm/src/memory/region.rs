//! A region of guest RAM for `vm-memory`, together with what its mapping lies in.

use super::{Error, WriteLog};
use migration::memory::AddressSpace;
use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, MmapRegion, VolatileSlice, guest_memory,
};

/// A region of guest RAM, with the VMM's own writes logged.
///
/// `vm-memory` lets the kernel choose where a mapping lies. A region of ordinary pages lies where huge folios
/// fit, in address space that was reserved for it, and which has to live as long as the region.
#[derive(Debug)]
pub struct Region {
    region: GuestRegionMmap<WriteLog>,
    // Behind what uses it, so that it is dropped last.
    _space: Option<AddressSpace>,
}

impl Region {
    /// The region of `mapping`, which lies in `space` unless it owns its memory.
    pub(super) fn new(
        mapping: MmapRegion<WriteLog>,
        start: GuestAddress,
        space: Option<AddressSpace>,
    ) -> Result<Self, Error> {
        let region = GuestRegionMmap::new(mapping, start).ok_or(Error::Layout)?;
        Ok(Region { region, _space: space })
    }

    /// The log of the VMM's own writes.
    pub(super) fn write_log(&self) -> &WriteLog {
        // The mapping's own; the trait's method of that name gives a slice of it.
        MmapRegion::bitmap(&self.region)
    }
}

impl GuestMemoryRegion for Region {
    type B = WriteLog;

    fn len(&self) -> GuestUsize {
        self.region.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.region.start_addr()
    }

    fn bitmap(&self) -> BS<'_, WriteLog> {
        GuestMemoryRegion::bitmap(&self.region)
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> guest_memory::Result<*mut u8> {
        self.region.get_host_address(address)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        GuestMemoryRegion::file_offset(&self.region)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> guest_memory::Result<VolatileSlice<'_, BS<'_, WriteLog>>> {
        GuestMemoryRegion::get_slice(&self.region, offset, count)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        GuestMemoryRegion::is_hugetlbfs(&self.region)
    }
}

impl GuestMemoryRegionBytes for Region {}
