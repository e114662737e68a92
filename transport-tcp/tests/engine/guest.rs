//! A small machine: memory that is written to, a register, and the lock of a disk.

use migration::conformance::bed;
use migration::dirty::DirtySet;
use migration::machine::{Arbiter, DestinationHost, DestinationMachine, SourceMachine};
use migration::memory::{Ram, RegionLayout};
use migration::{Code, Failure};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A call of the engine's into a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Ram,
    Describe,
    StartTracking,
    StopTracking,
    CollectDirty,
    ClearDirty,
    BeforePause,
    Pause,
    Resume,
    Save,
    Release,
    Take,
    HandoverEstimate,
}

/// The machine at the source.
pub struct Guest {
    ram: Arc<Ram>,
    register: AtomicU64,
    runs: AtomicBool,
    pauses: AtomicU64,
    has_disk: AtomicBool,
    dirty: Mutex<DirtySet>,
    /// Panic in this call.
    pub panics_in: Mutex<Option<Call>>,
    /// How long saving takes.
    pub save_takes: Duration,
    /// What it says of its part of a handover.
    pub estimate: Option<Duration>,
}

impl Guest {
    /// A guest that runs and has written to a few hundred pages.
    pub fn start() -> Guest {
        let guest = Guest::new(bed::ram(), 42);
        let mut random = fastrand::Rng::with_seed(7);
        bed::scramble(&guest.ram, &bed::extent(0, 100, 300), &mut random);
        guest.runs.store(true, Ordering::SeqCst);
        guest.has_disk.store(true, Ordering::SeqCst);
        guest
    }

    fn new(ram: Arc<Ram>, register: u64) -> Guest {
        Guest {
            dirty: Mutex::new(DirtySet::empty(&ram)),
            ram,
            register: register.into(),
            runs: false.into(),
            pauses: 0.into(),
            has_disk: false.into(),
            panics_in: Mutex::new(None),
            save_takes: Duration::ZERO,
            estimate: None,
        }
    }

    /// Does what the guest does while it runs: writes to a page.
    pub fn write(&self, page: u64, value: u8) {
        assert!(self.runs(), "a paused guest writes nothing");
        bed::write(&self.ram, &bed::extent(0, page, 1), &[value; 4096]);
        self.dirty.lock().unwrap().insert(0, page);
    }

    pub fn runs(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }

    pub fn has_disk(&self) -> bool {
        self.has_disk.load(Ordering::SeqCst)
    }

    /// How often it was paused.
    pub fn pauses(&self) -> u64 {
        self.pauses.load(Ordering::SeqCst)
    }

    /// Whether `self` is what `other` was.
    pub fn is_like(&self, other: &Guest) -> bool {
        let all = |guest: &Guest| {
            let regions = bed::REGION_PAGES.iter().enumerate();
            regions
                .map(|(region, pages)| bed::read(&guest.ram, &bed::extent(region as u32, 0, *pages)))
                .collect::<Vec<_>>()
        };
        let register = |guest: &Guest| guest.register.load(Ordering::SeqCst);
        register(self) == register(other) && all(self) == all(other)
    }

    fn called(&self, call: Call) {
        let faulty = *self.panics_in.lock().unwrap() == Some(call);
        assert!(!faulty, "on purpose in {call:?}");
    }
}

impl SourceMachine for Guest {
    fn ram(&self) -> Arc<Ram> {
        self.called(Call::Ram);
        self.ram.clone()
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        self.called(Call::Describe);
        Ok(Vec::new())
    }

    fn start_tracking(&self) -> Result<(), Failure> {
        self.called(Call::StartTracking);
        self.dirty.lock().unwrap().clear();
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        self.called(Call::StopTracking);
        Ok(())
    }

    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        self.called(Call::CollectDirty);
        let mut dirty = self.dirty.lock().unwrap();
        set.union(&dirty);
        dirty.clear();
        Ok(())
    }

    fn clear_dirty(&self, _region: usize, _first_page: u64, _words: &[u64]) -> Result<(), Failure> {
        self.called(Call::ClearDirty);
        Ok(())
    }

    fn pause(&self) -> Result<(), Failure> {
        self.runs.store(false, Ordering::SeqCst);
        self.pauses.fetch_add(1, Ordering::SeqCst);
        // After half of the work.
        self.called(Call::Pause);
        Ok(())
    }

    fn resume(&self) -> Result<(), Failure> {
        self.called(Call::Resume);
        assert!(self.has_disk(), "runs without its disk");
        self.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        thread::sleep(self.save_takes);
        self.called(Call::Save);
        Ok(self.register.load(Ordering::SeqCst).to_le_bytes().to_vec())
    }

    fn handover_estimate(&self) -> Option<Duration> {
        self.called(Call::HandoverEstimate);
        self.estimate
    }

    fn arbiter(&self) -> Option<&dyn Arbiter> {
        Some(self)
    }

    fn before_pause(&self) {
        self.called(Call::BeforePause);
    }
}

impl Arbiter for Guest {
    fn release(&self) -> Result<(), Failure> {
        self.has_disk.store(false, Ordering::SeqCst);
        self.called(Call::Release);
        Ok(())
    }

    fn take(&self) -> Result<(), Failure> {
        self.called(Call::Take);
        self.has_disk.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// What builds the machine at the destination.
#[derive(Clone, Copy, Default)]
pub struct Host {
    /// What its machine says of its part of a handover.
    pub estimate: Option<Duration>,
    /// Whether its machine refuses to run.
    pub cannot_run: bool,
    /// How long it builds a machine.
    pub build_takes: Duration,
    /// How long its machine loads a state.
    pub load_takes: Duration,
}

/// The machine at the destination.
pub struct Shadow {
    host: Host,
    guest: Guest,
}

impl Shadow {
    pub fn into_guest(self) -> Guest {
        self.guest
    }
}

impl DestinationHost for Host {
    type Machine = Shadow;

    fn build(&mut self, _description: &[u8], _layout: &[RegionLayout]) -> Result<Shadow, Failure> {
        thread::sleep(self.build_takes);
        Ok(Shadow { host: *self, guest: Guest::new(bed::ram(), 0) })
    }
}

impl DestinationMachine for Shadow {
    fn ram(&self) -> Arc<Ram> {
        self.guest.ram.clone()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        thread::sleep(self.host.load_takes);
        let state =
            state.try_into().map_err(|_| Failure::new(Code::STATE, "a register of another length"))?;
        self.guest.register = u64::from_le_bytes(state).into();
        Ok(())
    }

    fn handover_estimate(&self) -> Option<Duration> {
        self.host.estimate
    }

    fn run(&mut self) -> Result<(), Failure> {
        if self.host.cannot_run {
            return Err(Failure::new(Code::HOST, "on purpose"));
        }
        self.guest.runs.store(true, Ordering::SeqCst);
        Ok(())
    }
}
