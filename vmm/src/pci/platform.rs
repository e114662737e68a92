//! What a function needs of the machine around it.

use crate::ioctl::{self, KvmError};
use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// What a function needs of the machine around it.
pub trait Platform: Send + Sync {
    /// Sends an interrupt message. When it returns, the interrupt is in the guest's APIC.
    fn send_message(&self, address: u64, data: u32);

    /// From here on a guest's write of any length to `address` adds one to `doorbell` instead of
    /// coming to the function.
    ///
    /// # Errors
    /// [`KvmError`].
    fn add_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError>;

    /// Undoes [`add_doorbell`](Self::add_doorbell).
    fn remove_doorbell(&self, address: u64, doorbell: &EventFd);
}

/// KVM as the platform.
pub struct KvmPlatform(pub Arc<VmFd>);

impl Platform for KvmPlatform {
    fn send_message(&self, address: u64, data: u32) {
        let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
        // A message that no APIC takes (a guest may write any address) is lost, as on hardware.
        let message = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        let _ = ioctl::retried!("KVM_SIGNAL_MSI", self.0.signal_msi(message));
    }

    fn add_doorbell(&self, address: u64, doorbell: &EventFd) -> Result<(), KvmError> {
        let at = IoEventAddress::Mmio(address);
        ioctl::retried!("KVM_IOEVENTFD", self.0.register_ioevent(doorbell, &at, NoDatamatch))
    }

    fn remove_doorbell(&self, address: u64, doorbell: &EventFd) {
        // Fails only for what is not there.
        let at = IoEventAddress::Mmio(address);
        let _ = ioctl::retried!("KVM_IOEVENTFD", self.0.unregister_ioevent(doorbell, &at, NoDatamatch));
    }
}
