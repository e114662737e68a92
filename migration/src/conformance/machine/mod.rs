//! The suite that every machine passes: the contract of [`crate::machine`], as tests.
//!
//! A VMM implements [`MachineFixture`]. The macro
//! [`machine_conformance_suite!`](crate::machine_conformance_suite) makes a test of each case: those in
//! [`source`] are for the machine that is moved away, those in [`destination`] for the host and the machine
//! that it builds. The cases need no transport. They call the traits in the order in which the engine does,
//! and copy memory in between.
//!
//! The guest must write to memory all the time; nothing more is asked of it. Its memory should be small:
//! 16 MiB are plenty, because most cases read all of it several times.

mod copy;
pub mod destination;
#[cfg(test)]
mod memory;
pub mod source;
#[cfg(test)]
mod tests;

use crate::machine::{DestinationHost, SourceMachine};
use crate::memory::Extent;
use std::time::Duration;

/// Within this a running guest is expected to write to memory.
pub const GUEST_WRITES_WITHIN: Duration = Duration::from_secs(10);

/// What a VMM brings to be tested.
pub trait MachineFixture {
    /// A machine that can be moved away. Dropping it ends the guest.
    type Machine: SourceMachine;
    /// What builds machines for guests that arrive.
    type Host: DestinationHost;

    /// A new machine whose guest runs. The guest writes something new to memory again and again, for as long
    /// as it runs, and not to one page only.
    fn machine(&self) -> Self::Machine;

    /// A host, for any number of machines.
    fn host(&self) -> Self::Host;

    /// Has the VMM itself write to the memory of a machine, as its devices do, and returns where it has
    /// written. By default it never does.
    fn vmm_writes(&self, machine: &Self::Machine) -> Vec<Extent> {
        let _ = machine;
        Vec::new()
    }

    /// Whether machines, at both sides, have an [`Arbiter`](crate::machine::Arbiter) that decides. If
    /// so, the machine and what the hosts build must need the same locks. By default there is none.
    fn has_arbiter(&self) -> bool {
        false
    }
}

/// Makes one test of each case. `$fixture` is an expression that gives an `impl MachineFixture`; attributes
/// after it and a semicolon, such as `#[ignore = "needs /dev/kvm"]`, become those of the tests.
#[macro_export]
macro_rules! machine_conformance_suite {
    (@case $fixture:expr, ($(#[$attribute:meta])*) $side:ident $case:ident) => {
        #[test]
        $(#[$attribute])*
        fn $case() {
            $crate::conformance::machine::$side::$case(&$fixture);
        }
    };
    (@cases $fixture:expr, $attributes:tt $($side:ident: $($case:ident)*;)*) => {
        $($($crate::machine_conformance_suite! { @case $fixture, $attributes $side $case })*)*
    };
    ($fixture:expr $(; $(#[$attribute:meta])*)?) => {
        $crate::machine_conformance_suite! { @cases $fixture, ($($(#[$attribute])*)?)
            source:
                tracking_finds_every_write
                tracking_begins_afresh_after_a_failure
                what_the_vmm_writes_is_tracked
                collecting_adds_to_a_set_and_takes_nothing_out
                tracking_may_be_stopped_in_vain
                a_paused_machine_leaves_its_memory_alone
                saving_may_be_repeated_and_leaves_memory_alone
                a_machine_goes_on_whenever_it_is_resumed
                resuming_a_running_machine_does_no_harm
                a_description_is_given_while_the_guest_runs;
            destination:
                memory_is_laid_out_as_it_was_asked_for
                a_layout_that_does_not_fit_is_refused
                memory_that_is_said_to_be_zero_is_zero
                a_description_that_is_none_harms_nothing
                a_state_that_is_none_is_refused
                a_guest_goes_on_at_the_destination
                a_machine_that_is_dropped_leaves_memory_alone
                a_source_goes_on_after_its_twin_was_dropped
                locks_are_where_they_are_said_to_be
                locks_that_were_given_up_can_be_taken_back
                locks_are_had_by_one_side
                locks_are_not_taken_behind_the_back_of_their_owner;
        }
    };
}
