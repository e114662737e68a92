//! A platform without KVM, for tests of registers: it remembers what it was told.

use super::Platform;
use crate::ioctl::KvmError;
use std::sync::Mutex;
use vmm_sys_util::eventfd::EventFd;

#[derive(Default)]
pub(crate) struct Recorder {
    messages: Mutex<Vec<(u64, u32)>>,
    doorbells: Mutex<Vec<u64>>,
}

impl Recorder {
    /// All messages sent so far.
    pub fn messages(&self) -> Vec<(u64, u32)> {
        self.messages.lock().unwrap().clone()
    }

    /// Where doorbells are now.
    pub fn doorbells(&self) -> Vec<u64> {
        self.doorbells.lock().unwrap().clone()
    }
}

impl Platform for Recorder {
    fn send_message(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }

    fn add_doorbell(&self, address: u64, _: &EventFd) -> Result<(), KvmError> {
        self.doorbells.lock().unwrap().push(address);
        Ok(())
    }

    fn remove_doorbell(&self, address: u64, _: &EventFd) {
        self.doorbells.lock().unwrap().retain(|at| *at != address);
    }
}
