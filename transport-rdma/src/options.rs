//! What can be chosen.

use crate::chunks::DEFAULT_CHUNK;
use crate::completions::Waiting;

/// Lanes that a source opens by default.
pub const DEFAULT_LANES: u16 = 2;

/// Work requests that a lane may have under way by default.
pub const DEFAULT_DEPTH: u32 = 256;

/// Choices of one side. Both sides may choose differently.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queue pairs for writing; the source's choice. 0 for [`DEFAULT_LANES`].
    pub lanes: u16,
    /// Work requests that a lane may have under way, at most what its queue holds ([`DEFAULT_DEPTH`], or the
    /// device's limit); the source's choice. 0 for that.
    pub depth: u32,
    /// How lanes wait for the device.
    pub waiting: Waiting,
    /// Bytes of memory that are registered at a time; rounded up to a power of two and to whole pages of the
    /// memory. The larger of both sides' is used.
    pub chunk: u64,
    /// Do not pin memory where the device can do without.
    pub on_demand: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            lanes: DEFAULT_LANES,
            depth: 0,
            waiting: Waiting::default(),
            chunk: DEFAULT_CHUNK,
            on_demand: true,
        }
    }
}
