//! The source's side of a migration.

mod drive;
mod path;
mod precopy;
mod round;
mod state;

pub use drive::{Options, Timeouts, migrate};
#[cfg(test)]
pub(crate) use state::Sabotage;
pub use state::{Command, Event, Outcome, State, Waiting};
