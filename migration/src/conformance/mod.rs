//! The suite that every transport passes: the contract of [`crate::transport`], as tests. The suite for
//! machines is in [`machine`].
//!
//! A transport's crate implements [`Fixture`] and has [`conformance_suite!`](crate::conformance_suite)
//! make a test of each [case](cases). The cases run both ends in one process, on RAM of their own, and
//! know nothing of the transport but the contract. A new transport must pass them unchanged.

pub mod bed;
pub mod cases;
pub mod machine;

pub use bed::Bed;

use crate::transport::{DestinationTransport, SourceTransport};

/// What a transport brings to be tested.
pub trait Fixture {
    /// A source that connects to what any [`destination`](Self::destination) of this fixture offers, with
    /// `lanes` lanes.
    fn source(&self, lanes: u16) -> Box<dyn SourceTransport>;

    /// A destination.
    fn destination(&self) -> Box<dyn DestinationTransport>;
}

/// Makes one test of each case. `$fixture` is an expression that gives an `impl Fixture`; attributes after
/// it and a semicolon, such as `#[ignore = "needs a device"]`, become those of the tests.
#[macro_export]
macro_rules! conformance_suite {
    (@case $fixture:expr, ($(#[$attribute:meta])*) $case:ident) => {
        #[test]
        $(#[$attribute])*
        fn $case() {
            $crate::conformance::cases::$case(&$fixture);
        }
    };
    (@cases $fixture:expr, $attributes:tt $($case:ident)*) => {
        $($crate::conformance_suite! { @case $fixture, $attributes $case })*
    };
    ($fixture:expr $(; $(#[$attribute:meta])*)?) => {
        $crate::conformance_suite! { @cases $fixture, ($($(#[$attribute])*)?)
            content_arrives_and_nothing_else_changes
            extents_outside_memory_are_refused_and_harm_nothing
            zeros_are_named_and_make_nothing_exist
            memory_may_change_while_it_travels
            the_last_write_to_a_page_wins
            a_barrier_means_placed
            rounds_of_random_extents_end_in_equal_memory
            nothing_lands_after_the_fence
            nobody_joins_after_the_fence
            a_wrong_token_is_refused
            a_wrong_secret_is_refused
            sessions_are_apart
            silence_is_noticed
            an_interrupt_ends_every_wait
            a_destination_that_goes_away_is_noticed
            a_source_that_goes_away_leaves_the_destination_fenceable
            nonsense_offers_are_refused
            lanes_count_what_they_carry
            lanes_may_be_wrapped
        }
    };
}
