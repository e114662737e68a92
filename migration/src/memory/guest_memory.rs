//! RAM that `vm-memory` has mapped.

use super::{MemoryError, Ram, RamFile, RamRegion, RegionLayout, mapping};
use std::ptr::NonNull;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

impl Ram {
    /// Describes the guest memory that `vm-memory` has mapped, region by region in its order. The mappings
    /// live at least as long as the result.
    ///
    /// Every region has to be a shared mapping of a file: build it with
    /// [`from_ranges_with_files`](GuestMemoryMmap::from_ranges_with_files) and a memfd, at any offset, of
    /// ordinary or huge pages. One file may stand behind several regions.
    ///
    /// Call this before the guest runs: kernels before 6.4 are advised here to make no huge pages of it, as
    /// they [hide memory](super::making_huge_pages_hides_memory) meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::NotShared`] for anonymous and for private memory, as `from_ranges` makes it; others as
    /// for [`Ram::new`].
    pub fn from_guest_memory<B>(memory: &GuestMemoryMmap<B>) -> Result<Ram, MemoryError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let regions = memory.iter().map(|region| {
            let layout = RegionLayout { guest_address: region.start_addr().raw_value(), len: region.len() };
            let mapped = region.get_mmap();
            let not_shared = || MemoryError::NotShared { address: mapped.as_ptr() as usize };
            let address = NonNull::new(mapped.as_ptr()).ok_or_else(not_shared)?;
            let behind = mapped.file_offset().ok_or_else(not_shared)?;
            let backing_page = mapping::backing_page(behind.file())?;
            let file = behind.file().try_clone();
            let file =
                file.map_err(|source| MemoryError::System { what: "duplicate the file of", source })?;
            let file = RamFile { file: file.into(), offset: behind.start() };
            // SAFETY: `RamRegion::new` itself checks what is mapped there. It stays mapped for as long as its
            // `MmapRegion` lives, of which the owner is a reference; where `vm-memory` was given a foreign
            // mapping, whoever gave it has promised the same.
            unsafe { RamRegion::new(layout, address, backing_page, vec![file], layout.len, mapped) }
        });
        Ram::new(regions.collect::<Result<_, _>>()?)
    }
}
