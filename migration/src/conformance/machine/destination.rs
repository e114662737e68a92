//! What a [`DestinationHost`] and its [`DestinationMachine`] have to do. Each case panics with what is wrong.

use super::MachineFixture;
use super::copy::{content, copy, copy_all};
use super::source::{assert_guest_writes, assert_memory_stands_still};
use crate::Failure;
use crate::machine::{Arbiter, DestinationHost, DestinationMachine, SourceMachine};
use crate::memory::{PAGE_SIZE, RegionLayout};

/// What a host builds for a machine.
fn shadow<H: DestinationHost>(host: &mut H, machine: &impl SourceMachine) -> H::Machine {
    let description = machine.describe().expect("a description");
    host.build(&description, &machine.ram().layout()).expect("the host builds a machine of its own kind")
}

/// The same with memory copied, and the state that goes with it. The source is paused.
fn copied<H: DestinationHost>(host: &mut H, machine: &impl SourceMachine) -> (H::Machine, Vec<u8>) {
    let shadow = shadow(host, machine);
    copy(machine, &shadow.ram(), 3);
    (shadow, machine.save().expect("the paused machine is saved"))
}

/// An extent names the same bytes at both ends.
pub fn memory_is_laid_out_as_it_was_asked_for<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let shadow = shadow(&mut host, &machine);
    assert_eq!(shadow.ram().layout(), machine.ram().layout());
}

/// A host that knows from the description what memory there is says so; one that does not builds what it is
/// asked for.
pub fn a_layout_that_does_not_fit_is_refused<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let description = machine.describe().expect("a description");
    let layout = machine.ram().layout();
    let last = layout[layout.len() - 1];
    let end = last.guest_address + last.len;
    let mut longer = layout.clone();
    longer[layout.len() - 1].len += PAGE_SIZE;
    let mut shorter = layout.clone();
    shorter[layout.len() - 1].len -= PAGE_SIZE;
    let mut moved = layout.clone();
    moved[layout.len() - 1].guest_address += 1 << 30;
    let more = [&layout[..], &[RegionLayout { guest_address: end + (1 << 30), len: PAGE_SIZE }]].concat();
    for other in [longer, shorter, moved, more] {
        if let Ok(shadow) = host.build(&description, &other) {
            assert_eq!(shadow.ram().layout(), other, "another memory was built than was asked for");
        }
    }
    let _ = self::shadow(&mut host, &machine);
}

/// The source does not send pages of zeros: whatever is there instead would stay.
pub fn memory_that_is_said_to_be_zero_is_zero<F: MachineFixture>(fixture: &F) {
    let mut host = fixture.host();
    let shadow = shadow(&mut host, &fixture.machine());
    if shadow.memory_is_zero() {
        let zero = content(&shadow.ram()).iter().flatten().all(|byte| *byte == 0);
        assert!(zero, "memory is not zero after `build`, and `memory_is_zero` says that it is");
    }
}

/// Descriptions come from a peer. One that makes no sense is an error, or a machine, and never a panic.
pub fn a_description_that_is_none_harms_nothing<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let layout = machine.ram().layout();
    for bytes in mutilated(&machine.describe().expect("a description")) {
        // Whatever comes of it has to be gone again.
        let _: Result<_, Failure> = host.build(&bytes, &layout);
    }
    let _ = shadow(&mut host, &machine);
}

/// States come from a peer as well.
pub fn a_state_that_is_none_is_refused<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    machine.pause().expect("the machine pauses");
    let state = machine.save().expect("the paused machine is saved");
    let cut = (0..state.len()).step_by(1 + state.len() / 16).map(|end| state[..end].to_vec());
    let longer = [&state[..], &[1]].concat();
    let noise = mutilated(&state).pop().into_iter();
    for bytes in cut.chain([longer]).chain(noise) {
        let loaded = shadow(&mut host, &machine).load(&bytes);
        assert!(loaded.is_err(), "{} bytes that are no state were loaded", bytes.len());
    }
    // Changed bytes may make sense.
    for bytes in mutilated(&state) {
        let _: Result<(), Failure> = shadow(&mut host, &machine).load(&bytes);
    }
    let mut shadow = shadow(&mut host, &machine);
    copy_all(&machine.ram(), &shadow.ram());
    shadow.load(&state).expect("the host takes an honest guest in after all of these");
}

/// Bytes cut off, and bytes changed; the last is noise of the same length, or of some length.
fn mutilated(honest: &[u8]) -> Vec<Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(21);
    let step = 1 + honest.len() / 16;
    let mut all: Vec<Vec<u8>> = (0..honest.len()).step_by(step).map(|end| honest[..end].to_vec()).collect();
    for at in (0..honest.len()).step_by(step) {
        let mut changed = honest.to_vec();
        changed[at] ^= random.u8(1..);
        all.push(changed);
    }
    let len = honest.len().max(64);
    all.push(std::iter::repeat_with(|| random.u8(..)).take(len).collect());
    all
}

/// What the whole is for.
pub fn a_guest_goes_on_at_the_destination<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let (mut shadow, state) = copied(&mut host, &machine);
    assert_memory_stands_still(&shadow.ram(), "before a state was loaded");
    shadow.load(&state).expect("what was saved can be loaded");
    assert_memory_stands_still(&shadow.ram(), "before the guest was run");
    hand_over(&machine, &shadow);
    shadow.run().expect("the guest runs");
    shadow.announce();
    assert_guest_writes(&shadow.ram(), "at the destination");
    let _ = shadow.after_run();
    assert_memory_stands_still(&machine.ram(), "at the source, after the guest has moved");
    drop(machine);
    assert_guest_writes(&shadow.ram(), "at the destination, after the source was dropped");
}

/// Gives the locks of one side, if there are any, to the other.
fn hand_over(machine: &impl SourceMachine, shadow: &impl DestinationMachine) {
    if let Some(arbiter) = machine.arbiter() {
        arbiter.release().expect("locks given up");
    }
    if let Some(arbiter) = shadow.arbiter() {
        arbiter.take().expect("locks taken");
    }
}

/// The source runs its guest on the word that the shadow machine is gone, whatever it had done before.
pub fn a_machine_that_is_dropped_leaves_memory_alone<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let (mut shadow, state) = copied(&mut host, &machine);
    let ram = shadow.ram();
    shadow.load(&state).expect("what was saved can be loaded");
    hand_over(&machine, &shadow);
    shadow.run().expect("the guest runs");
    assert_guest_writes(&ram, "at the destination");
    drop(shadow);
    assert_memory_stands_still(&ram, "after the machine was dropped");
}

/// A destination that fails has cost the guest nothing but time.
pub fn a_source_goes_on_after_its_twin_was_dropped<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let (mut shadow, state) = copied(&mut host, &machine);
    shadow.load(&state).expect("what was saved can be loaded");
    drop(shadow);
    machine.resume().expect("the source goes on");
    machine.stop_tracking().expect("tracking ends");
    assert_guest_writes(&machine.ram(), "at the source, after the destination has failed");
    let (mut shadow, state) = copied(&mut host, &machine);
    shadow.load(&state).expect("the next attempt goes well");
}

/// An arbiter that can tell who owns the guest.
fn deciding(arbiter: Option<&dyn Arbiter>) -> Option<&dyn Arbiter> {
    arbiter.filter(|arbiter| arbiter.decides())
}

/// Both sides have locks that decide, or none has.
pub fn locks_are_where_they_are_said_to_be<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let shadow = shadow(&mut host, &machine);
    let (ours, theirs) = (deciding(machine.arbiter()).is_some(), deciding(shadow.arbiter()).is_some());
    assert_eq!(ours, fixture.has_arbiter(), "whether the source has an arbiter that decides");
    assert_eq!(theirs, fixture.has_arbiter(), "whether the destination has an arbiter that decides");
}

/// After a hand-over that has failed, and in vain.
pub fn locks_that_were_given_up_can_be_taken_back<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    machine.pause().expect("the machine pauses");
    let Some(arbiter) = machine.arbiter() else { return };
    arbiter.take().expect("locks that are had can be taken");
    for _ in 0..2 {
        arbiter.release().expect("locks given up");
        arbiter.take().expect("locks that nobody has taken can be taken back");
        arbiter.take().expect("locks that are had can be taken");
    }
}

/// Whoever has the locks may run the guest, so only one side may have them; and who gave them up can tell
/// that somebody has had them.
pub fn locks_are_had_by_one_side<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let (shadow, _) = copied(&mut host, &machine);
    let both = deciding(machine.arbiter()).zip(deciding(shadow.arbiter()));
    let Some((ours, theirs)) = both else { return };
    ours.release().expect("locks given up");
    theirs.take().expect("locks that were given up can be taken");
    assert!(ours.take().is_err(), "both sides have the locks");
    drop(shadow);
    assert!(ours.take().is_err(), "locks that the other side has had since can be taken back");
}

/// A taking that fails takes nothing: the owner goes on, and can still give up all that it has.
pub fn locks_are_not_taken_behind_the_back_of_their_owner<F: MachineFixture>(fixture: &F) {
    let machine = fixture.machine();
    let mut host = fixture.host();
    let (shadow, _) = copied(&mut host, &machine);
    let both = deciding(machine.arbiter()).zip(deciding(shadow.arbiter()));
    let Some((ours, theirs)) = both else { return };
    assert!(theirs.take().is_err(), "the destination takes locks that the source has");
    ours.take().expect("the owner still has all locks");
    ours.release().expect("locks given up");
    ours.take().expect("a taking that has failed counts for nothing");
    ours.release().expect("locks given up");
    theirs.take().expect("the locks can be taken now");
}
