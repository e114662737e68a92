//! How a device tells its driver that something happened.

use super::queue::NO_VECTOR;
use crate::pci::msix::Msix;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

/// In the ISR: a queue has something.
const ISR_QUEUE: u8 = 1;
/// In the ISR: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// What a device's queues and its transport share to interrupt the guest.
pub struct Interrupt {
    msix: Arc<Msix>,
    isr: AtomicU8,
    config_vector: AtomicU16,
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// Interrupts by this table.
    pub fn new(msix: Arc<Msix>) -> Self {
        Interrupt {
            msix,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            needs_reset: AtomicBool::new(false),
        }
    }

    /// Chains were given back on a queue with this vector.
    pub fn queue(&self, vector: u16) {
        if !self.msix.signal(vector) {
            self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        }
    }

    /// The device's configuration changed.
    pub fn config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix.signal(self.config_vector());
    }

    /// The driver did something that only a reset ends.
    pub fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.config();
        }
    }

    /// Whether only a reset helps.
    pub fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The vector of [`config`](Self::config).
    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// Sets that vector.
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(vector, Ordering::Relaxed);
    }

    /// Reads the ISR, which clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The ISR, to be saved.
    pub fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    /// Restores all of it.
    pub fn set(&self, isr: u8, config_vector: u16, needs_reset: bool) {
        self.isr.store(isr, Ordering::Release);
        self.set_config_vector(config_vector);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }
}
