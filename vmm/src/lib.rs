//! The KVM machine of Whimbrel, built to be moved.
//!
//! [`Machine`] is a virtual machine whose RAM lives in memfds, whose writes are tracked, and whose
//! state can be saved and loaded. It is itself what the `migration` engine moves away, and
//! [`incoming`] builds what the engine moves in.

pub mod acpi;
pub mod admission;
mod awake;
pub mod boot_disk;
pub mod component;
pub mod cpuid;
mod description;
pub mod devices;
mod dirty;
mod ended;
mod error;
mod fatal;
pub mod guest;
pub mod host;
pub mod incoming;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod ioctl;
pub mod limits;
pub mod loader;
mod lock;
pub mod machine;
pub mod memory;
pub mod names;
mod outgoing;
pub mod pci;
mod poll;
pub mod power;
mod retry;
pub mod sandbox;
pub mod serial;
pub mod state;
mod vcpu;
pub mod virtio;

pub use error::Error;
pub use host::Host;
pub use ioctl::KvmError;
pub use loader::{Boot, Image};
pub use machine::{Machine, MachineConfig, Reboot};
pub use memory::PageSize;
pub use serial::SerialOutput;
pub use vcpu::outcome::{Crash, Outcome};
