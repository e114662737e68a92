//! What can go wrong with a machine.

use crate::boot_disk;
use crate::component;
use crate::ioctl::KvmError;
use crate::machine::KeepError;
use crate::vcpu::outcome::Outcome;
use crate::{cpuid, loader, memory, serial, virtio};
use migration::{Code, Failure};
use std::io;

/// Why a machine could not be built, run, saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm cannot be used.
    #[error("cannot use /dev/kvm: {source}; load the kvm_intel or kvm_amd module and check permissions")]
    NoKvm {
        /// What opening it said.
        source: io::Error,
    },
    /// The host kernel's KVM lacks something without which no machine can run here.
    #[error("this host's KVM lacks {what}; a newer kernel is needed")]
    Capability {
        /// The missing capability.
        what: &'static str,
    },
    /// A number of vCPUs that no machine can have here.
    #[error("{wanted} vCPUs: use 1 to {most} on this host")]
    VcpuCount {
        /// What was asked for.
        wanted: u32,
        /// Most this host can do.
        most: u32,
    },
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel image or what goes with it.
    #[error(transparent)]
    Loader(#[from] loader::Error),
    /// Saved state that cannot be used.
    #[error(transparent)]
    State(#[from] component::Error),
    /// A CPU that cannot stand in for the one the guest was promised.
    #[error(transparent)]
    Cpu(#[from] cpuid::Incompatible),
    /// KVM refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The serial port's output.
    #[error(transparent)]
    Serial(#[from] serial::OpenError),
    /// A console's output or input.
    #[error("cannot use {path} for the console: {source}")]
    Console {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] virtio::block::Error),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] virtio::net::Error),
    /// More devices than the PCI bus has places for.
    #[error("{wanted} devices: use at most {most}")]
    DeviceCount {
        /// What was asked for.
        wanted: usize,
        /// Most there can be.
        most: usize,
    },
    /// An arriving guest that exceeds what this host's operator allows.
    #[error("the guest exceeds what the destination's operator allows: {exceeded}")]
    Limits {
        /// What exceeds which limit.
        exceeded: String,
    },
    /// What a machine boots from when it is reset.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The disk that a machine boots from.
    #[error(transparent)]
    BootDisk(#[from] boot_disk::Error),
    /// There is no disk to boot from.
    #[error("it has no disk to boot from")]
    NoBootDisk,
    /// A device could not be reset.
    #[error("a device cannot be reset: {0}")]
    Reset(String),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The guest ended by itself.
    #[error("the guest has ended: {0}")]
    Ended(Outcome),
    /// The machine runs, and this needs it to be paused.
    #[error("the machine is running; pause it first")]
    NotPaused,
    /// The machine's memory must not change, as it is being moved.
    #[error("the guest's memory is being moved and must not be written to")]
    MemoryIsMoving,
    /// The machine was stopped for good.
    #[error("the machine has been stopped")]
    Stopped,
}

impl Error {
    /// What kind of failure this is for the other side of a migration.
    pub fn code(&self) -> Code {
        match self {
            Error::NoKvm { .. } | Error::Capability { .. } | Error::Thread(_) => Code::HOST,
            Error::VcpuCount { .. } | Error::Cpu(_) => Code::CPU,
            Error::Memory(_) => Code::MEMORY,
            Error::Loader(_)
            | Error::Keep(_)
            | Error::BootDisk(_)
            | Error::NoBootDisk
            | Error::Reset(_)
            | Error::NotPaused
            | Error::MemoryIsMoving => Code::OTHER,
            Error::State(_) | Error::Kvm(_) => Code::STATE,
            Error::Disk(
                virtio::block::Error::Held { .. }
                | virtio::block::Error::UsedElsewhere { .. }
                | virtio::block::Error::Mark { .. }
                | virtio::block::Error::Lock { .. }
                | virtio::block::Error::Flush { .. },
            ) => Code::DISKS,
            Error::Disk(_)
            | Error::Net(_)
            | Error::Serial(_)
            | Error::Console { .. }
            | Error::DeviceCount { .. } => Code::DEVICE,
            Error::Limits { .. } => Code::LIMITS,
            Error::Ended(_) | Error::Stopped => Code::GUEST_ENDED,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(error.code(), error)
    }
}
