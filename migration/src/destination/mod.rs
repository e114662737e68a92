//! The destination's side of a migration.

mod drive;
mod state;

pub use drive::{Arrival, Timeouts, receive};
#[cfg(test)]
pub(crate) use state::Sabotage;
pub use state::{Command, Event, Outcome, State, Waiting};
