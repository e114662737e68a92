//! What the loader left in memory, where the working set lies, and mapping it.

use crate::abi::{PAGE, WORKING_SET_START};
use crate::options::Options;

const GIB: u64 = 1 << 30;
const GIB_4: u64 = 4 * GIB;

/// What one PDPT maps.
const MAPPABLE: u64 = 512 * GIB;

/// The loader's memory map entry.
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    _reserved: u32,
}

/// PVH's start info.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    map: u64,
    map_entries: u32,
    _reserved: u32,
}

/// Where the working set is. Half of it lies above the PCI hole where there is memory there, so that
/// both parts of RAM are exercised.
#[derive(Clone, Copy)]
pub struct WorkingSet {
    low: u64,
    low_pages: u64,
    high_pages: u64,
}

/// Reads what the loader says.
///
/// # Safety
/// `address` must be that of a PVH start info, in memory that is mapped.
pub unsafe fn read(address: u64) -> (Options, WorkingSet) {
    // SAFETY: as the caller says. A null command line would be the loader saying that there is none.
    let info = unsafe { &*(address as *const StartInfo) };
    let text = (0..).map_while(|at| {
        // SAFETY: the loader put a zero-terminated text there, and the iterator ends with it.
        let byte = unsafe { ((info.command_line + at) as *const u8).read() };
        (byte != 0).then_some(byte)
    });
    let options = if info.command_line == 0 { Options::DEFAULT } else { Options::parse(text) };
    let (mut low_end, mut high_end) = (0, GIB_4);
    for index in 0..u64::from(info.map_entries) {
        // SAFETY: the loader says that there are so many entries.
        let entry = unsafe { &*((info.map + index * size_of::<MapEntry>() as u64) as *const MapEntry) };
        let end = entry.address.saturating_add(entry.size).min(MAPPABLE);
        match entry.kind {
            1 if end <= GIB_4 => low_end = end.max(low_end),
            1 if entry.address == GIB_4 => high_end = end,
            _ => {}
        }
    }
    (options, WorkingSet::place(options.working_set / PAGE, low_end / PAGE * PAGE, high_end))
}

impl WorkingSet {
    /// Places as many of `pages` as there is room for.
    fn place(pages: u64, low_end: u64, high_end: u64) -> Self {
        let high_room = (high_end - GIB_4) / PAGE;
        let low_room = low_end.saturating_sub(WORKING_SET_START) / PAGE;
        let low_pages = (pages - (pages / 2).min(high_room)).min(low_room);
        let high_pages = (pages - low_pages).min(high_room);
        WorkingSet { low: low_end - low_pages * PAGE, low_pages, high_pages }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.low_pages + self.high_pages
    }

    /// Address of a page.
    pub fn page(&self, number: u64) -> *mut u64 {
        let address = match number.checked_sub(self.low_pages) {
            None => self.low + number * PAGE,
            Some(high) => GIB_4 + high * PAGE,
        };
        address as *mut u64
    }

    /// The end of the part that `page` is in: up to there, page numbers and addresses go together.
    pub fn part_end(&self, page: u64) -> u64 {
        if page < self.low_pages { self.low_pages } else { self.pages() }
    }

    /// Maps the part above 4 GiB. Page directories for it are taken from just behind the image, one page
    /// for each gibibyte: what is not used is not touched.
    pub fn map(&self) {
        unsafe extern "C" {
            static mut pdpt: [u64; 512];
            static image_end: u8;
        }
        let mut directory = (&raw const image_end as u64).next_multiple_of(PAGE);
        let end = (GIB_4 + self.high_pages * PAGE).div_ceil(GIB);
        for gibibyte in 4..end {
            for entry in 0..512 {
                let mapping = gibibyte << 30 | entry << 21 | 0x83;
                // SAFETY: between the image and WORKING_SET_START is RAM that nothing else uses: more than
                // five megabytes, where two suffice for the 508 directories that MAPPABLE allows.
                unsafe { ((directory + entry * 8) as *mut u64).write_volatile(mapping) };
            }
            // SAFETY: the first vCPU's table, and an entry of it that is not in use yet.
            unsafe { (&raw mut pdpt[gibibyte as usize]).write_volatile(directory | 3) };
            directory += PAGE;
        }
    }
}
