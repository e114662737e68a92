//! KVM's memory slots: guest RAM as the guest's CPUs find it. Each of the guest's regions of RAM is the slot
//! of its number.

use super::GuestRam;
use crate::ioctl::{self, KvmError};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// Sets the slot of region number `region`, with or without dirty logging.
pub(crate) fn set(vm: &VmFd, ram: &GuestRam, region: usize, flags: u32) -> Result<(), KvmError> {
    let region_info = &ram.ram().regions()[region];
    let slot = kvm_userspace_memory_region {
        slot: region as u32,
        flags,
        guest_phys_addr: region_info.layout().guest_address,
        memory_size: region_info.len(),
        userspace_addr: region_info.address() as u64,
    };
    ioctl::retried!("KVM_SET_USER_MEMORY_REGION", {
        // SAFETY: the range is a whole mapping of guest RAM, which the machine keeps for longer than
        // any vCPU can run; nobody holds references into it.
        unsafe { vm.set_user_memory_region(slot) }
    })
}

/// Sets the slots of all regions, without dirty logging.
pub(crate) fn set_all(vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
    (0..ram.guest_regions()).try_for_each(|region| set(vm, ram, region, 0))
}
