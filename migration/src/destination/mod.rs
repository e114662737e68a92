//! The destination's side of a migration.

mod arrival;
mod drive;
mod migration;
mod monitor;
mod state;

pub use arrival::Arrival;
pub use migration::{Migration, Timeouts};
pub use monitor::{Monitor, Phase, Progress};
#[cfg(test)]
pub(crate) use state::Sabotage;
#[cfg(any(test, feature = "internals"))]
pub use state::{Command, Event, Outcome, State, Waiting};
