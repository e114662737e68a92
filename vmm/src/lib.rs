//! The KVM machine of Whimbrel, built to be moved.
//!
//! [`Machine`] is a virtual machine whose RAM lives in memfds, whose writes are tracked, and whose
//! state can be saved and loaded. It is itself what the `migration` engine moves away, and
//! [`incoming`] builds what the engine moves in.

pub mod acpi;
pub mod announce;
pub mod boot_disk;
pub mod cpuid;
mod description;
pub mod devices;
mod dirty;
mod error;
pub mod guest;
pub mod host;
pub mod incoming;
mod ioctl;
pub mod loader;
pub mod machine;
pub mod memory;
mod outgoing;
pub mod pci;
mod poll;
pub mod power;
pub mod sandbox;
pub mod serial;
pub mod state;
mod vcpu;
pub mod virtio;

pub use error::Error;
pub use host::Host;
pub use loader::{Boot, Image};
pub use machine::{Crash, Machine, MachineConfig, Outcome};
pub use memory::PageSize;
pub use serial::SerialOutput;
