#![doc = include_str!("../README.md")]
//!
//! ## Where things are
//!
//! - Connections are made by rdma_cm and bound to the session by its token (`cm`, `hello`, `source::connect`,
//!   `destination::accept`).
//! - Memory is registered chunk by chunk (`chunks`, `source::registry`, `destination::register`).
//! - Lanes write, name zeros and post barriers (`source::lane`, `destination::lane`). What is in flight is
//!   counted by `source::window` and `source::credits`.
//! - The fence takes the queue pairs out of service (`destination`).
//! - RDMA libraries are looked for when a plane is first asked for (`api`). Everything that is missing is a
//!   [`PlaneError::Unavailable`](migration::transport::PlaneError::Unavailable).

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
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
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
mod zeroed;

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
