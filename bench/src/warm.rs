//! Warms the machine's memory up before a run.
//!
//! In a virtual machine, the host allocates memory when the machine first touches it, so that a first touch
//! costs many times what a later one does. The contender that runs first would pay for all others.
//!
//! A machine that reports free pages to its host loses freed memory again within seconds. That is too soon if
//! the source must fill gibibytes before they move. The memory that the destination will need is therefore
//! *held* until data begins to arrive there, which is the same moment for all contenders.
//!
//! On a machine without a hypervisor below, memory that one process frees is warm for the next process
//! anyway.

use anyhow::Context;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use vmm::memory::host;

/// Bytes that a thread populates with one call.
const PIECE: usize = 64 << 20;

/// Time between two checks whether data arrives: a hundredth of the time that a few gibibytes need.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Shared memory in bytes that a destination has only after data has arrived.
const ARRIVED: u64 = 16 << 20;

/// From Linux 5.14; the libc crate has it for some targets only.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// Runs `work`, which needs `bytes` of memory, with that memory warm.
///
/// Work that fills `source` of these bytes as shared memory and then moves them has as much memory held for
/// it until the move begins, or as much as there is room for. `source` is 0 for other work.
///
/// # Errors
/// When the machine has less memory than that. Errors of the work are passed on.
pub fn run<T>(bytes: u64, source: u64, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let available = host::available().unwrap_or(u64::MAX);
    anyhow::ensure!(
        bytes < available,
        "the runs need {} MiB of memory at once and {} MiB are available; use a smaller --memory",
        bytes >> 20,
        available >> 20
    );
    let hold = source.min(available - bytes);
    let held = (hold > 0).then(|| WarmMemory::new(hold)).transpose()?;
    drop(WarmMemory::new(bytes - hold)?);
    let arrived = host::shared().unwrap_or(0) + source + ARRIVED;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| held.map(|held| held.hold_until_shared(arrived, &over)));
        let result = work();
        over.store(true, Ordering::Relaxed);
        result
    })
}

/// Memory that has been touched. Dropping it frees the memory.
struct WarmMemory {
    address: usize,
    len: usize,
}

impl WarmMemory {
    fn new(bytes: u64) -> anyhow::Result<Self> {
        let len = bytes as usize;
        // SAFETY: a new private mapping at an address that the kernel chooses, so it replaces nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("cannot map memory to warm up");
        }
        let address = start as usize;
        let warm = WarmMemory { address, len };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let populated = thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|first| scope.spawn(move || populate(address, len, first, threads)))
                .collect();
            workers.into_iter().all(|worker| worker.join().unwrap_or(false))
        });
        anyhow::ensure!(populated, "cannot touch {} MiB of memory", bytes >> 20);
        Ok(warm)
    }

    /// Holds the memory until the machine has `enough` bytes of shared memory or the work is over.
    fn hold_until_shared(self, enough: u64, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) && host::shared().is_some_and(|shared| shared < enough) {
            thread::sleep(POLL_INTERVAL);
        }
    }
}

impl Drop for WarmMemory {
    fn drop(&mut self) {
        // SAFETY: `new` made the mapping, and nothing refers to it any more.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len) };
    }
}

/// Populates every `threads`th piece, starting with piece `first`.
fn populate(address: usize, len: usize, first: usize, threads: usize) -> bool {
    (0..len).step_by(PIECE).skip(first).step_by(threads).all(|offset| {
        let piece = PIECE.min(len - offset);
        // SAFETY: the piece lies inside the caller's mapping, which outlives the call. The advice makes the
        // kernel allocate pages and changes no content.
        unsafe { libc::madvise((address + offset) as *mut libc::c_void, piece, MADV_POPULATE_WRITE) == 0 }
    })
}
