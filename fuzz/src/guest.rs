//! A hostile driver of a virtio device: it does with the device's registers, its rings and its memory what
//! the input says.

use crate::Input;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use vmm::KvmError;
use vmm::memory::{GuestRam, PageSize};
use vmm::pci::{Function, Platform};
use vmm::virtio::{DeviceConfig, LocalConfig, VirtioDevice, VirtioFunction};
use vmm_sys_util::eventfd::EventFd;

/// A machine that takes interrupts and does nothing with them.
pub struct Nowhere;

impl Platform for Nowhere {
    fn send_message(&self, _: u64, _: u32) {}

    fn add_doorbell(&self, _: u64, _: &EventFd) -> Result<(), KvmError> {
        Ok(())
    }

    fn remove_doorbell(&self, _: u64, _: &EventFd) {}
}

/// Chains that a queue holds, once the driver has started as drivers do.
const SIZE: u16 = 64;
/// Length of a function's BAR.
const BAR_LEN: u16 = 0x8000;
/// In what part of memory the driver writes.
const MEMORY: u64 = 16 << 20;

/// The registers of the common configuration: offset in the BAR, and length.
mod register {
    pub const DRIVER_FEATURE_SELECT: (u64, usize) = (8, 4);
    pub const DRIVER_FEATURE: (u64, usize) = (12, 4);
    pub const STATUS: (u64, usize) = (20, 1);
    pub const QUEUE_SELECT: (u64, usize) = (22, 2);
    pub const QUEUE_SIZE: (u64, usize) = (24, 2);
    pub const QUEUE_VECTOR: (u64, usize) = (26, 2);
    pub const QUEUE_ENABLE: (u64, usize) = (28, 2);
    pub const QUEUE_RINGS: u64 = 32;
}

/// A device and its driver.
pub struct Guest {
    ram: Arc<GuestRam>,
    function: VirtioFunction,
    queues: usize,
    available: [u16; 64],
}

impl Guest {
    /// The driver of a device that runs, with memory of its own.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let ram = Arc::new(GuestRam::new(MEMORY, PageSize::Small).expect("memory"));
        Self::beside(device, ram)
    }

    fn beside(device: Arc<dyn VirtioDevice>, ram: Arc<GuestRam>) -> Self {
        let queues = device.queue_sizes().len();
        let function = VirtioFunction::new(1, device, Arc::new(Nowhere), ram.memory()).expect("a function");
        Guest { ram, function, queues, available: [0; 64] }
    }

    fn set(&self, (offset, len): (u64, usize), value: u32) {
        self.function.write_bar(offset, &value.to_le_bytes()[..len]);
    }

    fn rings(queue: usize) -> [u64; 3] {
        let base = 0x1_0000 + queue as u64 * 0x4000;
        [base, base + 0x1000, base + 0x2000]
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // What is not in memory goes nowhere, as for any guest.
        let _ = self.ram.memory().write_slice(bytes, GuestAddress(address));
    }

    /// Starts as drivers do, with these features.
    fn start(&mut self, features: u64) {
        self.set(register::STATUS, 0);
        self.set(register::STATUS, 3);
        for select in 0..2 {
            self.set(register::DRIVER_FEATURE_SELECT, select);
            self.set(register::DRIVER_FEATURE, (features >> (32 * select)) as u32);
        }
        self.set(register::STATUS, 11);
        for queue in 0..self.queues {
            self.set(register::QUEUE_SELECT, queue as u32);
            self.set(register::QUEUE_SIZE, SIZE.into());
            self.set(register::QUEUE_VECTOR, queue as u32 + 1);
            for (address, at) in Self::rings(queue).iter().zip((register::QUEUE_RINGS..).step_by(8)) {
                self.function.write_bar(at, &address.to_le_bytes());
            }
            self.set(register::QUEUE_ENABLE, 1);
        }
        self.set(register::STATUS, 15);
        self.available = [0; 64];
    }

    /// Whether the device has taken the driver for one.
    pub fn is_started(&self) -> bool {
        let mut status = [0];
        self.function.read_bar(register::STATUS.0, &mut status);
        status == [15]
    }

    /// Makes a chain available that begins with descriptor `head`.
    fn offer(&mut self, queue: usize, head: u16) {
        let [_, available, _] = Self::rings(queue);
        let next = &mut self.available[queue];
        let slot = available + 4 + u64::from(*next % SIZE) * 2;
        *next = next.wrapping_add(1);
        let index = *next;
        self.write(slot, &head.to_le_bytes());
        self.write(available + 2, &index.to_le_bytes());
    }

    /// Does what the input says.
    pub fn play(&mut self, input: &mut Input<'_>) -> Option<()> {
        self.function.resume();
        loop {
            let what = input.byte()?;
            let queue = usize::from(what >> 4) % self.queues;
            match what & 15 {
                0 => self.start(u64::from_le_bytes(input.array()?) | 1 << 32),
                1 => {
                    let (offset, len) = (input.byte()?, usize::from(what >> 4) % 4 + 1);
                    self.function.write_config(offset.into(), &input.access(len)[..len]);
                }
                2 => {
                    let len = usize::from(what >> 4) % 4 + 1;
                    self.function.read_config(input.byte()?.into(), &mut [0; 4][..len]);
                }
                3 => {
                    let (offset, len) = (input.word()? % BAR_LEN, usize::from(what >> 4) % 8 + 1);
                    self.function.write_bar(offset.into(), &input.access(len)[..len]);
                }
                4 => {
                    let len = usize::from(what >> 4) % 8 + 1;
                    self.function.read_bar((input.word()? % BAR_LEN).into(), &mut [0; 8][..len]);
                }
                5 => {
                    let (address, len) = (input.long()?, input.byte()?);
                    self.write(address.into(), input.bytes(len.into()));
                }
                // A chain of descriptors, with what the first of them is about.
                6 | 7 => {
                    let [descriptors, ..] = Self::rings(queue);
                    let count = u16::from(input.byte()? % 8) + 1;
                    for number in 0..count {
                        let (address, len, flags) = (input.long()?, input.long()?, input.byte()? & 6);
                        let next = u8::from(number + 1 < count);
                        let mut raw = [0; 16];
                        raw[..4].copy_from_slice(&address.to_le_bytes());
                        raw[8..12].copy_from_slice(&len.to_le_bytes());
                        raw[12] = flags | next;
                        raw[14..].copy_from_slice(&(number + 1).to_le_bytes());
                        self.write(descriptors + u64::from(number) * 16, &raw);
                    }
                    self.offer(queue, 0);
                    if what & 1 != 0 {
                        self.function.serve(queue);
                    }
                }
                8 => self.offer(queue, input.word()?),
                9 => self.function.serve(queue),
                10 => self.function.pause(),
                11 => self.function.resume(),
                12 => self.function.announce(),
                13 => {
                    let raw: [u8; 16] = input.array()?;
                    self.write(Self::rings(queue)[0] + u64::from(input.byte()? % 64) * 16, &raw);
                }
                _ => (0..self.queues).for_each(|queue| self.function.serve(queue)),
            }
        }
    }

    /// Moves the device to another machine: what was saved, loaded and saved again is what was saved.
    pub fn hop(self, build: impl FnOnce(&DeviceConfig) -> Arc<dyn VirtioDevice>) {
        self.function.pause();
        let saved = self.function.save().expect("a state");
        let device = build(&self.function.device().config());
        let twin = Self::beside(device, self.ram.clone());
        twin.function.load(&saved).expect("the state of a twin");
        assert_eq!(twin.function.save().expect("a state"), saved);
    }
}

/// Fuzzes a device: the driver's doings, then a move.
pub fn drive(device: Arc<dyn VirtioDevice>, local: &LocalConfig, input: &[u8]) {
    drive_and_build(device, |config| config.build(local).expect("a twin"), &mut Input(input));
}

/// The same with a device whose twin is built by `build`.
pub fn drive_and_build(
    device: Arc<dyn VirtioDevice>,
    build: impl FnOnce(&DeviceConfig) -> Arc<dyn VirtioDevice>,
    input: &mut Input<'_>,
) {
    let mut guest = Guest::new(device);
    let _ = guest.play(input);
    guest.hop(build);
}
