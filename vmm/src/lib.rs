//! The KVM machine of Whimbrel, built to be moved.
//!
//! [`Machine`] is a virtual machine whose RAM lives in memfds, whose writes are tracked, and whose
//! state can be saved and loaded; [`migrate`] makes it a machine that the `migration` engine moves.

pub mod cpuid;
pub mod devices;
mod dirty;
mod error;
pub mod host;
mod ioctl;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod serial;
pub mod state;
mod vcpu;

pub use error::Error;
pub use host::Host;
pub use loader::{Boot, Image};
pub use machine::{Crash, Machine, MachineConfig, Outcome};
pub use memory::PageSize;
pub use serial::SerialOutput;
