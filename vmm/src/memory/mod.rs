//! Guest RAM: memfds, mapped shared.
//!
//! A memfd rather than anonymous memory, because a migration wants to ask what of it exists
//! (`SEEK_DATA`), to send it by file (`sendfile`), and to share it with other processes. Nothing is
//! touched when it is mapped: RAM that the guest never wrote costs nothing here and is never sent.
//!
//! A region of small pages is made of several memfds (see [`RamRegion`]), mapped one behind the other: a
//! destination fills RAM that does not exist yet by writing to the file, and the kernel lets one thread at a
//! time write to a file. KVM and `vm-memory` see one region all the same, so that a device's buffer may lie
//! anywhere.

pub(crate) mod collapse;
pub mod host;
pub mod layout;
mod populate;
mod region;
pub(crate) mod slot;
pub mod thp;
pub mod write_log;

pub use region::Region;
pub use thp::Thp;
pub use write_log::WriteLog;

use migration::memory::{self, AddressSpace, MemoryError, PAGE_SIZE, Ram, RamFile, RamRegion, RegionLayout};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};

/// Guest memory as `vm-memory` sees it, with the VMM's own writes logged.
pub type GuestMemory = vm_memory::GuestRegionCollection<Region>;

/// A part of guest RAM that knows which pages it is.
pub type Slice<'m> = vm_memory::VolatileSlice<'m, vm_memory::bitmap::RefSlice<'m, WriteLog>>;

/// What backs guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageSize {
    /// Ordinary pages of 4 KiB.
    #[default]
    Small,
    /// Huge pages of 2 MiB.
    Huge2M,
    /// Huge pages of 1 GiB.
    Huge1G,
}

impl PageSize {
    /// The page's size in bytes.
    pub fn bytes(self) -> u64 {
        match self {
            PageSize::Small => PAGE_SIZE,
            PageSize::Huge2M => 2 << 20,
            PageSize::Huge1G => 1 << 30,
        }
    }

    fn memfd_flags(self) -> libc::c_uint {
        match self {
            PageSize::Small => 0,
            PageSize::Huge2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            PageSize::Huge1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        }
    }
}

impl std::fmt::Display for PageSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PageSize::Small => "4k",
            PageSize::Huge2M => "2m",
            PageSize::Huge1G => "1g",
        })
    }
}

impl std::str::FromStr for PageSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "4k" => Ok(PageSize::Small),
            "2m" => Ok(PageSize::Huge2M),
            "1g" => Ok(PageSize::Huge1G),
            _ => Err(format!("\"{text}\" is no page size; use 4k, 2m or 1g")),
        }
    }
}

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size no machine can have.
    #[error("{size} bytes of guest memory: use at least 16 MiB, in whole MiB")]
    Size {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// More than the guest's CPU can address.
    #[error(
        "{} MiB of guest memory end beyond what this host's guests can address ({bits} physical address bits)",
        size >> 20
    )]
    AddressBits {
        /// What was asked for, in bytes.
        size: u64,
        /// Width of a guest-physical address.
        bits: u8,
    },
    /// More than the host has free.
    #[error(
        "{} MiB of guest memory: the host has {} MiB available; use less or free some",
        size >> 20, available >> 20
    )]
    HostMemory {
        /// What was asked for, in bytes.
        size: u64,
        /// What is available, in bytes.
        available: u64,
    },
    /// Making huge pages of guest memory would cost content in a migration.
    #[error("kernels before 6.4 hide memory from a migration while they make huge pages of it")]
    HidesMemory,
    /// Not a multiple of the huge page.
    #[error("{} MiB of guest memory do not divide into pages of {} MiB", size >> 20, page >> 20)]
    HugePageMultiple {
        /// What was asked for, in bytes.
        size: u64,
        /// The page size in bytes.
        page: u64,
    },
    /// Too few huge pages.
    #[error(
        "guest memory needs {wanted} huge pages of {kib} KiB and {free} are free; \
         raise /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"
    )]
    HugePages {
        /// Pages needed.
        wanted: u64,
        /// Pages free.
        free: u64,
        /// Page size in KiB.
        kib: u64,
    },
    /// No huge pages of that size.
    #[error("this host has no huge pages of {kib} KiB; use another page size")]
    NoHugePages {
        /// Page size in KiB.
        kib: u64,
    },
    /// Regions that are not those of any size.
    #[error("the memory layout is not one this machine can have")]
    Layout,
    /// A system call failed.
    #[error("cannot {what} guest memory: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The migration engine refused it.
    #[error(transparent)]
    Refused(#[from] MemoryError),
    /// vm-memory refused the regions.
    #[error("cannot map guest memory: {0}")]
    Map(#[from] vm_memory::mmap::MmapRegionError),
    /// vm-memory refused their arrangement.
    #[error("cannot arrange guest memory: {0}")]
    Arrange(#[from] vm_memory::GuestRegionCollectionError),
}

impl Error {
    fn last(what: &'static str) -> Self {
        Error::System { what, source: io::Error::last_os_error() }
    }
}

/// A machine's RAM, in the two forms its users want: `vm-memory`'s for the VMM's own accesses,
/// which are logged, and the engine's for migration.
pub struct GuestRam {
    memory: GuestMemory,
    /// What the guest boots from when it is reset. It is memory for the engine, which moves it with the rest
    /// before the first round and never again, and none for the guest.
    boot_store: Option<Arc<Region>>,
    ram: Arc<Ram>,
    pages: PageSize,
    thp: Thp,
}

impl GuestRam {
    /// Maps `size` bytes of RAM, for which the kernel may use transparent huge pages, unless it is one
    /// [that hides memory](memory::making_huge_pages_hides_memory) then. Nothing is populated.
    ///
    /// # Errors
    /// [`Error`] for a size that is no machine's or more than the host has free.
    pub fn new(size: u64, pages: PageSize) -> Result<Self, Error> {
        Self::with_thp(size, pages, Thp::On)
    }

    /// The same, with a word on transparent huge pages.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_thp(size: u64, pages: PageSize, thp: Thp) -> Result<Self, Error> {
        Self::with_boot_store(size, pages, thp, 0)
    }

    /// The same, and `store` bytes more for what the guest boots from when it is reset.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_boot_store(size: u64, pages: PageSize, thp: Thp, store: u64) -> Result<Self, Error> {
        let thp = if memory::making_huge_pages_hides_memory() { Thp::Off } else { thp };
        let regions = layout::regions(size)?;
        if regions.iter().any(|r| r.len % pages.bytes() != 0) {
            return Err(Error::HugePageMultiple { size, page: pages.bytes() });
        }
        host::check(size, pages)?;
        let mut mapped = Vec::with_capacity(regions.len());
        let mut described = Vec::with_capacity(regions.len());
        for (number, layout) in regions.into_iter().enumerate() {
            let (region, ram) = map_region(number, layout, pages, thp)?;
            mapped.push(region);
            described.push(ram);
        }
        let memory = GuestMemory::from_arc_regions(mapped)?;
        let mut boot_store = None;
        if store > 0 {
            host::check(store, PageSize::Small)?;
            let layout = layout::boot_store(store);
            let (region, ram) = map_region(described.len(), layout, PageSize::Small, thp)?;
            boot_store = Some(region);
            described.push(ram);
        }
        // Huge pages of their own are none that the kernel could make.
        let thp = if pages == PageSize::Small { thp } else { Thp::Off };
        Ok(GuestRam { memory, boot_store, ram: Arc::new(Ram::new(described)?), pages, thp })
    }

    /// RAM for the VMM's own, logged accesses.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// RAM for the migration engine.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// What backs it.
    pub fn page_size(&self) -> PageSize {
        self.pages
    }

    /// The log of the VMM's own writes to region number `region`.
    pub fn write_log(&self, region: usize) -> Option<&WriteLog> {
        self.memory.iter().chain(self.boot_store()).nth(region).map(Region::write_log)
    }

    /// How many of the regions are the guest's. They come first.
    pub fn guest_regions(&self) -> usize {
        self.memory.num_regions()
    }

    /// The region of what the guest boots from when it is reset.
    pub fn boot_store(&self) -> Option<&Region> {
        self.boot_store.as_deref()
    }
}

type Mapped = (Arc<Region>, RamRegion);

fn map_region(number: usize, layout: RegionLayout, pages: PageSize, thp: Thp) -> Result<Mapped, Error> {
    let len = layout.len as usize;
    let (access, log) = (libc::PROT_READ | libc::PROT_WRITE, WriteLog::new(len));
    let builder =
        MmapRegionBuilder::new_with_bitmap(len, log).with_mmap_prot(access).with_mmap_flags(libc::MAP_SHARED);
    let (mapping, space, part_len, files) = if pages == PageSize::Small {
        let part_len = memory::part_len(layout.len);
        let starts = (0..layout.len).step_by(part_len as usize);
        let sizes = starts.map(|start| part_len.min(layout.len - start));
        let files: Result<Vec<File>, Error> =
            sizes.enumerate().map(|(part, len)| create_memfd(number, part, len, pages)).collect();
        let (files, space) = (files?, AddressSpace::reserve(len)?);
        // SAFETY: the range is the one reserved above, which nobody has used yet; what takes its place goes
        // away with it.
        unsafe { memory::map_parts(space.address(), layout.len, part_len, &files) }?;
        thp::advise(space.address(), len, thp);
        // SAFETY: the range is mapped as the builder is told, and is unmapped after the region, which gets
        // `space` below.
        let mapping = unsafe { builder.with_raw_mmap_pointer(space.address().as_ptr()) }.build()?;
        (mapping, Some(space), part_len, files)
    } else {
        // Only hugetlbfs itself finds a place that is aligned for it; nobody writes to such a file.
        let file = create_memfd(number, 0, layout.len, pages)?;
        let duplicate = file.try_clone().map_err(|source| Error::System { what: "duplicate", source })?;
        let builder = builder.with_file_offset(FileOffset::new(duplicate, 0)).with_hugetlbfs(true);
        (builder.build()?, None, layout.len, vec![file])
    };
    let address = NonNull::new(mapping.as_ptr()).ok_or_else(|| Error::last("map"))?;
    // A core dump with the guest's memory in it would be as large as the guest, and its secrets.
    // SAFETY: the range is exactly the mapping built above; the advice changes no content.
    if unsafe { libc::madvise(address.as_ptr().cast(), len, libc::MADV_DONTDUMP) } != 0 {
        return Err(Error::last("exclude from core dumps the"));
    }
    let region = Arc::new(Region::new(mapping, GuestAddress(layout.guest_address), space)?);
    let files = files.into_iter().map(RamFile::from).collect();
    // SAFETY: the mapping is shared, readable and writable, covers the files one behind the other, `part_len`
    // bytes of each and what is left of the last, and lives as long as `region`, of which the owner below is
    // a reference.
    let ram = unsafe { RamRegion::new(layout, address, pages.bytes(), files, part_len, region.clone())? };
    Ok((region, ram))
}

fn create_memfd(region: usize, part: usize, len: u64, pages: PageSize) -> Result<File, Error> {
    let name = std::ffi::CString::new(format!("guest-ram-{region}.{part}")).unwrap_or_default();
    Ok(memory::memfd(&name, len, pages.memfd_flags())?)
}
