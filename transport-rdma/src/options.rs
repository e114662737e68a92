//! The options of the transport.

use crate::chunks::DEFAULT_CHUNK;
use crate::completions::Waiting;

/// Lanes that a source opens by default.
pub const DEFAULT_LANES: u16 = 2;

/// Work requests that a lane may have in flight by default.
pub const DEFAULT_DEPTH: u32 = 256;

/// The options of one side. Both sides may choose differently.
///
/// ```
/// use whimbrel_transport_rdma::{Options, Waiting};
///
/// let options = Options::default().with_lanes(4).with_waiting(Waiting::BusyPoll);
/// # assert_eq!(options.lanes, 4);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Queue pairs for writing, at most [`MAX_LANES`](migration::transport::MAX_LANES). 0 for
    /// [`DEFAULT_LANES`]. The source's choice counts.
    pub lanes: u16,
    /// Work requests that a lane may have in flight, at most what its queue holds: [`DEFAULT_DEPTH`], or the
    /// device's limit if that is less. 0 for as many as the queue holds. The source's choice counts.
    pub depth: u32,
    /// How lanes wait for the device.
    pub waiting: Waiting,
    /// Bytes of memory that are registered at a time, rounded up to a power of two, to whole pages of the
    /// memory, and to [`MIN_CHUNK`](crate::MIN_CHUNK). The larger of both sides' choices counts.
    pub chunk: u64,
    /// Whether to leave memory unpinned where the device offers on-demand paging.
    pub on_demand: bool,
}

impl Options {
    /// The same with another number of [`lanes`](Self::lanes).
    pub fn with_lanes(self, lanes: u16) -> Self {
        Options { lanes, ..self }
    }

    /// The same with another [`depth`](Self::depth).
    pub fn with_depth(self, depth: u32) -> Self {
        Options { depth, ..self }
    }

    /// The same with another way of [`waiting`](Self::waiting).
    pub fn with_waiting(self, waiting: Waiting) -> Self {
        Options { waiting, ..self }
    }

    /// The same with another size of a [`chunk`](Self::chunk), in bytes.
    pub fn with_chunk(self, chunk: u64) -> Self {
        Options { chunk, ..self }
    }

    /// The same with or without [on-demand paging](Self::on_demand).
    pub fn with_on_demand(self, on_demand: bool) -> Self {
        Options { on_demand, ..self }
    }
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
