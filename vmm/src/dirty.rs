//! Which pages were written: KVM's log of vCPU writes and the VMM's own, as one.
//!
//! With manual protection KVM's log is read without being reset, and pages are re-armed range by
//! range just before they are read: a page is write-protected for as short a time as can be, and
//! starting to track write-protects nothing at all, since every page counts as dirty at first.

use crate::error::Error;
use crate::ioctl::{self, KvmContext, KvmError};
use crate::lock::lock;
use crate::memory::{GuestRam, slot};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use migration::dirty::DirtySet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Dirty tracking of one machine.
pub(crate) struct DirtyTracking {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    /// What KVM answered last, before it is merged: it overwrites, and the caller wants an OR.
    /// Allocated when tracking starts, one word per 64 pages of the largest region.
    scratch: Mutex<Vec<u64>>,
    /// Whether tracking is on.
    on: Arc<AtomicBool>,
}

impl DirtyTracking {
    /// Sets the VM up for manual protection.
    ///
    /// # Errors
    /// [`Error::Capability`] on kernels before 5.7.
    pub fn new(vm: &Arc<VmFd>, ram: &Arc<GuestRam>) -> Result<Self, Error> {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let offered = ioctl::capability(&**vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)?;
        if offered & wanted != wanted {
            return Err(Error::Capability { what: "a manually protected dirty log (Linux 5.7)" });
        }
        let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = u64::from(wanted);
        ioctl::retried!("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", vm.enable_cap(&cap))?;
        Ok(DirtyTracking { vm: vm.clone(), ram: ram.clone(), scratch: Mutex::default(), on: Arc::default() })
    }

    /// Whether tracking is on, for those who look at it now and then. They are told before it starts.
    pub fn is_on(&self) -> Arc<AtomicBool> {
        self.on.clone()
    }

    /// Starts tracking; every page counts as dirty. Starting again starts afresh.
    pub fn start(&self) -> Result<(), KvmError> {
        let largest = self.ram.ram().regions().iter().map(|r| r.pages().div_ceil(64)).max().unwrap_or(0);
        let mut scratch = lock(&self.scratch);
        self.on.store(true, Ordering::Relaxed);
        *scratch = vec![0; largest as usize];
        if let Some(log) = self.ram.write_log(self.ram.guest_regions()) {
            // KVM knows nothing of the boot store.
            log.mark_all();
        }
        for region in 0..self.ram.guest_regions() {
            // Off and on again: KVM makes a new log, all set, only then.
            slot::set(&self.vm, &self.ram, region, 0)?;
            slot::set(&self.vm, &self.ram, region, KVM_MEM_LOG_DIRTY_PAGES)?;
            if let Some(log) = self.ram.write_log(region) {
                // Nothing is lost: KVM's log says "dirty" for every page from here on.
                log.reset();
            }
        }
        Ok(())
    }

    /// Stops tracking.
    pub fn stop(&self) -> Result<(), KvmError> {
        let mut scratch = lock(&self.scratch);
        *scratch = Vec::new();
        self.on.store(false, Ordering::Relaxed);
        slot::set_all(&self.vm, &self.ram)
    }

    /// Adds every page written since it was last cleared. Allocates nothing.
    pub fn collect(&self, set: &mut DirtySet) -> Result<(), KvmError> {
        let mut scratch = lock(&self.scratch);
        for (number, region) in self.ram.ram().regions().iter().enumerate().take(set.regions()) {
            let words = set.words_mut(number);
            if number < self.ram.guest_regions() {
                ioctl::get_dirty_log(&self.vm, number as u32, region.pages(), &mut scratch)
                    .context("KVM_GET_DIRTY_LOG")?;
                words.iter_mut().zip(scratch.iter()).for_each(|(out, word)| *out |= word);
            }
            if let Some(log) = self.ram.write_log(number) {
                log.merge_into(words);
            }
        }
        Ok(())
    }

    /// Clears the pages of `words`, whose first is page `first_page`, a multiple of 64.
    pub fn clear(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), KvmError> {
        let out_of_range = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let total = self.ram.ram().regions().get(region).map_or(0, |r| r.pages());
        let pages = total.saturating_sub(first_page).min(words.len() as u64 * 64);
        if pages == 0 || !first_page.is_multiple_of(64) {
            let call = "a range of pages to clear that lies outside guest memory";
            return Err(KvmError { call, source: out_of_range() });
        }
        // The VMM's own log first: a write between the two is then at worst sent twice.
        if let Some(log) = self.ram.write_log(region) {
            log.clear(first_page, words);
        }
        if region >= self.ram.guest_regions() {
            return Ok(());
        }
        let pages = u32::try_from(pages).map_err(|_| out_of_range()).context("KVM_CLEAR_DIRTY_LOG")?;
        ioctl::clear_dirty_log(&self.vm, region as u32, first_page, pages, words)
            .context("KVM_CLEAR_DIRTY_LOG")
    }
}
