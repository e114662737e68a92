//! Two pieces of RAM and a connected data plane between them.

use super::Fixture;
use crate::memory::{Extent, PAGE_SIZE, Piece, Ram, RamRegion, RegionLayout};
use crate::scan;
use crate::transport::{DestinationPlane, Session, SourcePlane, Token};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

/// Sizes of the regions of a bed's RAM, in pages: neither a multiple of 64 pages, so that ends show.
pub const REGION_PAGES: [u64; 2] = [8192 + 3, 512 + 1];

/// Patience of a session in which nothing is to be late.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Both ends of a session.
pub struct Bed {
    /// The session as the source has it; its `ram` is the source's.
    pub source: Session,
    /// The shadow RAM.
    pub shadow: Arc<Ram>,
    /// What the destination offered.
    pub offer: Vec<u8>,
    /// The destination's end.
    pub destination: Box<dyn DestinationPlane>,
    /// The source's end.
    pub plane: Box<dyn SourcePlane>,
}

impl Bed {
    /// A session with `lanes` lanes.
    ///
    /// # Panics
    /// If it cannot be set up.
    pub fn new(fixture: &dyn Fixture, lanes: u16) -> Bed {
        Bed::with_patience(fixture, lanes, PATIENCE)
    }

    /// A session whose two sides wait at most `timeout` for each other.
    ///
    /// # Panics
    /// If it cannot be set up.
    pub fn with_patience(fixture: &dyn Fixture, lanes: u16, timeout: Duration) -> Bed {
        let token = Token::random().expect("random numbers");
        let shadow = ram();
        let there = Session { token, ram: Arc::clone(&shadow), timeout };
        let (offer, destination) = fixture.destination().offer(&there).expect("an offer");
        let source = Session { token, ram: ram(), timeout };
        let mut plane = fixture.source(lanes).connect(&source, &offer).expect("a connection");
        assert_eq!(plane.lanes().len(), usize::from(lanes));
        Bed { source, shadow, offer, destination, plane }
    }

    /// Posts a barrier on every lane and waits for all of them.
    ///
    /// # Panics
    /// If a lane fails.
    pub fn barrier(&mut self, round: u32) {
        for lane in self.plane.lanes() {
            lane.post_barrier(round).expect("a posted barrier");
        }
        for lane in self.plane.lanes() {
            lane.wait_barrier(round).expect("a confirmed barrier");
        }
    }

    /// Pages at which the two sides differ.
    pub fn differences(&self) -> Vec<(usize, u64)> {
        let mut different = Vec::new();
        for (region, pages) in REGION_PAGES.into_iter().enumerate() {
            let whole = extent(region as u32, 0, pages);
            let (ours, theirs) = (read(&self.source.ram, &whole), read(&self.shadow, &whole));
            let size = PAGE_SIZE as usize;
            let pages = ours.chunks(size).zip(theirs.chunks(size)).zip(0..);
            different.extend(pages.filter(|((a, b), _)| a != b).map(|(_, page)| (region, page)));
        }
        different
    }
}

/// An extent, in pages.
pub fn extent(region: u32, page: u64, pages: u64) -> Extent {
    Extent { region, offset: page * PAGE_SIZE, len: pages * PAGE_SIZE }
}

/// RAM of [`REGION_PAGES`], never touched.
pub fn ram() -> Arc<Ram> {
    ram_of(&REGION_PAGES)
}

/// RAM with regions of so many pages, never touched.
pub fn ram_of(region_pages: &[u64]) -> Arc<Ram> {
    let regions = region_pages.iter().enumerate().map(|(number, pages)| {
        let layout = RegionLayout { guest_address: (number as u64) << 32, len: pages * PAGE_SIZE };
        region(layout).expect("memory for the test")
    });
    Arc::new(Ram::new(regions.collect()))
}

struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the struct is an address and a length, and is used for nothing but to unmap them.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method reads or writes the mapping.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its last user has dropped it.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

/// In two parts, so that whoever forgets that there may be several is found out.
fn region(layout: RegionLayout) -> io::Result<RamRegion> {
    let len = layout.len as usize;
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
    let address = unsafe {
        libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANON, -1, 0)
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let address = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
    let owner = Arc::new(Mapping { address, len });
    let part_len = (layout.len / PAGE_SIZE).div_ceil(2) * PAGE_SIZE;
    let mut files = Vec::new();
    for start in (0..layout.len).step_by(part_len as usize) {
        let part = part_len.min(layout.len - start);
        let file = memfd(part)?;
        let (at, access) =
            (address.as_ptr().wrapping_add(start as usize), libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: the range lies inside the mapping made above, which nobody else knows yet.
        let mapped = unsafe { libc::mmap(at.cast(), part as usize, access, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        files.push(file.into());
    }
    // SAFETY: the mappings made above are shared, readable and writable, cover the files from their starts,
    // follow each other without a gap for `len` bytes, and are unmapped when their owner is dropped.
    Ok(unsafe { RamRegion::new(layout, address, PAGE_SIZE, files, part_len, owner) })
}

fn memfd(len: u64) -> io::Result<File> {
    // SAFETY: the name is a C string, and lives for ever.
    let fd = unsafe { libc::memfd_create(c"conformance".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}

/// The files that hold an extent, and where.
fn pieces(ram: &Ram, extent: &Extent) -> Vec<(File, u64, usize)> {
    let region = ram.check(extent).expect("an extent inside memory");
    let pieces = region.pieces(extent.offset, extent.len);
    let owned = |piece: Piece<'_>| {
        let file = piece.file.try_clone_to_owned().expect("a descriptor").into();
        (file, piece.offset, piece.len as usize)
    };
    pieces.map(owned).collect()
}

/// What an extent holds. Through the file, so that no reference to memory that changes ever exists, and
/// nothing comes to exist by being looked at.
pub fn read(ram: &Ram, extent: &Extent) -> Vec<u8> {
    let mut content = vec![0; extent.len as usize];
    let mut rest = &mut content[..];
    for (file, offset, len) in pieces(ram, extent) {
        let (now, later) = rest.split_at_mut(len);
        file.read_exact_at(now, offset).expect("readable memory");
        rest = later;
    }
    content
}

/// Writes to an extent, as a guest would.
pub fn write(ram: &Ram, extent: &Extent, content: &[u8]) {
    assert_eq!(content.len() as u64, extent.len);
    let mut rest = content;
    for (file, offset, len) in pieces(ram, extent) {
        let (now, later) = rest.split_at(len);
        file.write_all_at(now, offset).expect("writable memory");
        rest = later;
    }
}

/// Fills an extent with random bytes.
pub fn scramble(ram: &Ram, extent: &Extent, random: &mut fastrand::Rng) {
    let mut content = vec![0; extent.len as usize];
    random.fill(&mut content);
    write(ram, extent, &content);
}

/// Bytes of RAM that exist in memory.
pub fn resident(ram: &Ram) -> u64 {
    let mut pages = 0;
    for region in ram.regions() {
        scan::existing(region, 0, region.pages(), |_, n| pages += n);
    }
    pages * PAGE_SIZE
}
