//! A driver for tests: it finds the registers as a kernel does, by capabilities, sets queues up and
//! uses them.
//!
//! Its own writes to RAM, which stand for the guest's, are kept out of the VMM's write log.

use super::VirtioDevice;
use super::common_config::Register;
use super::registers::{
    COMMON_FEATURES, CapabilityType, DOORBELL_LEN, DRIVER_OK, EVENT_INDEX, FEATURES_OK, MSIX_TABLE,
    NEEDS_RESET,
};
use super::transport::VirtioFunction;
use crate::component::Component;
use crate::memory::{GuestMemory, GuestRam, PageSize};
use crate::pci::recorder::Recorder;
use crate::pci::{Function, Platform, msix};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Chains that the driver's queues hold.
pub const SIZE: u16 = 64;
/// Where buffers may be.
pub const BUFFERS: u64 = 1 << 20;

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The driver has seen the device, and knows how to drive it.
pub const DRIVER: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER) as u8;
const PATIENCE: Duration = Duration::from_secs(20);

/// A function with its RAM and its driver's side.
pub struct Bench {
    pub ram: Arc<GuestRam>,
    pub function: VirtioFunction,
    pub recorder: Arc<Recorder>,
    /// Per queue: heads made available, and heads seen used.
    queues: Vec<(u16, u16)>,
}

/// A buffer of a chain.
#[derive(Clone, Copy)]
pub enum Buffer {
    /// The device reads so many bytes.
    Out(u64, u32),
    /// The device writes up to so many bytes.
    In(u64, u32),
}

impl Bench {
    pub fn with(device: Arc<dyn VirtioDevice>) -> Self {
        let ram = Arc::new(GuestRam::new(16 << 20, PageSize::Small).unwrap());
        Self::beside(device, ram)
    }

    /// A function that uses this RAM.
    pub fn beside(device: Arc<dyn VirtioDevice>, ram: Arc<GuestRam>) -> Self {
        let recorder = Arc::new(Recorder::default());
        let platform: Arc<dyn Platform> = recorder.clone();
        let queues = vec![(0, 0); device.queue_sizes().len()];
        let function = VirtioFunction::new(3, device, platform, ram.memory()).unwrap();
        Bench { ram, function, recorder, queues }
    }

    /// How many queues the function has.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    /// Writes as the guest does: without a trace in the VMM's log.
    pub fn guest_writes(&self, address: u64, bytes: &[u8]) {
        let (region, at) = self.memory().to_region_addr(GuestAddress(address)).unwrap();
        let pointer = region.get_host_address(at).unwrap();
        assert!(at.0 + bytes.len() as u64 <= region.len());
        // SAFETY: the range was checked to lie in the region's mapping; no reference into guest RAM
        // exists anywhere.
        unsafe { pointer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// The offset in the BAR that the capability of this kind names.
    fn part(&self, kind: CapabilityType) -> u64 {
        let byte = |at: usize| {
            let mut byte = [0];
            self.function.read_config(at, &mut byte);
            usize::from(byte[0])
        };
        let mut at = byte(0x34);
        while (byte(at), byte(at + 3)) != (9, kind as usize) {
            at = byte(at + 1);
            assert_ne!(at, 0, "no capability {kind:?}");
        }
        (0..4).fold(0, |offset, b| offset | (byte(at + 8 + b) as u64) << (8 * b))
    }

    /// Reads from the structure of this kind.
    pub fn read(&self, kind: CapabilityType, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read_bar(self.part(kind) + offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// Writes to the structure of this kind.
    pub fn write(&self, kind: CapabilityType, offset: u64, len: usize, value: u64) {
        self.function.write_bar(self.part(kind) + offset, &value.to_le_bytes()[..len]);
    }

    /// Reads a register of the common configuration.
    pub fn register(&self, register: Register) -> u32 {
        let (offset, len) = register.place();
        self.read(CapabilityType::Common, offset, len) as u32
    }

    /// Writes one.
    pub fn set_register(&self, register: Register, value: u32) {
        let (offset, len) = register.place();
        self.write(CapabilityType::Common, offset, len, value.into());
    }

    /// Reads a field of the device's configuration space.
    pub fn config(&self, offset: usize, len: usize) -> u64 {
        self.read(CapabilityType::Device, offset as u64, len)
    }

    pub fn status(&self) -> u8 {
        self.register(Register::DeviceStatus) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.set_register(Register::DeviceStatus, status.into());
    }

    /// All features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.set_register(Register::DeviceFeatureSelect, select);
            u64::from(self.register(Register::DeviceFeature))
        };
        half(0) | half(1) << 32
    }

    /// Where the rings of a queue are: descriptors, available and used, a page each.
    fn rings(queue: usize) -> [u64; 3] {
        let base = 0x1_0000 + queue as u64 * 0x4000;
        [base, base + 0x1000, base + 0x2000]
    }

    /// Negotiates `features`, sets up all queues with a vector each, and is ready.
    pub fn start(&mut self, features: u64) {
        self.set_status(0);
        self.set_status(DRIVER);
        for select in 0..2 {
            self.set_register(Register::DriverFeatureSelect, select);
            self.set_register(Register::DriverFeature, (features >> (32 * select)) as u32);
        }
        self.set_status(DRIVER | FEATURES_OK);
        assert_eq!(self.status(), DRIVER | FEATURES_OK, "features {features:#x} are refused");
        // Message 0 for the configuration, message n + 1 for queue n; all enabled.
        for vector in 0..=self.queues.len() as u64 {
            let entry = u64::from(MSIX_TABLE) + vector * msix::ENTRY_LEN as u64;
            self.function.write_bar(entry, &(0xfee0_0000u64).to_le_bytes());
            self.function.write_bar(entry + 8, &(0x40 + vector).to_le_bytes());
        }
        self.write_msix_control(1 << 15);
        self.set_register(Register::ConfigMsixVector, 0);
        for queue in 0..self.queues.len() {
            let [descriptors, available, used] = Self::rings(queue);
            [descriptors, available, used].iter().for_each(|at| self.guest_writes(*at, &[0; 0x1000]));
            self.set_register(Register::QueueSelect, queue as u32);
            self.set_register(Register::QueueSize, SIZE.into());
            self.set_register(Register::QueueMsixVector, queue as u32 + 1);
            for (low, high, address) in [
                (Register::QueueDescLow, Register::QueueDescHigh, descriptors),
                (Register::QueueDriverLow, Register::QueueDriverHigh, available),
                (Register::QueueDeviceLow, Register::QueueDeviceHigh, used),
            ] {
                self.set_register(low, address as u32);
                self.set_register(high, (address >> 32) as u32);
            }
            self.set_register(Register::QueueEnable, 1);
            self.queues[queue] = (0, 0);
        }
        self.set_status(DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn write_msix_control(&self, control: u16) {
        let mut at = [0];
        self.function.read_config(0x34, &mut at);
        loop {
            let mut head = [0; 2];
            self.function.read_config(usize::from(at[0]), &mut head);
            if head[0] == msix::CAPABILITY {
                return self.function.write_config(usize::from(at[0]) + 2, &control.to_le_bytes());
            }
            at[0] = head[1];
        }
    }

    /// Starts with everything that is offered, the function already running.
    pub fn running(mut self) -> Self {
        self.function.resume();
        self.start(self.offered());
        self
    }

    /// Makes a chain of `buffers` available, its descriptors from number `first` on, without
    /// telling the device.
    pub fn offer(&mut self, queue: usize, first: u16, buffers: &[Buffer]) {
        let [descriptors, available, _] = Self::rings(queue);
        for (number, buffer) in (0u16..).zip(buffers) {
            let (address, len, flags) = match *buffer {
                Buffer::Out(address, len) => (address, len, 0),
                Buffer::In(address, len) => (address, len, WRITE),
            };
            let last = usize::from(number) + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            let raw = RawDescriptor::from(Descriptor::new(address, len, flags, first + number + 1));
            let at = descriptors + u64::from(first + number) * 16;
            self.guest_writes(at, vm_memory::ByteValued::as_slice(&raw));
        }
        let next = &mut self.queues[queue].0;
        let slot = available + 4 + u64::from(*next % SIZE) * 2;
        *next = next.wrapping_add(1);
        let index = *next;
        // Interrupt me for it. Not sooner: a device that has just given a chain back may be about to look
        // whether that one is wanted.
        let seen = self.queues[queue].1;
        self.guest_writes(available + 4 + u64::from(SIZE) * 2, &seen.to_le_bytes());
        self.guest_writes(slot, &first.to_le_bytes());
        self.guest_writes(available + 2, &index.to_le_bytes());
    }

    /// Rings the doorbell.
    pub fn notify(&self, queue: usize) {
        let offset = queue as u64 * u64::from(DOORBELL_LEN);
        self.write(CapabilityType::Notify, offset, 2, queue as u64);
    }

    /// The number of the chain of which the device wants to be told that it was made available.
    fn wanted(&self, queue: usize) -> u16 {
        let [_, _, used] = Self::rings(queue);
        self.memory().read_obj(GuestAddress(used + 4 + u64::from(SIZE) * 8)).unwrap()
    }

    /// Rings the doorbell if the device wants to know of the last chain that was made available, as a kernel
    /// does.
    pub fn notify_if_wanted(&self, queue: usize) {
        // The chain must be there before the device's wish is read.
        fence(Ordering::SeqCst);
        if self.wanted(queue) == self.queues[queue].0.wrapping_sub(1) {
            self.notify(queue);
        }
    }

    /// Waits until the device has taken all that was made available, and waits for more.
    pub fn wait_taken(&self, queue: usize) {
        let began = Instant::now();
        while self.wanted(queue) != self.queues[queue].0 {
            assert!(began.elapsed() < PATIENCE, "queue {queue} is not served");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// How many chains the device has given back.
    pub fn used(&self, queue: usize) -> u16 {
        self.memory().read_obj(GuestAddress(Self::rings(queue)[2] + 2)).unwrap()
    }

    /// Waits for the next chain to come back: its head and what was written.
    pub fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let seen = self.queues[queue].1;
        let began = Instant::now();
        while self.used(queue) == seen {
            assert!(
                began.elapsed() < PATIENCE,
                "queue {queue} gives nothing back (status {:#x})",
                self.status()
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        let [_, _, used] = Self::rings(queue);
        let at = used + 4 + u64::from(seen % SIZE) * 8;
        self.queues[queue].1 = seen.wrapping_add(1);
        let word = |at| self.memory().read_obj(GuestAddress(at)).unwrap();
        (word(at), word(at + 4))
    }

    /// One request from offer to return.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer]) -> (u32, u32) {
        self.offer(queue, 0, buffers);
        self.notify(queue);
        self.wait_used(queue)
    }

    /// Waits until the function has sent this many messages, and no more.
    pub fn wait_messages(&self, count: usize) {
        let began = Instant::now();
        while self.recorder.messages().len() < count {
            assert!(began.elapsed() < PATIENCE, "{} of {count} messages", self.recorder.messages().len());
            std::thread::sleep(Duration::from_micros(200));
        }
        assert_eq!(self.recorder.messages().len(), count);
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&self) {
        let began = Instant::now();
        while self.status() & NEEDS_RESET == 0 {
            assert!(began.elapsed() < PATIENCE, "the device does not mind");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The pages that the VMM's own log has, in ascending order, and clears it. A queue's thread may
    /// write to the used ring at any time, to say whether it wants to be notified: used rings are left
    /// out but for that of `queue`.
    pub fn logged(&self, queue: usize) -> Vec<u64> {
        let log = self.ram.write_log(0).unwrap();
        let mut words = vec![0; (16 << 20 >> 12) / 64];
        log.merge_into(&mut words);
        log.reset();
        let others: Vec<_> = (0..self.queues.len()).filter(|q| *q != queue).map(Self::used_page).collect();
        let pages = migration::dirty::runs(&words, 0).flat_map(|(first, count)| first..first + count);
        pages.filter(|page| !others.contains(page)).collect()
    }

    /// The page of a queue's used ring.
    pub fn used_page(queue: usize) -> u64 {
        Self::rings(queue)[2] >> 12
    }

    /// The paused function's state.
    pub fn save(&self) -> Vec<Component> {
        self.function.save().unwrap().to_vec()
    }

    /// Moves to another function of the same kind beside the same RAM, which then runs: its state
    /// must be what was saved.
    pub fn hop(self, device: Arc<dyn VirtioDevice>) -> Self {
        self.function.pause();
        let saved = self.save();
        let target = Bench { queues: self.queues.clone(), ..Bench::beside(device, self.ram.clone()) };
        target.function.load(&saved).unwrap();
        assert_eq!(target.save(), saved, "saved, loaded and saved again");
        target.function.resume();
        target
    }
}

/// The features that all devices have, without the event index.
pub const WITHOUT_EVENT_INDEX: u64 = COMMON_FEATURES & !EVENT_INDEX;
