//! virtio-console: one port, without the control queues that several would need.
//!
//! Output goes to the same kinds of places as the serial port's, by the same rules: a reader that stays away
//! for long loses bytes, and delays nobody. Input is read only into buffers that the guest has made
//! available, so that none is ever left here when the guest moves.

mod device;
mod state;
#[cfg(test)]
mod tests;

pub use device::Console;

use crate::serial::SerialOutput;
use std::path::PathBuf;

/// Where a console's bytes go and come from, on this host.
#[derive(Clone, Debug)]
pub struct ConsoleConfig {
    /// Where output goes.
    pub output: SerialOutput,
    /// A file, pipe or terminal that is read for input.
    pub input: Option<PathBuf>,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        ConsoleConfig { output: SerialOutput::Null, input: None }
    }
}
