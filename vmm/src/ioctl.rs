//! The KVM calls that kvm-ioctls does not have on x86, and those that it has only in a form that
//! allocates on every call; and the error that every refused KVM call becomes.

use crate::retry::retry;
use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_io_nr!(KVM_GET_API_VERSION, KVMIO, 0x00);
ioctl_io_nr!(KVM_CHECK_EXTENSION, KVMIO, 0x03);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// KVM refused a call.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused {call}: {source}")]
pub struct KvmError {
    /// The call.
    pub call: &'static str,
    /// What it said.
    pub source: io::Error,
}

/// Names the KVM call that failed.
pub(crate) trait KvmContext<T> {
    /// Turns the error into a [`KvmError`] that names `call`.
    fn context(self, call: &'static str) -> Result<T, KvmError>;
}

impl<T> KvmContext<T> for Result<T, kvm_ioctls::Error> {
    fn context(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError { call, source: io::Error::from_raw_os_error(error.errno()) })
    }
}

impl<T> KvmContext<T> for io::Result<T> {
    fn context(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError { call, source })
    }
}

/// Makes a KVM call, again for as long as a signal interrupts it, and names it in its error.
///
/// The kernel gives up calls that take locks or wait (making a VM, a slot, an interrupt controller) when
/// a signal is pending, and has changed nothing then. All of kvm-ioctls' calls are made through this, which
/// `clippy.toml` holds; the functions below see to it themselves. KVM_RUN is not: there, being interrupted
/// means something.
macro_rules! retried {
    ($call:literal, $make:expr) => {{
        #[allow(clippy::disallowed_methods)] // only here
        let make = || $make;
        $crate::ioctl::call($call, make)
    }};
}
pub(crate) use retried;

/// What [`retried`] does.
pub(crate) fn call<T, R: KvmContext<T>>(
    call: &'static str,
    mut make: impl FnMut() -> R,
) -> Result<T, KvmError> {
    loop {
        match make().context(call) {
            Err(error) if error.source.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The version of KVM's interface.
pub fn api_version(kvm: &Kvm) -> Result<libc::c_int, KvmError> {
    // SAFETY: the call takes no argument.
    retry!(unsafe { ioctl_with_val(kvm, KVM_GET_API_VERSION(), 0) }).context("KVM_GET_API_VERSION")
}

/// What KVM, or one of its machines, says of a capability: 0 if it has it not.
pub fn capability(kvm_or_vm: &impl AsRawFd, capability: u32) -> Result<u32, KvmError> {
    // SAFETY: the call takes a number.
    retry!(unsafe { ioctl_with_val(kvm_or_vm, KVM_CHECK_EXTENSION(), capability.into()) })
        .map(|value| value as u32)
        .context("KVM_CHECK_EXTENSION")
}

/// A file with what KVM counts of a vCPU.
pub fn get_stats(vcpu: &VcpuFd) -> Result<File, KvmError> {
    // SAFETY: the call takes no argument.
    let fd = retry!(unsafe { ioctl_with_val(vcpu, KVM_GET_STATS_FD(), 0) }).context("KVM_GET_STATS_FD")?;
    // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Reads slot `slot`'s dirty log into `words`, which must have a bit for every page of the slot.
pub fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, words: &mut [u64]) -> io::Result<()> {
    if (words.len() as u64) < pages.div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut log = kvm_dirty_log { slot, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
    // SAFETY: the kernel writes one bit per page of the slot, rounded up to 64, and the length of
    // `words` was checked against that above.
    retry!(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) }).map(drop)
}

/// Clears pages `first_page..first_page + pages` of slot `slot` where `words` has a bit set.
/// `first_page` is a multiple of 64; `pages` is one, or reaches the slot's end.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()> {
    if (words.len() as u64) < u64::from(pages).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut log = kvm_clear_dirty_log { slot, num_pages: pages, first_page, ..Default::default() };
    // The kernel only reads through this pointer; the union declares it writable for all users.
    log.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
    // SAFETY: the kernel reads `pages` bits, rounded up to 64, which `words` was checked to hold.
    retry!(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) }).map(drop)
}

/// Reads a vCPU's extended state. `area` must be as long as KVM_CAP_XSAVE2 says, at least 4096.
pub fn get_xsave(vcpu: &VcpuFd, area: &mut [u8], reported: usize) -> io::Result<()> {
    if area.len() < reported.max(size_of::<kvm_xsave>()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let request = if reported > 0 { KVM_GET_XSAVE2() } else { KVM_GET_XSAVE() };
    // SAFETY: KVM_GET_XSAVE writes 4096 bytes and KVM_GET_XSAVE2 as many as the capability
    // reported; `area` was checked to be that long.
    retry!(unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) }).map(drop)
}

/// Restores a vCPU's extended state. `area` is as for [`get_xsave`].
pub fn set_xsave(vcpu: &VcpuFd, area: &[u8], reported: usize) -> io::Result<()> {
    if area.len() < reported.max(size_of::<kvm_xsave>()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel reads at most as many bytes as KVM_CAP_XSAVE2 reported, and `area` was
    // checked to be that long.
    retry!(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) }).map(drop)
}

fn tsc_offset_attr(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: u64::from(kvm_bindings::KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
        flags: 0,
    }
}

/// A vCPU's TSC offset: guest TSC minus (scaled) host TSC. Fails on kernels before 5.16.
pub fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: for this attribute the kernel writes eight bytes to `addr`, which is `offset`.
    retry!(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(offset)
}

/// Sets a vCPU's TSC offset.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: for this attribute the kernel reads eight bytes from `addr`, which is `offset`.
    retry!(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) }).map(drop)
}
