//! The source's side of a migration.

mod drive;
mod migration;
mod path;
mod precopy;
mod round;
mod state;

pub use migration::{Migration, Timeouts};
#[cfg(test)]
pub(crate) use state::Sabotage;
#[cfg(any(test, feature = "internals"))]
pub use state::{Command, Event, Outcome, State, Waiting};
