//! The suite passes what is right, and each of its cases finds what it is there to find.

use super::memory::{Arrived, Memory, MemoryHost};
use super::{MachineFixture, destination, source};
use crate::dirty::DirtySet;
use crate::failure::{Code, Failure};
use crate::machine::{Arbiter, DestinationHost, DestinationMachine, SourceMachine};
use crate::memory::{Extent, PAGE_SIZE, Ram, RegionLayout};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Two regions, neither a multiple of 64 pages.
const LAYOUT: [RegionLayout; 2] = [
    RegionLayout { guest_address: 0, len: 1003 * PAGE_SIZE },
    RegionLayout { guest_address: 1 << 32, len: 67 * PAGE_SIZE },
];

/// What is wrong with a machine, its host or its locks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Nothing,
    FindsNoWrites,
    MarksBeforeItWrites,
    ForgetsTheVmm,
    ForgetsAfterAFailure,
    TakesPagesOut,
    StopsOnlyWhatWasStarted,
    WritesWhilePaused,
    WritesWhenSaved,
    SavesOnce,
    ResumesOnce,
    ResumesOnlyWhatIsPaused,
    DescribesDifferently,
    WrongLayout,
    IgnoresTheLayout,
    LeavesSomething,
    PanicsAtNonsense,
    RefusesAllAfterNonsense,
    TakesAnyState,
    RunsAtOnce,
    StaysAsleep,
    OutlivesItsDrop,
    BreaksItsTwin,
    HasNoLocks,
    TakesNoLocksTwice,
    TakesBackWhatOthersHad,
    TakesLocksOfOthers,
    TakesSomeLocks,
}

/// Locks of two disks that two sides share: who has each, and who had it last.
#[derive(Default)]
struct Storage([(Option<u32>, u32); 2]);

struct Locks {
    storage: Arc<Mutex<Storage>>,
    side: u32,
    fault: Fault,
}

impl Arbiter for Locks {
    fn release(&self) -> Result<(), Failure> {
        let mut storage = self.storage.lock().unwrap();
        storage
            .0
            .iter_mut()
            .filter(|(owner, _)| *owner == Some(self.side))
            .for_each(|(owner, _)| *owner = None);
        Ok(())
    }

    fn take(&self) -> Result<(), Failure> {
        let refused = || Err(Failure::new(Code::DISKS, "somebody else has the disks, or had them"));
        let mut storage = self.storage.lock().unwrap();
        let has = |&(owner, _): &(Option<u32>, u32)| owner == Some(self.side);
        if self.fault == Fault::TakesNoLocksTwice && storage.0.iter().all(has) {
            return refused();
        }
        let side = self.side;
        let free = |(owner, last): (Option<u32>, u32)| match owner {
            Some(owner) => owner == side || self.fault == Fault::TakesLocksOfOthers,
            // The destination, with the higher number, comes after the source.
            None => last <= side || self.fault == Fault::TakesBackWhatOthersHad,
        };
        if self.fault == Fault::TakesSomeLocks && side > 1 {
            storage.0[0] = (Some(side), side);
        }
        if !storage.0.iter().all(|lock| free(*lock)) {
            return refused();
        }
        storage.0 = [(Some(side), side); 2];
        Ok(())
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        let _ = self.release();
    }
}

/// A [`Memory`] with a fault.
struct Faulty {
    memory: Arc<Memory>,
    locks: Option<Locks>,
    fault: Fault,
    tracked: AtomicBool,
    /// Held while a page is written; whether the machine is paused.
    paused: Arc<Mutex<bool>>,
    ended: Arc<AtomicBool>,
    /// How often something was done that a fault counts.
    count: AtomicU64,
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl Faulty {
    fn new(fault: Fault, locks: Option<Locks>) -> Self {
        let memory = Arc::new(Memory::new(&LAYOUT));
        memory.resume().unwrap();
        let (paused, ended) = (Arc::new(Mutex::new(false)), Arc::new(AtomicBool::new(false)));
        if fault == Fault::MarksBeforeItWrites {
            let (memory, paused, ended) = (Arc::clone(&memory), Arc::clone(&paused), Arc::clone(&ended));
            thread::spawn(move || mark_and_write(&memory, &paused, &ended));
        }
        let (tracked, count) = (AtomicBool::new(false), AtomicU64::new(0));
        Faulty { memory, locks, fault, tracked, paused, ended, count }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// Whether this was not the first time.
    fn again(&self) -> bool {
        self.count.fetch_add(1, Ordering::Relaxed) > 0
    }
}

/// The wrong way round, until the end.
fn mark_and_write(memory: &Memory, paused: &Mutex<bool>, ended: &AtomicBool) {
    for page in (0..1003).cycle() {
        let paused = paused.lock().unwrap();
        if ended.load(Ordering::Relaxed) {
            return;
        }
        if !*paused {
            memory.mark(0, page);
            thread::sleep(Duration::from_millis(8));
            memory.write_unmarked(0, page, u64::MAX);
        }
        drop(paused);
        thread::sleep(Duration::from_micros(100));
    }
}

fn fail<T>() -> Result<T, Failure> {
    Err(Failure::new(Code::OTHER, "the fault of this test"))
}

impl SourceMachine for Faulty {
    fn ram(&self) -> Arc<Ram> {
        self.memory.ram()
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        let turn = self.is(Fault::DescribesDifferently) && self.again();
        Ok(vec![if turn { 8 } else { 7 }; 40])
    }

    fn start_tracking(&self) -> Result<(), Failure> {
        self.tracked.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        let tracked = self.tracked.swap(false, Ordering::Relaxed);
        if self.is(Fault::StopsOnlyWhatWasStarted) && !tracked { fail() } else { Ok(()) }
    }

    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        match self.fault {
            Fault::FindsNoWrites => return Ok(()),
            Fault::TakesPagesOut => set.clear(),
            Fault::ForgetsAfterAFailure if self.count.load(Ordering::Relaxed) > 0 => return Ok(()),
            _ => {}
        }
        self.memory.collect_dirty(set)
    }

    fn pause(&self) -> Result<(), Failure> {
        *self.paused.lock().unwrap() = true;
        if self.is(Fault::WritesWhilePaused) { Ok(()) } else { self.memory.pause() }
    }

    fn resume(&self) -> Result<(), Failure> {
        let paused = std::mem::replace(&mut *self.paused.lock().unwrap(), false);
        let again = self.again();
        match self.fault {
            Fault::ResumesOnlyWhatIsPaused if !paused => fail(),
            Fault::ResumesOnce if again => Ok(()),
            Fault::BreaksItsTwin if !again => Ok(()),
            _ => self.memory.resume(),
        }
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        match self.fault {
            Fault::WritesWhenSaved => self.memory.write(1, 66, 1),
            Fault::SavesOnce if self.again() => return fail(),
            _ => {}
        }
        self.memory.save()
    }

    fn arbiter(&self) -> Option<&dyn Arbiter> {
        self.locks.as_ref().map(|locks| locks as &dyn Arbiter)
    }
}

struct FaultyHost {
    locks: Arc<Mutex<Storage>>,
    fault: Fault,
    seen_nonsense: bool,
}

struct Twin {
    arrived: Option<Arrived>,
    locks: Option<Locks>,
    fault: Fault,
}

impl Twin {
    fn arrived(&self) -> &Arrived {
        self.arrived.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        if self.fault == Fault::OutlivesItsDrop {
            std::mem::forget(self.arrived.take());
        }
    }
}

impl DestinationHost for FaultyHost {
    type Machine = Twin;

    fn build(&mut self, description: &[u8], layout: &[RegionLayout]) -> Result<Twin, Failure> {
        if description != [7; 40] {
            self.seen_nonsense = true;
            assert!(self.fault != Fault::PanicsAtNonsense, "the fault of this test");
            return fail();
        }
        if self.seen_nonsense && self.fault == Fault::RefusesAllAfterNonsense {
            return fail();
        }
        let layout = match self.fault {
            Fault::WrongLayout => &layout[..1],
            Fault::IgnoresTheLayout => &LAYOUT,
            _ => layout,
        };
        let mut arrived = MemoryHost.build(description, layout)?;
        match self.fault {
            Fault::LeavesSomething => arrived.0.write(0, 17, 1),
            Fault::RunsAtOnce => arrived.run()?,
            _ => {}
        }
        let side = if self.fault == Fault::HasNoLocks { None } else { Some(2) };
        let locks = side.map(|side| Locks { storage: Arc::clone(&self.locks), side, fault: self.fault });
        Ok(Twin { arrived: Some(arrived), locks, fault: self.fault })
    }
}

impl DestinationMachine for Twin {
    fn ram(&self) -> Arc<Ram> {
        self.arrived().ram()
    }

    fn memory_is_zero(&self) -> bool {
        true
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        let loaded = self.arrived.as_mut().map_or_else(fail, |arrived| arrived.load(state));
        if self.fault == Fault::TakesAnyState { Ok(()) } else { loaded }
    }

    fn arbiter(&self) -> Option<&dyn Arbiter> {
        self.locks.as_ref().map(|locks| locks as &dyn Arbiter)
    }

    fn run(&mut self) -> Result<(), Failure> {
        match &mut self.arrived {
            Some(arrived) if self.fault != Fault::StaysAsleep => arrived.run(),
            _ => Ok(()),
        }
    }
}

/// Machines and hosts with one fault. They share two disks, which the machine has.
struct Faults {
    fault: Fault,
    storage: Arc<Mutex<Storage>>,
}

impl MachineFixture for Faults {
    type Machine = Faulty;
    type Host = FaultyHost;

    fn machine(&self) -> Faulty {
        let locks = Locks { storage: Arc::clone(&self.storage), side: 1, fault: self.fault };
        locks.take().expect("new disks");
        Faulty::new(self.fault, Some(locks))
    }

    fn host(&self) -> FaultyHost {
        FaultyHost { locks: Arc::clone(&self.storage), fault: self.fault, seen_nonsense: false }
    }

    fn vmm_writes(&self, machine: &Faulty) -> Vec<Extent> {
        if self.fault == Fault::ForgetsTheVmm {
            machine.memory.write_unmarked(1, 5, 5);
        } else {
            machine.memory.write(1, 5, 5);
        }
        vec![Extent { region: 1, offset: 5 * PAGE_SIZE + 100, len: 8 }]
    }

    fn has_arbiter(&self) -> bool {
        true
    }
}

fn with(fault: Fault) -> Faults {
    Faults { fault, storage: Arc::default() }
}

mod what_is_right_passes {
    crate::machine_conformance_suite!(super::with(super::Fault::Nothing));
}

mod so_does_plain_memory {
    use super::*;

    struct Plain;

    impl MachineFixture for Plain {
        type Machine = Memory;
        type Host = MemoryHost;

        fn machine(&self) -> Memory {
            let memory = Memory::new(&LAYOUT);
            memory.resume().unwrap();
            memory
        }

        fn host(&self) -> MemoryHost {
            MemoryHost
        }
    }

    crate::machine_conformance_suite!(Plain);
}

/// Makes one test of each case: it fails for a machine with the fault that it is there to find.
macro_rules! finds {
    ($($side:ident::$case:ident: $($fault:ident)*;)*) => {
        mod each_case_finds_its_faults {
            use super::*;

            $(
                #[test]
                fn $case() {
                    for fault in [$(Fault::$fault),*] {
                        let case = || $side::$case(&with(fault));
                        let passed = panic::catch_unwind(AssertUnwindSafe(case)).is_ok();
                        assert!(!passed, "{fault:?} was not found");
                    }
                }
            )*
        }
    };
}

finds! {
    source::tracking_finds_every_write: FindsNoWrites MarksBeforeItWrites;
    source::tracking_begins_afresh_after_a_failure: ForgetsAfterAFailure;
    source::what_the_vmm_writes_is_tracked: ForgetsTheVmm;
    source::collecting_adds_to_a_set_and_takes_nothing_out: TakesPagesOut;
    source::tracking_may_be_stopped_in_vain: StopsOnlyWhatWasStarted;
    source::a_paused_machine_leaves_its_memory_alone: WritesWhilePaused;
    source::saving_may_be_repeated_and_leaves_memory_alone: WritesWhenSaved SavesOnce;
    source::a_machine_goes_on_whenever_it_is_resumed: ResumesOnce;
    source::resuming_a_running_machine_does_no_harm: ResumesOnlyWhatIsPaused;
    source::a_description_is_given_while_the_guest_runs: DescribesDifferently;
    destination::memory_is_laid_out_as_it_was_asked_for: WrongLayout;
    destination::a_layout_that_does_not_fit_is_refused: IgnoresTheLayout;
    destination::memory_that_is_said_to_be_zero_is_zero: LeavesSomething;
    destination::a_description_that_is_none_harms_nothing: PanicsAtNonsense RefusesAllAfterNonsense;
    destination::a_state_that_is_none_is_refused: TakesAnyState;
    destination::a_guest_goes_on_at_the_destination: RunsAtOnce StaysAsleep;
    destination::a_machine_that_is_dropped_leaves_memory_alone: OutlivesItsDrop;
    destination::a_source_goes_on_after_its_twin_was_dropped: BreaksItsTwin;
    destination::locks_are_where_they_are_said_to_be: HasNoLocks;
    destination::locks_that_were_given_up_can_be_taken_back: TakesNoLocksTwice;
    destination::locks_are_had_by_one_side: TakesBackWhatOthersHad;
    destination::locks_are_not_taken_behind_the_back_of_their_owner: TakesLocksOfOthers TakesSomeLocks;
}
