//! Virtio devices on the PCI bus.
//!
//! Each device is a folder with the same files: `mod.rs` says what it is and how it is configured,
//! `device.rs` is the [`VirtioDevice`], `state.rs` its saved form. All else is common to all of
//! them:
//!
//! | file | what |
//! |---|---|
//! | `transport.rs` | the PCI function: registers, feature negotiation, reset, saving |
//! | `registers.rs` | what the driver wrote to the transport, and its place in the BAR |
//! | `common_config.rs` | the registers of the common configuration, by name |
//! | `structure.rs` | structures of the specification, by their fields |
//! | `queue.rs` | a queue |
//! | `service.rs` | when its thread serves it; pausing and resuming |
//! | `interrupt.rs` | telling the driver |
//!
//! A device only says what it offers and serves queues. It writes guest RAM through `vm_memory`
//! alone, whose bitmap tells the dirty log (what it hands to the kernel as an address, it marks
//! itself); `tests.rs` in each folder proves that it does.

pub mod block;
mod common_config;
pub mod console;
pub mod interrupt;
pub mod net;
pub mod queue;
mod registers;
pub mod rng;
mod service;
mod structure;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod transport;

pub use transport::VirtioFunction;

use crate::boot_disk::BootReader;
use crate::component::{self, Component};
use crate::error::Error;
use crate::serial::Output;
use queue::{LockedQueue, QueueError, WaitFor};
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// What a device is told to be; the part of it that travels to another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceConfig {
    /// Entropy.
    Rng,
    /// A console. Where it goes is each host's own business.
    Console,
    /// A disk.
    Block(block::BlockConfig),
    /// A network interface. Which tap it has is each host's own business.
    Net(net::NetConfig),
}

/// What of a machine's devices each host decides for itself.
#[derive(Clone, Debug, Default)]
pub struct LocalConfig {
    /// Where a console goes and what it reads.
    pub console: console::ConsoleConfig,
    /// Which disk images it may have.
    pub images: block::Images,
    /// How requests of disks are carried out.
    pub aio: block::Aio,
    /// What reads a disk when a guest reboots from it. Without one, this process does.
    pub boot_reader: Option<BootReader>,
    /// The taps of its network interfaces, in their order.
    pub taps: Vec<net::TapConfig>,
    /// How the network is told where the guest is.
    pub announcing: net::Announcing,
}

impl DeviceConfig {
    /// What it names that each host knows: a disk its storage, an interface its network.
    pub fn belongs_to(&self) -> Option<&str> {
        match self {
            DeviceConfig::Block(config) => config.storage.as_deref(),
            DeviceConfig::Net(config) => config.network.as_deref(),
            DeviceConfig::Rng | DeviceConfig::Console => None,
        }
    }

    /// Builds the device.
    ///
    /// # Errors
    /// What this host cannot give the device.
    pub fn build(&self, local: &LocalConfig) -> Result<Arc<dyn VirtioDevice>, Error> {
        Ok(match self {
            DeviceConfig::Rng => Arc::new(rng::Rng::new()),
            DeviceConfig::Console => Arc::new(console::Console::open(&local.console)?),
            DeviceConfig::Block(config) => Arc::new(block::Block::open(config, &local.images, local.aio)?),
            DeviceConfig::Net(config) => Arc::new(net::Net::open(config, &local.taps)?),
        })
    }
}

/// A kind of device, as its driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType {
    /// Its virtio ID.
    pub id: u16,
    /// Its PCI class, subclass and programming interface.
    pub class: u32,
}

/// Is called when a device needs the machine to pause.
pub type Alarm = Arc<dyn Fn() + Send + Sync>;

/// A virtio device behind its transport. The transport calls from vCPU threads, and `serve` from
/// each queue's own thread.
pub trait VirtioDevice: Send + Sync {
    /// What its threads are called.
    fn name(&self) -> &'static str;

    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// What another host must be told to build its twin.
    fn config(&self) -> DeviceConfig;

    /// Features it offers, beside those that all devices here have.
    fn features(&self) -> u64;

    /// The most chains that each of its queues holds, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The driver reads the configuration space. Zeros are read beyond its end, and of a device that has
    /// none.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// The driver writes to the configuration space.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready and has accepted these features.
    fn activate(&self, _features: u64) {}

    /// The driver is gone.
    fn reset(&self) {}

    /// Serves queue `index` until [`LockedQueue::pop`] has no more, or until there is no input for
    /// what it has. Whatever it began is complete when it returns.
    ///
    /// # Errors
    /// [`QueueError`] when the guest has to reset the device.
    fn serve(&self, index: usize, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError>;

    /// What queue `index` waits for after [`WaitFor::Input`], as long as there is such a thing.
    fn input(&self, _index: usize) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether its disk lock can decide which of two hosts owns the guest: it is a disk that the guest writes
    /// to, on a file system whose locks all hosts know.
    fn disk_lock_decides(&self) -> bool {
        false
    }

    /// Makes durable what the guest has written to its disk so far. Called while the disk is in use, to have
    /// less to do later.
    fn flush_disk(&self) {}

    /// Refuses a disk that is not the one of the machine that the guest comes from, as far as locks can tell:
    /// that machine has it locked. Touches nothing of the disk. One that is `trusted` needs no lock, but must
    /// be raw.
    ///
    /// # Errors
    /// If nobody has locked it, or it is not raw.
    fn check_disk_shared(&self, _trusted: bool) -> Result<(), Error> {
        Ok(())
    }

    /// Whom to alarm when it has requests that this host cannot carry out and that must wait.
    fn set_alarm(&self, _alarm: Alarm) {}

    /// Why it has such requests, if it has.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Tries such requests of queue `index` again, also while the machine is paused.
    ///
    /// # Errors
    /// As for [`serve`](Self::serve).
    fn retry(&self, _index: usize, _queue: &mut LockedQueue<'_>) -> Result<(), QueueError> {
        Ok(())
    }

    /// Its disk, to be read, if it is one.
    fn boot_image(&self) -> Option<Result<block::DiskImage, block::Error>> {
        None
    }

    /// Takes its disk lock, without which it neither reads nor writes the disk. Does nothing if it holds the
    /// lock.
    ///
    /// # Errors
    /// If somebody else holds the lock, or has used the disk since the lock was released here.
    fn take_disk_lock(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Marks the disk as used from here on, so that whoever released the lock before can tell. Called when a
    /// machine holds the locks of all its disks, before its guest runs.
    ///
    /// # Errors
    /// If the disk cannot be marked.
    fn claim_disk(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Makes durable what was written and releases the disk lock. The device is paused.
    ///
    /// # Errors
    /// If it cannot. The lock is then still held.
    fn release_disk_lock(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Whether it holds its disk lock, or has no disk.
    fn holds_disk_lock(&self) -> bool {
        true
    }

    /// Tells the network that the guest is here; true if the configuration has changed and the driver
    /// is to know. Only called while the guest runs here.
    fn announce(&self) -> bool {
        false
    }

    /// What the guest writes to and somebody reads, if there is such a thing.
    fn output(&self) -> Option<Output> {
        None
    }

    /// The kind of component that [`save`](Self::save) makes.
    fn state_kind(&self) -> component::Kind;

    /// What it has beyond its transport, as component number `index`.
    ///
    /// # Errors
    /// If it cannot be encoded.
    fn save(&self, index: u8) -> Result<Component, component::Error>;

    /// Reads what [`save`](Self::save) made, and takes it over only if it is one of this device.
    ///
    /// # Errors
    /// For a state that is missing, malformed or another device's.
    fn load(&self, components: &[Component], index: u8) -> Result<(), component::Error>;
}
