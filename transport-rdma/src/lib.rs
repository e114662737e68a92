//! Migration over RDMA: a data plane of N reliable queue pairs.
//!
//! The source writes straight from the guest's RAM into the destination's shadow RAM, by one-sided writes of
//! the network card: no processor copies a byte on either side, and the destination does nothing per page. The
//! control link stays on TCP; see `transport-tcp`.
//!
//! - Connections are made by rdma_cm and bound to the session by its token (`hello`).
//! - Memory is registered chunk by chunk while earlier chunks are already being written (`source::registry`).
//! - Lanes write, name zeros and post barriers (`source::lane`, `destination::lane`).
//! - The fence takes the queue pairs out of service (`destination`).
//!
//! Nothing is linked against RDMA libraries: they are looked for when a plane is first asked for (`api`), and
//! everything that is missing is a [`PlaneError::Unavailable`](migration::transport::PlaneError::Unavailable)
//! that says what to do, so that the engine can take TCP instead. `docs/rdma.md` has the whole picture.

mod api;
mod buffers;
mod chunks;
mod cm;
mod completions;
mod destination;
mod device;
mod domain;
mod halt;
mod hello;
mod limits;
mod message;
mod offer;
mod options;
mod pages;
pub mod probe;
mod queue;
mod receives;
mod source;
mod unavailable;
mod warm;

pub use chunks::{DEFAULT_CHUNK, MIN_CHUNK};
pub use completions::Waiting;
pub use destination::RdmaDestination;
pub use limits::locked_memory;
pub use options::{DEFAULT_DEPTH, DEFAULT_LANES, Options};
pub use source::RdmaSource;
#[cfg(feature = "null-device")]
pub use source::null;
pub use warm::warm_up;

/// The name of this transport in offers and reports.
pub const NAME: &str = "rdma";
