//! What a [`SourceMachine`] has to do. Each case panics with what is wrong.

use super::copy::{content, copy, differences};
use super::{GUEST_WRITES_WITHIN, MachineFixture};
use crate::dirty::DirtySet;
use crate::machine::SourceMachine;
use crate::memory::{PAGE_SIZE, Ram};
use crate::message::{MAX_DESCRIPTION, MAX_STATE};
use std::thread;
use std::time::{Duration, Instant};

/// Rounds of a copy: enough for writes to meet every step of one.
const ROUNDS: usize = 40;

/// How long memory that must not change is watched.
pub(super) const WATCHED: Duration = Duration::from_millis(200);

/// Memory of a machine's layout, all zero.
pub(super) fn empty_copy(machine: &impl SourceMachine) -> Ram {
    Ram::allocate(&machine.ram().layout()).expect("memory for the test")
}

/// Waits until the guest has written something.
pub(super) fn assert_guest_writes(ram: &Ram, when: &str) {
    let before = content(ram);
    let began = Instant::now();
    while content(ram) == before {
        assert!(began.elapsed() < GUEST_WRITES_WITHIN, "the guest writes nothing {when}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub(super) fn assert_memory_stands_still(ram: &Ram, when: &str) {
    let before = content(ram);
    thread::sleep(WATCHED);
    assert!(content(ram) == before, "memory changes {when}");
}

/// A copy that is made in rounds, of which each takes over what was written since the one before, ends up the
/// same as the memory of the paused machine. Whatever tracking misses, differs.
pub fn tracking_finds_every_write<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let twin = empty_copy(&machine);
    let found = copy(&machine, &twin, ROUNDS);
    assert!(found.iter().any(|pages| *pages > 0), "no round has found a page that was written");
    assert_eq!(
        differences(&machine.ram(), &twin),
        [],
        "(region, page) was written, and tracking has missed it"
    );
}

/// A failed attempt leaves nothing behind that the next one would miss.
pub fn tracking_begins_afresh_after_a_failure<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let _ = copy(&machine, &empty_copy(&machine), 3);
    machine.resume().expect("the machine goes on after a failed attempt");
    machine.stop_tracking().expect("tracking ends after a failed attempt");
    assert_guest_writes(&machine.ram(), "after a failed attempt");
    let twin = empty_copy(&machine);
    let found = copy(&machine, &twin, ROUNDS);
    assert!(found.iter().any(|pages| *pages > 0), "the second attempt finds no page that was written");
    assert_eq!(differences(&machine.ram(), &twin), [], "(region, page) was missed by the second attempt");
}

/// Devices write to memory as well as the guest does.
pub fn what_the_vmm_writes_is_tracked<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    machine.start_tracking().expect("tracking starts");
    let ram = machine.ram();
    for attempt in 0..3 {
        // Everything is clean, as after a round.
        let mut set = DirtySet::empty(&ram);
        machine.collect_dirty(&mut set).expect("dirty pages");
        for region in 0..set.regions() {
            machine.clear_dirty(region, 0, set.words(region)).expect("pages marked clean");
        }
        let written = fixture.vmm_writes(&machine);
        set.clear();
        machine.collect_dirty(&mut set).expect("dirty pages");
        for extent in written {
            let pages = extent.offset / PAGE_SIZE..(extent.offset + extent.len).div_ceil(PAGE_SIZE);
            for page in pages {
                let word = set.words(extent.region as usize)[(page / 64) as usize];
                assert!(
                    word & (1 << (page % 64)) != 0,
                    "the VMM has written page {page} of region {} in attempt {attempt}, and tracking has missed it",
                    extent.region
                );
            }
        }
    }
}

/// The engine collects into a set that it goes on with.
pub fn collecting_adds_to_a_set_and_takes_nothing_out<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    machine.start_tracking().expect("tracking starts");
    let mut all = DirtySet::empty(&machine.ram());
    all.fill();
    let mut set = all.clone();
    machine.collect_dirty(&mut set).expect("dirty pages");
    assert!(set == all, "collecting has taken pages out of the set, or has added some that do not exist");
    let mut set = DirtySet::empty(&machine.ram());
    machine.collect_dirty(&mut set).expect("dirty pages");
    let mut trimmed = set.clone();
    trimmed.trim();
    assert!(set == trimmed, "pages beyond the end of a region are marked");
}

/// After a failure nobody knows how far tracking had come.
pub fn tracking_may_be_stopped_in_vain<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    machine.stop_tracking().expect("tracking that was never started can be stopped");
    machine.start_tracking().expect("tracking starts");
    machine.stop_tracking().expect("tracking stops");
    machine.stop_tracking().expect("tracking can be stopped twice");
    machine.start_tracking().expect("tracking starts again");
}

/// What is read after the pause is what the guest has at the destination.
pub fn a_paused_machine_leaves_its_memory_alone<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    assert_guest_writes(&machine.ram(), "before it is paused");
    machine.pause().expect("the machine pauses");
    assert_memory_stands_still(&machine.ram(), "after the pause");
}

/// All memory has been sent when the state is saved: saving must not write to it.
pub fn saving_may_be_repeated_and_leaves_memory_alone<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    machine.before_pause();
    machine.pause().expect("the machine pauses");
    let before = content(&machine.ram());
    for _ in 0..2 {
        let state = machine.save().expect("a paused machine can be saved, and more than once");
        assert!(state.len() <= MAX_STATE, "a state of {} bytes is too long", state.len());
    }
    assert!(content(&machine.ram()) == before, "saving has changed memory");
    machine.resume().expect("a saved machine can go on");
    assert_guest_writes(&machine.ram(), "after it was saved and resumed");
}

/// A failure at any time before the hand-over lets the guest go on.
pub fn a_machine_goes_on_whenever_it_is_resumed<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    for attempt in 1..=3 {
        machine.pause().expect("the machine pauses");
        machine.resume().expect("a paused machine can go on");
        assert_guest_writes(&machine.ram(), &format!("after pause {attempt}"));
    }
}

/// A resume also follows a pause that has failed, and may have paused nothing.
pub fn resuming_a_running_machine_does_no_harm<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    machine.resume().expect("a machine that runs can be resumed");
    assert_guest_writes(&machine.ram(), "after it was resumed in vain");
    machine.pause().expect("the machine pauses");
    assert_memory_stands_still(&machine.ram(), "after a resume in vain and a pause");
}

/// The first thing that the engine asks for.
pub fn a_description_is_given_while_the_guest_runs<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let description = machine.describe().expect("a description");
    assert!(description.len() <= MAX_DESCRIPTION, "a description of {} bytes is too long", description.len());
    assert_eq!(machine.describe().expect("another description"), description, "descriptions differ");
    assert_guest_writes(&machine.ram(), "after it was described");
}
