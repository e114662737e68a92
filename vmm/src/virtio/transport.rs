//! Virtio over PCI, the modern way: a function whose BAR has all registers, found by capabilities.
//!
//! Register accesses come from vCPU threads, notifications past them by KVM. The registers' lock
//! comes before a queue's, and that before the MSI-X table's.

pub use super::registers::COMMON_FEATURES;

use super::common_config::{self, Register};
use super::interrupt::Interrupt;
use super::queue::{NO_VECTOR, QueuePart, QueueState, VirtQueue};
use super::registers::{
    BAR_LEN, COMMON_CONFIG, COMMON_CONFIG_LEN, CapabilityType, DEVICE_CONFIG, DOORBELL_LEN, DOORBELLS,
    DRIVER_OK, EVENT_INDEX, ISR_STATUS, MSIX_PENDING, MSIX_TABLE, NEEDS_RESET, PART_LEN, Registers,
};
use super::{LocalConfig, VirtioDevice};
use crate::component::{self, Component, Kind, payload};
use crate::error::Error;
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{self, Msix, MsixState};
use crate::pci::{self, Function, Platform};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use virtio_queue::QueueT;

/// Vendor of all virtio functions.
const VENDOR: u16 = 0x1af4;
/// Device ID of virtio ID 0 in its modern form.
const MODERN: u16 = 0x1040;
/// ID of vendor-specific capabilities, which all of virtio's are.
const VENDOR_CAPABILITY: u8 = 0x09;
/// Where such a capability says which BAR it means, which part of that, and of which length.
const CAPABILITY_BAR: usize = 4;
const CAPABILITY_OFFSET: usize = 8;
const CAPABILITY_LEN: usize = 12;
/// The last of them has four bytes of data behind that.
const WINDOW_DATA: Range<usize> = 16..20;
/// [`VirtioFunction::mapped`] of a function whose BAR is not decoded.
const UNMAPPED: u64 = u64::MAX;

/// Most queues that a device here has, with room to spare.
const MAX_QUEUES: usize = 64;

/// The transport's saved form; the device saves its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TransportState {
    #[serde(with = "migration::bounded::bytes")]
    config: Vec<u8>,
    msix: MsixState,
    registers: Registers,
    isr: u8,
    config_vector: u16,
    needs_reset: bool,
    #[serde(deserialize_with = "migration::bounded::at_most::<MAX_QUEUES, _, _>")]
    queues: Vec<QueueState>,
}

/// What changes together.
struct Inner {
    config: ConfigSpace,
    registers: Registers,
}

/// A virtio device as a PCI function.
pub struct VirtioFunction {
    index: u8,
    device: Arc<dyn VirtioDevice>,
    platform: Arc<dyn Platform>,
    memory: GuestMemory,
    msix: Arc<Msix>,
    msix_capability: usize,
    pci_access: usize,
    interrupt: Arc<Interrupt>,
    queues: Vec<VirtQueue>,
    /// The configuration space as firmware would leave it.
    initial: ConfigSpace,
    inner: Mutex<Inner>,
    /// Where the BAR is decoded and the doorbells are, or [`UNMAPPED`]. It changes only under the lock of
    /// `inner`, and is read without, so that an access to one function does not take the locks of others.
    mapped: AtomicU64,
}

/// A virtio capability's body: where in BAR 0 which structure is.
fn capability(kind: CapabilityType, offset: u32, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, kind as u8, 0, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(extra);
    body
}

impl VirtioFunction {
    /// Function number `index` on the bus, paused, with its queues' threads.
    ///
    /// # Errors
    /// [`Error::Thread`] or [`Error::Kvm`].
    pub fn new(
        index: u8,
        device: Arc<dyn VirtioDevice>,
        platform: Arc<dyn Platform>,
        memory: &GuestMemory,
    ) -> Result<Self, Error> {
        let kind = device.device_type();
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: MODERN + kind.id,
            class: kind.class,
            revision: 1,
            subsystem: (VENDOR, MODERN + kind.id),
        });
        let sizes = device.queue_sizes();
        // One vector for each queue, and one for changes of the configuration.
        let vectors = sizes.len() as u16 + 1;
        config.set_memory_bar(pci::bar_address(usize::from(index)), BAR_LEN);
        let mut add = |kind, offset, len, extra: &[u8]| {
            config.add_capability(VENDOR_CAPABILITY, &capability(kind, offset, len, extra), &[])
        };
        add(CapabilityType::Common, COMMON_CONFIG, COMMON_CONFIG_LEN, &[]);
        add(CapabilityType::Isr, ISR_STATUS, 1, &[]);
        add(CapabilityType::Device, DEVICE_CONFIG, PART_LEN, &[]);
        let doorbells = sizes.len() as u32 * DOORBELL_LEN;
        add(CapabilityType::Notify, DOORBELLS, doorbells, &DOORBELL_LEN.to_le_bytes());
        // The driver writes what of the BAR the four bytes at the end are.
        let body = capability(CapabilityType::PciConfig, 0, 0, &[0; 4]);
        let mut writable = [0xff; 18];
        writable[..6].copy_from_slice(&[0, 0, 0xff, 0, 0, 0]);
        let pci_access = config.add_capability(VENDOR_CAPABILITY, &body, &writable);
        let (body, writable) = Msix::capability(vectors, MSIX_TABLE, MSIX_PENDING);
        let msix_capability = config.add_capability(msix::CAPABILITY, &body, &writable);

        let msix = Arc::new(Msix::new(platform.clone(), vectors));
        let interrupt = Arc::new(Interrupt::new(msix.clone()));
        let queues = sizes
            .iter()
            .enumerate()
            .map(|(queue, size)| {
                VirtQueue::start(queue, *size, device.clone(), memory.clone(), interrupt.clone())
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::Thread)?;
        let initial = config.clone();
        let inner = Mutex::new(Inner { config, registers: Registers::default() });
        let memory = memory.clone();
        let function = VirtioFunction {
            index,
            device,
            platform,
            memory,
            msix,
            msix_capability,
            pci_access,
            interrupt,
            queues,
            initial,
            inner,
            mapped: AtomicU64::new(UNMAPPED),
        };
        // Where firmware puts the BAR it mostly stays, so that a load finds the doorbells in place.
        function.place(&function.lock());
        Ok(function)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    fn offered(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    /// Moves the doorbells to where the BAR now is.
    fn place(&self, inner: &Inner) {
        let (mapped, wanted) = (self.mapped(), inner.config.memory_bar());
        if wanted == mapped {
            return;
        }
        let doorbells = |base: u64| (base + u64::from(DOORBELLS)..).step_by(DOORBELL_LEN as usize);
        if let Some(base) = mapped {
            self.queues
                .iter()
                .zip(doorbells(base))
                .for_each(|(queue, at)| self.platform.remove_doorbell(at, queue.doorbell()));
        }
        if let Some(base) = wanted {
            for (queue, at) in self.queues.iter().zip(doorbells(base)) {
                // Refused where the guest has put another function's BAR. The notification then
                // comes as a write, which serves as well, if more slowly.
                let _ = self.platform.add_doorbell(at, queue.doorbell());
            }
        }
        self.mapped.store(wanted.unwrap_or(UNMAPPED), Ordering::Release);
    }

    /// Where the BAR is decoded, if it is.
    fn mapped(&self) -> Option<u64> {
        Some(self.mapped.load(Ordering::Acquire)).filter(|base| *base != UNMAPPED)
    }

    fn reset(&self, inner: &mut Inner) {
        self.queues.iter().for_each(VirtQueue::reset);
        self.device.reset();
        self.interrupt.set(0, NO_VECTOR, false);
        inner.registers = Registers::default();
    }

    /// As it was when the machine was built, which is paused.
    pub fn power_on(&self) {
        let mut inner = self.lock();
        self.reset(&mut inner);
        inner.config = self.initial.clone();
        self.msix.reset();
        self.place(&inner);
    }

    fn set_status(&self, inner: &mut Inner, status: u8) {
        if status == 0 {
            return self.reset(inner);
        }
        if inner.registers.advance(status, self.offered()) {
            self.activate(&inner.registers);
        }
    }

    fn activate(&self, registers: &Registers) {
        self.device.activate(registers.features);
        let event_index = registers.features & EVENT_INDEX != 0;
        for queue in &self.queues {
            if !queue.activate(&self.memory, event_index) {
                self.interrupt.needs_reset();
            }
        }
    }

    /// A register's value. Only those of a queue's ring take the queue's lock.
    fn register(&self, register: Register) -> u32 {
        let driver = || self.lock().registers;
        let queue = || self.queues.get(usize::from(self.lock().registers.queue_select));
        let address = |part| queue().map_or(0, |queue| queue.address(part).0);
        match register {
            Register::DeviceFeatureSelect => driver().device_feature_select,
            Register::DeviceFeature => Registers::half(self.offered(), driver().device_feature_select),
            Register::DriverFeatureSelect => driver().driver_feature_select,
            Register::DriverFeature => {
                let driver = driver();
                Registers::half(driver.features, driver.driver_feature_select)
            }
            Register::ConfigMsixVector => self.interrupt.config_vector().into(),
            Register::NumQueues => self.queues.len() as u32,
            Register::DeviceStatus => {
                let needs_reset = if self.interrupt.is_reset_needed() { NEEDS_RESET } else { 0 };
                (driver().status | needs_reset).into()
            }
            // What changes by itself in a configuration here is two bytes at once: the generation, which is
            // for longer ones, is always the same.
            Register::ConfigGeneration => 0,
            // Each queue's doorbell has the queue's number.
            Register::QueueSelect | Register::QueueNotifyOff => driver().queue_select.into(),
            Register::QueueSize => queue().map_or(0, |queue| queue.with_queue(|queue| queue.size())).into(),
            Register::QueueMsixVector => queue().map_or(NO_VECTOR, VirtQueue::vector).into(),
            Register::QueueEnable => {
                queue().is_some_and(|queue| queue.with_queue(|queue| queue.ready())).into()
            }
            Register::QueueDescLow => address(QueuePart::DescriptorTable) as u32,
            Register::QueueDescHigh => (address(QueuePart::DescriptorTable) >> 32) as u32,
            Register::QueueDriverLow => address(QueuePart::AvailableRing) as u32,
            Register::QueueDriverHigh => (address(QueuePart::AvailableRing) >> 32) as u32,
            Register::QueueDeviceLow => address(QueuePart::UsedRing) as u32,
            Register::QueueDeviceHigh => (address(QueuePart::UsedRing) >> 32) as u32,
        }
    }

    fn write_common(&self, offset: usize, data: &[u8]) {
        // Eight bytes at once are two registers.
        for (bytes, at) in data.chunks(4).zip((offset..).step_by(4)) {
            let mut value = [0; 4];
            value[..bytes.len()].copy_from_slice(bytes);
            if let Some(register) = Register::at(at, bytes.len()) {
                self.set_register(register, u32::from_le_bytes(value));
            }
        }
    }

    fn set_register(&self, register: Register, value: u32) {
        let mut inner = self.lock();
        let queue = self.queues.get(usize::from(inner.registers.queue_select));
        // A queue that is in use no longer changes; only a reset frees it.
        let idle = || queue.filter(|queue| !queue.with_queue(|queue| queue.ready()));
        let set_address = |part, high| {
            if let Some(queue) = idle() {
                queue.set_address(part, high, value);
            }
        };
        match register {
            Register::DeviceFeatureSelect => inner.registers.device_feature_select = value,
            Register::DriverFeatureSelect => inner.registers.driver_feature_select = value,
            Register::DriverFeature => inner.registers.accept(value),
            Register::ConfigMsixVector => self.interrupt.set_config_vector(self.vector(value)),
            Register::DeviceStatus => self.set_status(&mut inner, value as u8),
            Register::QueueSelect => inner.registers.queue_select = value as u16,
            Register::QueueMsixVector => {
                if let Some(queue) = queue {
                    queue.set_vector(self.vector(value));
                }
            }
            Register::QueueSize => {
                if let Some(queue) = idle() {
                    queue.with_queue(|queue| queue.set_size(value as u16));
                }
            }
            Register::QueueEnable => {
                if let Some(queue) = idle().filter(|_| value == 1) {
                    queue.with_queue(|queue| queue.set_ready(true));
                    if inner.registers.status & DRIVER_OK != 0 {
                        self.activate(&inner.registers);
                    }
                }
            }
            Register::QueueDescLow => set_address(QueuePart::DescriptorTable, false),
            Register::QueueDescHigh => set_address(QueuePart::DescriptorTable, true),
            Register::QueueDriverLow => set_address(QueuePart::AvailableRing, false),
            Register::QueueDriverHigh => set_address(QueuePart::AvailableRing, true),
            Register::QueueDeviceLow => set_address(QueuePart::UsedRing, false),
            Register::QueueDeviceHigh => set_address(QueuePart::UsedRing, true),
            // These can only be read.
            Register::DeviceFeature
            | Register::NumQueues
            | Register::ConfigGeneration
            | Register::QueueNotifyOff => {}
        }
    }

    /// A vector that the driver chose, or none if there is no such vector: it reads that back.
    fn vector(&self, value: u32) -> u16 {
        if value < u32::from(self.msix.vectors()) { value as u16 } else { NO_VECTOR }
    }

    /// What of the BAR the window in configuration space shows; `None` unless the driver set it up.
    fn window(&self) -> Option<(u64, usize)> {
        let inner = self.lock();
        let bar = inner.config.u16_at(self.pci_access + CAPABILITY_BAR) & 0xff;
        let offset = inner.config.u32_at(self.pci_access + CAPABILITY_OFFSET);
        let len = inner.config.u32_at(self.pci_access + CAPABILITY_LEN);
        let fits = offset.checked_add(len).is_some_and(|end| end <= BAR_LEN);
        (bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && fits)
            .then_some((u64::from(offset), len as usize))
    }

    fn window_data(&self) -> Range<usize> {
        self.pci_access + WINDOW_DATA.start..self.pci_access + WINDOW_DATA.end
    }

    /// Stops the device's threads from touching guest RAM.
    pub fn pause(&self) {
        self.queues.iter().for_each(VirtQueue::pause);
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.queues.iter().for_each(VirtQueue::resume);
    }

    /// Tries requests again that wait, though the device is paused.
    pub fn retry(&self) {
        for (index, queue) in self.queues.iter().enumerate() {
            queue.retry(index, &*self.device, &self.memory, &self.interrupt);
        }
    }

    /// Tells the network, and the driver, that the guest is here.
    pub fn announce(&self) {
        if self.device.announce() {
            self.interrupt.config();
        }
    }

    /// Does something while a queue is locked, as by whoever serves it.
    #[cfg(test)]
    pub fn with_queue_locked(&self, queue: usize, work: impl FnOnce()) {
        self.queues[queue].with_queue(|_| work());
    }

    /// Serves a queue in this thread, as its own thread does.
    #[cfg(feature = "internals")]
    #[doc(hidden)]
    pub fn serve(&self, queue: usize) {
        self.queues[queue].serve(queue, &*self.device, &self.memory, &self.interrupt);
    }

    /// The components that the device saves.
    pub fn places(&self) -> [(Kind, u8); 2] {
        [(Kind::Virtio, self.index), (self.device.state_kind(), self.index)]
    }

    /// The paused device's state.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn save(&self) -> Result<[Component; 2], component::Error> {
        let inner = self.lock();
        let state = TransportState {
            config: inner.config.save(),
            msix: self.msix.save(),
            registers: inner.registers,
            isr: self.interrupt.isr(),
            config_vector: self.interrupt.config_vector(),
            needs_reset: self.interrupt.is_reset_needed(),
            queues: self.queues.iter().map(VirtQueue::save).collect(),
        };
        Ok([Component::new(Kind::Virtio, self.index, &state)?, self.device.save(self.index)?])
    }

    /// Restores the paused device's state. Guest RAM must be in place.
    ///
    /// # Errors
    /// For a state that is not one of an equal device.
    pub fn load(&self, components: &[Component]) -> Result<(), component::Error> {
        let state: TransportState = payload(components, Kind::Virtio, self.index)?;
        self.load_transport(&state).map_err(|what| component::Error::Malformed {
            kind: Kind::Virtio,
            index: self.index,
            what,
        })?;
        self.device.load(components, self.index)?;
        if state.registers.status & DRIVER_OK != 0 {
            self.activate(&state.registers);
        }
        Ok(())
    }

    fn load_transport(&self, state: &TransportState) -> Result<(), String> {
        if !state.registers.plausible(self.offered()) {
            let (accepted, offered) = (state.registers.features, self.offered());
            return Err(format!("its driver uses features {accepted:#x} where this device has {offered:#x}"));
        }
        if state.queues.len() != self.queues.len() {
            return Err(format!("{} queues where {} belong", state.queues.len(), self.queues.len()));
        }
        let mut inner = self.lock();
        inner.config.load(&state.config)?;
        self.msix.load(&state.msix, inner.config.u16_at(self.msix_capability + 2))?;
        for (queue, state) in self.queues.iter().zip(&state.queues) {
            queue.load(state)?;
        }
        self.interrupt.set(state.isr, state.config_vector, state.needs_reset);
        inner.registers = state.registers;
        self.place(&inner);
        Ok(())
    }
}

impl Function for VirtioFunction {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        if self.window_data().contains(&offset)
            && let Some((at, len)) = self.window()
        {
            let mut bytes = [0; 4];
            self.read_bar(at, &mut bytes[..len]);
            self.lock().config.write(self.window_data().start, &bytes);
        }
        self.lock().config.read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        {
            let mut inner = self.lock();
            inner.config.write(offset, data);
            self.place(&inner);
            self.msix.set_control(inner.config.u16_at(self.msix_capability + 2));
        }
        if self.window_data().contains(&offset)
            && let Some((at, len)) = self.window()
        {
            let mut bytes = [0; 4];
            self.lock().config.read(self.window_data().start, &mut bytes);
            self.write_bar(at, &bytes[..len]);
        }
    }

    fn offset(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.mapped()?)?;
        (offset < u64::from(BAR_LEN)).then_some(offset)
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let within = offset as usize % PART_LEN as usize;
        match offset as u32 & !(PART_LEN - 1) {
            COMMON_CONFIG => common_config::read(within, data, |register| self.register(register)),
            ISR_STATUS => {
                data.fill(0);
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE_CONFIG => self.device.read_config(within as u64, data),
            MSIX_TABLE => self.msix.read_table(within, data),
            MSIX_PENDING => self.msix.read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        let within = offset as usize % PART_LEN as usize;
        match offset as u32 & !(PART_LEN - 1) {
            COMMON_CONFIG => self.write_common(within, data),
            DEVICE_CONFIG => self.device.write_config(within as u64, data),
            DOORBELLS => {
                if let Some(queue) = self.queues.get(within / DOORBELL_LEN as usize) {
                    queue.notify();
                }
            }
            MSIX_TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }
}

/// The functions for a machine's devices.
///
/// # Errors
/// What this host cannot give them.
pub fn functions(
    configs: &[super::DeviceConfig],
    local: &LocalConfig,
    platform: &Arc<dyn Platform>,
    memory: &GuestMemory,
) -> Result<Vec<Arc<VirtioFunction>>, Error> {
    if configs.len() > pci::MAX_FUNCTIONS {
        return Err(Error::DeviceCount { wanted: configs.len(), most: pci::MAX_FUNCTIONS });
    }
    configs
        .iter()
        .zip(0..)
        .map(|(config, index)| {
            VirtioFunction::new(index, config.build(local)?, platform.clone(), memory).map(Arc::new)
        })
        .collect()
}
