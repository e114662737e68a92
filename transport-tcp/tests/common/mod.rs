//! A machine that is nothing but memory, for moving through streams of every kind.

use migration::conformance::bed::{REGION_PAGES, extent, ram, ram_of, read, scramble};
use migration::destination;
use migration::dirty::DirtySet;
use migration::link::ControlLink;
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use migration::memory::{PAGE_SIZE, Ram, RegionLayout};
use migration::report::Report;
use migration::source;
use migration::transport::{DestinationTransport, SourceTransport};
use migration::{Code, Failure};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The state of a paused [`Memory`], and the proof that it was loaded.
const STATE: &[u8] = b"a machine without processors";

/// Memory that changes a little whenever it is asked what has changed, until it is paused.
pub struct Memory {
    ram: Arc<Ram>,
    changes: AtomicU64,
    paused: AtomicBool,
    random: Mutex<fastrand::Rng>,
}

impl Memory {
    /// Memory with content of its own for each `seed`.
    pub fn new(seed: u64) -> Self {
        let ram = ram();
        let mut random = fastrand::Rng::with_seed(seed);
        scramble(&ram, &extent(0, 100, 2000), &mut random);
        scramble(&ram, &extent(1, 7, 500), &mut random);
        Memory { ram, changes: AtomicU64::new(0), paused: AtomicBool::new(false), random: random.into() }
    }

    /// Whether `other` holds the same bytes.
    pub fn equals(&self, other: &Ram) -> bool {
        let regions = REGION_PAGES.into_iter().zip(0..);
        let mut whole = regions.map(|(pages, region)| extent(region, 0, pages));
        whole.all(|extent| read(&self.ram, &extent) == read(other, &extent))
    }

    /// How often it has changed.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
}

impl SourceMachine for Memory {
    fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.ram)
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        Ok(Vec::new())
    }

    fn start_tracking(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        if !self.paused.load(Ordering::Relaxed) {
            let mut random = self.random.lock().unwrap();
            let page = random.u64(..REGION_PAGES[0]);
            scramble(&self.ram, &extent(0, page, 1), &mut random);
            set.insert(0, page);
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn pause(&self) -> Result<(), Failure> {
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&self) -> Result<(), Failure> {
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        Ok(STATE.into())
    }
}

/// Builds memory for what arrives.
pub struct Host;

/// What has arrived.
pub struct Arrived {
    pub ram: Arc<Ram>,
    loaded: bool,
    pub runs: bool,
}

impl DestinationHost for Host {
    type Machine = Arrived;

    fn build(&mut self, _description: &[u8], layout: &[RegionLayout]) -> Result<Arrived, Failure> {
        let pages: Vec<u64> = layout.iter().map(|region| region.len / PAGE_SIZE).collect();
        Ok(Arrived { ram: ram_of(&pages), loaded: false, runs: false })
    }
}

impl DestinationMachine for Arrived {
    fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.ram)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        self.loaded = state == STATE;
        if self.loaded { Ok(()) } else { Err(Failure::new(Code::STATE, "this is no state of a memory")) }
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.runs = self.loaded;
        Ok(())
    }
}

/// The source's side of a move.
pub fn send(
    machine: &Memory,
    link: &mut dyn ControlLink,
    transport: impl SourceTransport + 'static,
) -> Report {
    source::Migration::new(machine, link).transport(transport).run()
}

/// The destination's.
pub fn receive(
    link: &mut dyn ControlLink,
    transport: impl DestinationTransport + 'static,
) -> Result<Arrived, Failure> {
    Ok(destination::Migration::new(&mut Host, link).transport(transport).run()?.conclude())
}
