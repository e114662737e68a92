//! The source's side of a migration.

mod state;

#[cfg(test)]
pub(crate) use state::Sabotage;
pub use state::{Command, Event, Outcome, State, Waiting};
