//! Moving a running virtual machine: protocol, policy and both state machines.
//!
//! This crate knows no KVM, no socket and no verbs. A VMM brings a [`machine::SourceMachine`] or a
//! [`machine::DestinationHost`], a transport crate brings a [`transport::SourcePlane`] and a
//! [`transport::DestinationPlane`], and the engine here moves the one over the other.
//!
//! # Features
//!
//! - `conformance`: the suites that transports and machines are tested with.
//! - `internals`: the messages, the preamble and both state machines, for the transports, tests and tools
//!   that are released together with this crate. What it shows may change in any release.

pub mod bounded;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod coverage;
pub mod cpu;
pub mod destination;
mod digest;
pub mod dirty;
pub mod failure;
mod judge;
pub mod link;
pub mod machine;
pub mod memory;
#[cfg(not(feature = "internals"))]
mod message;
#[cfg(feature = "internals")]
pub mod message;
pub mod monitor;
mod pacer;
pub mod policy;
#[cfg(any(test, feature = "internals"))]
pub mod preamble;
mod priority;
pub mod report;
pub mod scan;
pub mod source;
pub mod transport;
mod unwind;

#[cfg(test)]
mod model;
#[cfg(test)]
mod simulation;

pub use digest::SAVE_TO;
pub use failure::{Code, Failure};
