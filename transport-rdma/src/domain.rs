//! A protection domain: one session's memory and queue pairs on one device.
//!
//! A key is good only on queue pairs of its own domain. Every session has a domain of its own, so the keys
//! that it hands out are scoped to it: another session's source, even on the same device and with the same
//! numbers, is refused by the card.

use crate::api::Api;
use crate::cm::{CmId, EventChannel};
use crate::device::Abilities;
use crate::unavailable;
use migration::memory::{Extent, Ram};
use migration::transport::PlaneError;
use rdma_sys::*;
use std::any::Any;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A session's protection domain.
pub(crate) struct ProtectionDomain {
    api: &'static Api,
    raw: NonNull<ibv_pd>,
    abilities: Abilities,
    /// Cleared when the device turns a registration without pinning down.
    on_demand: AtomicBool,
    /// Keeps the device open: librdmacm opens it for the first identifier on it and may close it after the
    /// last. Nothing else uses this one.
    anchor: CmId,
}

// SAFETY: verbs on a domain are thread-safe; the pointer is valid until `drop`, which needs the last owner.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for Send.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// A domain on the device that has the address `ip`. With `on_demand`, memory is not pinned where the
    /// device can do without.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when no device has that address or it lacks something.
    pub(crate) fn open(
        channel: &Arc<EventChannel>,
        ip: IpAddr,
        on_demand: bool,
    ) -> Result<Arc<ProtectionDomain>, PlaneError> {
        let api = channel.api();
        let anchor = CmId::new(channel).map_err(|e| unavailable::no_rdma(&e))?;
        anchor.bind(SocketAddr::new(ip, 0)).map_err(|e| unavailable::not_on_a_device(ip, &e))?;
        let context = anchor.context();
        if context.is_null() {
            return Err(unavailable::not_on_a_device(ip, &io::Error::from_raw_os_error(libc::ENODEV)));
        }
        // SAFETY: the anchor is bound to a device, whose context and port these are.
        let abilities = unsafe { Abilities::of(api, context, anchor.port()) }
            .map_err(|e| unavailable::resource("asking the RDMA device what it can do", e))?;
        // SAFETY: the context stays open while the anchor lives, and the domain holds it.
        let raw = NonNull::new(unsafe { (api.ibv_alloc_pd)(context) })
            .ok_or_else(|| unavailable::resource("making a protection domain", io::Error::last_os_error()))?;
        let on_demand = AtomicBool::new(on_demand && abilities.on_demand);
        Ok(Arc::new(ProtectionDomain { api, raw, abilities, on_demand, anchor }))
    }

    pub(crate) fn api(&self) -> &'static Api {
        self.api
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    pub(crate) fn context(&self) -> *mut ibv_context {
        self.anchor.context()
    }

    pub(crate) fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    /// Whether guest memory is registered without pinning it.
    pub(crate) fn on_demand(&self) -> bool {
        self.on_demand.load(Ordering::Relaxed)
    }

    /// Registers guest RAM, to be written from (`remote` false) or to be written to by the peer (true). The
    /// peer addresses it by offsets into the region, so that it learns no address of this process.
    ///
    /// Without on-demand paging this makes all pages of the extent exist and pins them.
    pub(crate) fn register_ram(
        self: &Arc<Self>,
        ram: &Arc<Ram>,
        extent: &Extent,
        remote: bool,
    ) -> io::Result<MemoryRegion> {
        let address = ram.address(extent).map_err(io::Error::other)?;
        let memory: Arc<dyn Any + Send + Sync> = Arc::clone(ram) as _;
        // Writes by the peer need local write access; reading by the card needs no access flag at all.
        let access = if remote {
            ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0 | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
        } else {
            0
        };
        if self.on_demand() {
            let access = access | ibv_access_flags::IBV_ACCESS_ON_DEMAND.0;
            // SAFETY: `Ram::address` has checked that all of the extent is mapped, for as long as `ram`
            // lives.
            let tried = unsafe {
                self.register(address, extent.len as usize, extent.offset, access, Arc::clone(&memory))
            };
            match tried {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                    // Some devices refuse some memory, such as huge pages. Pinning works for all.
                    self.on_demand.store(false, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        // SAFETY: as above.
        unsafe { self.register(address, extent.len as usize, extent.offset, access, memory) }
    }

    /// Registers memory under addresses that begin at `iova`.
    ///
    /// # Safety
    /// `address..address + len` must be mapped, readable (and writable, if `access` lets anybody write), and
    /// used by nobody as anything but raw bytes, for as long as `memory` lives.
    pub(crate) unsafe fn register(
        self: &Arc<Self>,
        address: *mut u8,
        len: usize,
        iova: u64,
        access: u32,
        memory: Arc<dyn Any + Send + Sync>,
    ) -> io::Result<MemoryRegion> {
        // SAFETY: the domain is valid and outlives the region, which holds it; the caller vouches for the
        // memory, which the region holds as well.
        let raw = unsafe { (self.api.ibv_reg_mr_iova)(self.raw(), address.cast(), len, iova, access as i32) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(MemoryRegion { raw, domain: Arc::clone(self), _memory: memory })
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs hold the domain, so none is left.
        unsafe { (self.api.ibv_dealloc_pd)(self.raw()) };
    }
}

/// Registered memory. The card may use it until this is dropped, which can take as long as pinning did.
pub(crate) struct MemoryRegion {
    raw: NonNull<ibv_mr>,
    domain: Arc<ProtectionDomain>,
    /// Only held: keeps the memory mapped until it is no longer registered.
    _memory: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the struct only hands out numbers that never change; deregistration is thread-safe.
unsafe impl Send for MemoryRegion {}
// SAFETY: as for Send.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// The key for this side's work requests.
    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: valid until `drop`.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// The key for the peer's.
    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: valid until `drop`.
        unsafe { (*self.raw.as_ptr()).rkey }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: the region is valid and nobody uses it any more. It fails only where the device is gone,
        // and with it the registration.
        unsafe { (self.domain.api.ibv_dereg_mr)(self.raw.as_ptr()) };
    }
}
