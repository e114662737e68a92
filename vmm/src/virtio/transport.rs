//! Virtio over PCI, the modern way: a function whose BAR has all registers, found by capabilities.
//!
//! Register accesses come from vCPU threads, notifications past them by KVM. The registers' lock
//! comes before a queue's, and that before the MSI-X table's.

use super::interrupt::Interrupt;
use super::queue::{NO_VECTOR, QueueState, RingPart, VirtQueue};
pub use super::registers::COMMON_FEATURES;

use super::registers::{
    BAR_LEN, COMMON, COMMON_LEN, DEVICE, DOORBELL_LEN, DOORBELLS, DRIVER_OK, EVENT_INDEX, ISR, MSIX_PENDING,
    MSIX_TABLE, NEEDS_RESET, PART_LEN, Registers,
};
use super::{LocalConfig, VirtioDevice};
use crate::component::{self, Component, Kind, payload};
use crate::error::Error;
use crate::memory::GuestMemory;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{self, Msix, MsixState};
use crate::pci::{self, Function, Platform};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_queue::QueueT;

/// Vendor of all virtio functions.
const VENDOR: u16 = 0x1af4;
/// Device ID of virtio ID 0 in its modern form.
const MODERN: u16 = 0x1040;
/// ID of vendor-specific capabilities, which all of virtio's are.
const VENDOR_CAPABILITY: u8 = 0x09;
/// What such a capability is about.
const COMMON_CAPABILITY: u8 = 1;
const DOORBELL_CAPABILITY: u8 = 2;
const ISR_CAPABILITY: u8 = 3;
const DEVICE_CAPABILITY: u8 = 4;
const WINDOW_CAPABILITY: u8 = 5;

/// The transport's saved form; the device saves its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TransportState {
    config: Vec<u8>,
    msix: MsixState,
    registers: Registers,
    isr: u8,
    config_vector: u16,
    needs_reset: bool,
    queues: Vec<QueueState>,
}

/// What changes together.
struct Inner {
    config: ConfigSpace,
    registers: Registers,
    /// Where the BAR is decoded and the doorbells are; `None` while it is not.
    mapped: Option<u64>,
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
    inner: Mutex<Inner>,
}

/// A virtio capability's body: where in BAR 0 which structure is.
fn capability(kind: u8, offset: u32, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, kind, 0, 0, 0, 0];
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
        add(COMMON_CAPABILITY, COMMON, COMMON_LEN, &[]);
        add(ISR_CAPABILITY, ISR, 1, &[]);
        add(DEVICE_CAPABILITY, DEVICE, PART_LEN, &[]);
        let doorbells = sizes.len() as u32 * DOORBELL_LEN;
        add(DOORBELL_CAPABILITY, DOORBELLS, doorbells, &DOORBELL_LEN.to_le_bytes());
        // The last one is a window for those who cannot reach the BAR: the driver says what of it
        // the four bytes at the end are.
        let body = capability(WINDOW_CAPABILITY, 0, 0, &[0; 4]);
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
        let inner = Mutex::new(Inner { config, registers: Registers::default(), mapped: None });
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
            inner,
        };
        // Where firmware puts the BAR it mostly stays, so that a load finds the doorbells in place.
        function.place(&mut function.lock());
        Ok(function)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    fn offered(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    /// Moves the doorbells to where the BAR now is.
    fn place(&self, inner: &mut Inner) {
        let wanted = inner.config.memory_bar();
        if wanted == inner.mapped {
            return;
        }
        let doorbells = |base: u64| (base + u64::from(DOORBELLS)..).step_by(DOORBELL_LEN as usize);
        if let Some(base) = inner.mapped {
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
        inner.mapped = wanted;
    }

    fn reset(&self, inner: &mut Inner) {
        self.queues.iter().for_each(VirtQueue::reset);
        self.device.reset();
        self.interrupt.set(0, NO_VECTOR, false);
        inner.registers = Registers::default();
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

    fn read_common(&self, offset: usize, data: &mut [u8]) {
        let inner = self.lock();
        let registers = &inner.registers;
        let queue = self.queues.get(usize::from(registers.queue_select));
        let needs_reset = if self.interrupt.is_reset_needed() { NEEDS_RESET } else { 0 };
        let mut image = Vec::with_capacity(COMMON_LEN as usize);
        let mut put = |bytes: &[u8]| image.extend_from_slice(bytes);
        put(&registers.device_feature_select.to_le_bytes());
        put(&Registers::half(self.offered(), registers.device_feature_select).to_le_bytes());
        put(&registers.driver_feature_select.to_le_bytes());
        put(&Registers::half(registers.features, registers.driver_feature_select).to_le_bytes());
        put(&self.interrupt.config_vector().to_le_bytes());
        put(&(self.queues.len() as u16).to_le_bytes());
        // What changes by itself in a configuration here is two bytes at once: the generation, which
        // is for longer ones, is always the same.
        put(&[registers.status | needs_reset, 0]);
        put(&registers.queue_select.to_le_bytes());
        let (size, ready) = queue.map_or((0, false), |q| q.with_ring(|ring| (ring.size(), ring.ready())));
        put(&size.to_le_bytes());
        put(&queue.map_or(NO_VECTOR, VirtQueue::vector).to_le_bytes());
        put(&u16::from(ready).to_le_bytes());
        put(&registers.queue_select.to_le_bytes()); // its doorbell
        for part in [RingPart::Descriptors, RingPart::Available, RingPart::Used] {
            put(&queue.map_or(0, |q| q.address(part).0).to_le_bytes());
        }
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn write_common(&self, offset: usize, data: &[u8]) {
        let mut value = [0; 4];
        let Some(bytes) = value.get_mut(..data.len()) else {
            // Eight bytes at once are two registers.
            let (low, high) = data.split_at(4);
            self.write_common(offset, low);
            return self.write_common(offset + 4, high);
        };
        bytes.copy_from_slice(data);
        let value = u32::from_le_bytes(value);
        let mut inner = self.lock();
        let queue = self.queues.get(usize::from(inner.registers.queue_select));
        match (offset, data.len()) {
            (0x00, 4) => inner.registers.device_feature_select = value,
            (0x08, 4) => inner.registers.driver_feature_select = value,
            (0x0c, 4) => inner.registers.accept(value),
            (0x10, 2) => self.interrupt.set_config_vector(self.vector(value)),
            (0x14, 1) => self.set_status(&mut inner, value as u8),
            (0x16, 2) => inner.registers.queue_select = value as u16,
            (0x1a, 2) => {
                if let Some(queue) = queue {
                    queue.set_vector(self.vector(value));
                }
            }
            (at @ (0x18 | 0x1c | 0x20..0x38), len) => {
                // A queue that is in use no longer changes; only a reset frees it.
                if let Some(queue) = queue.filter(|q| !q.with_ring(|ring| ring.ready())) {
                    let high = at & 4 != 0;
                    match (at, len) {
                        (0x18, 2) => queue.with_ring(|ring| ring.set_size(value as u16)),
                        (0x1c, 2) if value == 1 => {
                            queue.with_ring(|ring| ring.set_ready(true));
                            if inner.registers.status & DRIVER_OK != 0 {
                                self.activate(&inner.registers);
                            }
                        }
                        (0x20 | 0x24, 4) => queue.set_address(RingPart::Descriptors, high, value),
                        (0x28 | 0x2c, 4) => queue.set_address(RingPart::Available, high, value),
                        (0x30 | 0x34, 4) => queue.set_address(RingPart::Used, high, value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    /// A vector that the driver chose, or none if there is no such vector: it reads that back.
    fn vector(&self, value: u32) -> u16 {
        if value < u32::from(self.msix.vectors()) { value as u16 } else { NO_VECTOR }
    }

    /// What of the BAR the window in configuration space shows; `None` unless the driver set it up.
    fn window(&self) -> Option<(u64, usize)> {
        let inner = self.lock();
        let (bar, offset) = (inner.config.u16_at(self.pci_access + 4) & 0xff, self.pci_access + 8);
        let (offset, len) = (inner.config.u32_at(offset), inner.config.u32_at(offset + 4));
        let fits = offset.checked_add(len).is_some_and(|end| end <= BAR_LEN);
        (bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && fits)
            .then_some((u64::from(offset), len as usize))
    }

    fn window_data(&self) -> Range<usize> {
        self.pci_access + 16..self.pci_access + 20
    }

    /// Stops the device's threads from touching guest RAM.
    pub fn pause(&self) {
        self.queues.iter().for_each(VirtQueue::pause);
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.queues.iter().for_each(VirtQueue::resume);
    }

    /// Tells the network, and the driver, that the guest is here.
    pub fn announce(&self) {
        if self.device.announce() {
            self.interrupt.config();
        }
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
            registers: inner.registers.clone(),
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
        inner.registers = state.registers.clone();
        self.place(&mut inner);
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
            self.place(&mut inner);
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
        let offset = address.checked_sub(self.lock().mapped?)?;
        (offset < u64::from(BAR_LEN)).then_some(offset)
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let within = offset as usize % PART_LEN as usize;
        match offset as u32 & !(PART_LEN - 1) {
            COMMON => self.read_common(within, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE => self.device.read_config(within as u64, data),
            MSIX_TABLE => self.msix.read_table(within, data),
            MSIX_PENDING => self.msix.read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        let within = offset as usize % PART_LEN as usize;
        match offset as u32 & !(PART_LEN - 1) {
            COMMON => self.write_common(within, data),
            DEVICE => self.device.write_config(within as u64, data),
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
    if configs.len() > pci::MOST_FUNCTIONS {
        return Err(Error::DeviceCount { wanted: configs.len(), most: pci::MOST_FUNCTIONS });
    }
    configs
        .iter()
        .zip(0..)
        .map(|(config, index)| {
            VirtioFunction::new(index, config.build(local)?, platform.clone(), memory).map(Arc::new)
        })
        .collect()
}
