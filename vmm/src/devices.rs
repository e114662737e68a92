//! What a guest reaches by ports and by memory that is not RAM; the interrupt controllers and the
//! timer are KVM's.
//!
//! | port | what |
//! |---|---|
//! | 0x64 | keyboard controller: writing 0xfe resets the machine |
//! | 0x80 | POST codes: ignored |
//! | 0x3f8 to 0x3ff | serial port |
//! | 0x600 to 0x605 | [power]: writing a word with bit 13 set to 0x604 powers off |
//! | 0xcf8 to 0xcff | [PCI](crate::pci) configuration |
//!
//! All other ports, and memory where there is nothing, read as all ones and swallow writes.

use crate::error::Error;
use crate::lock::lock;
use crate::pci::{Bus, CONFIG_ADDRESS_PORT, Function};
use crate::power::{self, Power, Request};
use crate::serial::SerialPort;
use crate::virtio::{VirtioDevice, VirtioFunction};
use std::sync::{Arc, Mutex, MutexGuard};

/// First port of the serial port's eight.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's command port.
pub const RESET_PORT: u16 = 0x64;
/// The command that pulses the CPU's reset line.
pub const RESET_COMMAND: u8 = 0xfe;

/// All devices that are not KVM's.
pub struct Devices {
    serial: SerialPort,
    power: Power,
    pci: Bus,
    virtio: Vec<Arc<VirtioFunction>>,
    /// Whether they may do anything.
    running: Mutex<bool>,
}

impl Devices {
    /// A machine's devices, paused.
    pub fn new(serial: SerialPort, power: Power, virtio: Vec<Arc<VirtioFunction>>) -> Self {
        let pci = Bus::new(virtio.iter().map(|f| f.clone() as Arc<dyn Function>).collect());
        Devices { serial, power, pci, virtio, running: Mutex::new(false) }
    }

    /// The serial port.
    pub fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// The power registers.
    pub fn power(&self) -> &Power {
        &self.power
    }

    /// The PCI bus.
    pub fn pci(&self) -> &Bus {
        &self.pci
    }

    /// The virtio devices, by their places on the bus.
    pub fn virtio(&self) -> &[Arc<VirtioFunction>] {
        &self.virtio
    }

    /// Refuses disks that nobody else has locked. The machine that a guest comes from has locked all of them.
    /// Those that are `trusted` need no lock, but must be raw.
    ///
    /// # Errors
    /// If this host sees no lock on one of them, or one is not raw.
    pub fn check_disks_shared(&self, trusted: bool) -> Result<(), Error> {
        self.virtio.iter().try_for_each(|function| function.device().check_disk_shared(trusted))
    }

    /// Takes the locks of all disks. If it fails, the machine holds those that it held before and no others.
    ///
    /// # Errors
    /// If somebody else holds one of the locks, or has used the disk since the lock was released here.
    pub fn take_disk_locks(&self) -> Result<(), Error> {
        let mut taken: Vec<&Arc<dyn VirtioDevice>> = Vec::new();
        let missing: Vec<_> =
            self.virtio.iter().map(|f| f.device()).filter(|d| !d.holds_disk_lock()).collect();
        let all = missing.iter().try_for_each(|device| {
            device.take_disk_lock()?;
            taken.push(device);
            Ok(())
        });
        // Only a machine that holds all of them runs, so only then are the disks marked.
        let claimed = all.and_then(|()| taken.iter().try_for_each(|device| device.claim_disk()));
        if claimed.is_err() {
            // Nothing was written since they were taken, so that nothing is left to fail here.
            taken.iter().for_each(|device| drop(device.release_disk_lock()));
        }
        claimed
    }

    /// Makes durable what was written to disks and releases their locks. All devices are paused.
    ///
    /// # Errors
    /// If a disk cannot be flushed. All locks are then still held.
    pub fn release_disk_locks(&self) -> Result<(), Error> {
        let result = self.virtio.iter().try_for_each(|function| function.device().release_disk_lock());
        if result.is_err() {
            // Nobody can have taken those that were released for more than this moment. If somebody
            // has, the machine finds out before it runs.
            let _ = self.take_disk_locks();
        }
        result
    }

    /// Whether there is a disk lock that can decide which of two hosts owns the guest. One is enough: whoever
    /// runs the guest holds the locks of all its disks.
    pub fn disk_locks_decide(&self) -> bool {
        self.virtio.iter().any(|function| function.device().disk_lock_decides())
    }

    /// Makes durable what was written to disks so far.
    pub fn flush_disks(&self) {
        self.virtio.iter().for_each(|function| function.device().flush_disk());
    }

    /// Stops all threads of devices from touching guest RAM, and input from coming in. No vCPU may run.
    pub fn pause(&self) {
        *self.running() = false;
        self.serial.pause();
        self.virtio.iter().for_each(|function| function.pause());
    }

    /// Lets them go on.
    pub fn resume(&self) {
        *self.running() = true;
        self.serial.resume();
        self.virtio.iter().for_each(|function| function.resume());
    }

    fn running(&self) -> MutexGuard<'_, bool> {
        lock(&self.running)
    }

    /// Tells the network that the guest is here, unless it is paused: then it returns false. A pause waits
    /// for this: once devices are at rest, nobody hears any more that the guest is here.
    pub fn announce(&self) -> bool {
        let running = self.running();
        if *running {
            self.virtio.iter().for_each(|function| function.announce());
        }
        *running
    }

    /// A guest's read. String instructions arrive as many accesses to one port.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_PORT..=0x3ff => {
                data.iter_mut().for_each(|byte| *byte = self.serial.read((port - SERIAL_PORT) as u8));
            }
            // Neither input nor output buffer full: the controller is ready for a command.
            RESET_PORT => data.fill(0),
            power::EVENT_PORT..=power::LAST_PORT => self.power.read(port - power::EVENT_PORT, data),
            CONFIG_ADDRESS_PORT..=0xcff => self.pci.port_in(port, data),
            _ => data.fill(0xff),
        }
    }

    /// A guest's write, and what it asks of the machine.
    pub fn port_out(&self, port: u16, data: &[u8]) -> Option<Request> {
        match port {
            SERIAL_PORT..=0x3ff => {
                data.iter().for_each(|byte| self.serial.write((port - SERIAL_PORT) as u8, *byte));
                None
            }
            RESET_PORT => data.contains(&RESET_COMMAND).then_some(Request::Reset),
            power::EVENT_PORT..=power::LAST_PORT => self.power.write(port - power::EVENT_PORT, data),
            CONFIG_ADDRESS_PORT..=0xcff => {
                self.pci.port_out(port, data);
                None
            }
            _ => None,
        }
    }

    /// A guest's read of memory where no RAM is.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.pci.mmio_read(address, data);
    }

    /// A guest's write there.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        self.pci.mmio_write(address, data);
    }
}
