//! A machine's RAM as others see it: everybody may read, and a writer needs [`RamWriter`].
//!
//! A move promises that memory stands still from the pause on. Devices and vCPUs are stopped by the pause.
//! All else in this process that writes to a guest's memory has to hold a [`RamWriter`], which pausing waits
//! for, and which is refused from the pause for a move until the guest runs again. The writable memory itself
//! never leaves the machine.

use super::Standing;
use crate::memory::{Error, GuestMemory, GuestRam, PageSize};
use migration::memory::Ram;
use std::sync::{Arc, MutexGuard};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

/// A machine's RAM, to be read. The guest may write to it meanwhile. No safe code can write through it, or
/// through what it gives:
///
/// ```compile_fail
/// # fn example(machine: &whimbrel_vmm::Machine) {
/// let _ = machine.memory().ram().regions()[0].write(0, b"while it is paused");
/// # }
/// ```
/// ```compile_fail
/// # fn example(machine: &whimbrel_vmm::Machine) {
/// let piece = machine.memory().ram().regions()[0].pieces(0, 4096).next().unwrap();
/// let file = std::os::fd::AsFd::as_fd(&piece.fd).try_clone_to_owned();
/// # }
/// ```
#[derive(Clone, Copy)]
pub struct RamView<'m>(&'m GuestRam);

impl<'m> RamView<'m> {
    pub(super) fn new(ram: &'m GuestRam) -> Self {
        RamView(ram)
    }

    /// RAM for the migration engine.
    pub fn ram(self) -> &'m Arc<Ram> {
        self.0.ram()
    }

    /// What backs it.
    pub fn page_size(self) -> PageSize {
        self.0.page_size()
    }

    /// Makes all of it exist with `threads` threads, without changing its content.
    ///
    /// # Errors
    /// As for [`GuestRam::populate`].
    pub fn populate(self, threads: usize) -> Result<(), Error> {
        self.0.populate(threads)
    }

    /// Copies bytes out of it.
    ///
    /// # Errors
    /// When some of them lie outside of RAM.
    pub fn read_slice(self, into: &mut [u8], address: GuestAddress) -> Result<(), GuestMemoryError> {
        self.0.memory().read_slice(into, address)
    }

    /// Copies a value out of it.
    ///
    /// # Errors
    /// When some of it lies outside of RAM.
    pub fn read_obj<T: ByteValued>(self, address: GuestAddress) -> Result<T, GuestMemoryError> {
        self.0.memory().read_obj(address)
    }
}

/// Leave to write to a machine's RAM. While it exists, nobody can pause, resume, save or load the machine.
/// What is written is logged, so that a migration under way carries it along.
pub struct RamWriter<'m> {
    ram: &'m GuestRam,
    _standing: MutexGuard<'m, Standing>,
}

impl<'m> RamWriter<'m> {
    pub(super) fn new(ram: &'m GuestRam, standing: MutexGuard<'m, Standing>) -> Self {
        RamWriter { ram, _standing: standing }
    }

    /// The memory, for as long as the leave lasts.
    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }
}
