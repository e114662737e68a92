//! Two pieces of RAM and a connected data plane between them.

use super::Fixture;
use crate::memory::{Extent, PAGE_SIZE, Ram, RegionLayout};
use crate::scan;
use crate::transport::{DestinationPlane, Secret, Session, SourcePlane, Token};
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
        let secret = Secret::random().expect("random numbers");
        let there = Session::new(token, Arc::clone(&shadow), timeout).with_secret(secret);
        let (offer, destination) = fixture.destination().offer(&there).expect("an offer");
        let source = Session::new(token, ram(), timeout).with_secret(secret);
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

/// RAM with regions of so many pages, never touched. Each is in two parts, so that whoever forgets that there
/// may be several is found out.
pub fn ram_of(region_pages: &[u64]) -> Arc<Ram> {
    let layout: Vec<_> = (0..)
        .zip(region_pages)
        .map(|(number, pages)| RegionLayout { guest_address: number << 32, len: pages * PAGE_SIZE })
        .collect();
    let halves = |len: u64| (len / PAGE_SIZE).div_ceil(2) * PAGE_SIZE;
    Arc::new(Ram::allocate_in_parts(&layout, halves).expect("memory for the test"))
}

/// RAM with regions of so many bytes, of which each claims to be made of pages of so many bytes. Nobody may
/// touch it: it is for tests in which only sizes count.
pub fn ram_that_claims(regions: &[(u64, u64)]) -> Ram {
    let layout: Vec<_> = (0..)
        .zip(regions)
        .map(|(number, &(len, _))| RegionLayout { guest_address: number << 41, len })
        .collect();
    let mut ram = Ram::allocate_in_parts(&layout, |len| len).expect("address space for the test");
    ram.claim_backing(regions.iter().map(|&(_, backing)| backing));
    ram
}

/// What an extent holds. Through the file, so that no reference to memory that changes ever exists, and
/// nothing comes to exist by being looked at.
pub fn read(ram: &Ram, extent: &Extent) -> Vec<u8> {
    let mut content = vec![0; extent.len as usize];
    let region = ram.check(extent).expect("an extent inside memory");
    region.read(extent.offset, &mut content).expect("readable memory");
    content
}

/// Writes to an extent, as a guest would.
pub fn write(ram: &Ram, extent: &Extent, content: &[u8]) {
    assert_eq!(content.len() as u64, extent.len);
    let region = ram.check(extent).expect("an extent inside memory");
    region.write(extent.offset, content).expect("writable memory");
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
