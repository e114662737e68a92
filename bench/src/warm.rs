//! Warming the machine's memory up.
//!
//! In a virtual machine, memory that was never touched since the machine started has yet to be found by its
//! host: the first touch of it costs many times what a later one does. Whoever runs first would pay for all.
//! Where free memory is handed back to the host (free page reporting), what was warm grows cold again within
//! seconds: too soon to warm it up before a run in which a source has gibibytes to fill first. What the
//! destination will need is therefore *held* until data has begun to arrive there, which is the same moment for all
//! that are compared. On a host without a hypervisor below it, memory that some process frees is warm for the
//! next one; so it is here, then.

use anyhow::Context;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use vmm::memory::host;

/// Pieces that threads populate at once.
const PIECE: usize = 64 << 20;

/// Between two looks at whether data arrives: a hundredth of what moving a few gibibytes takes.
const STEP: Duration = Duration::from_millis(10);

/// What a destination has when data arrives there, and not before.
const ARRIVED: u64 = 16 << 20;

/// Linux 5.14; libc has it only for some targets.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// Runs `work`, which needs `bytes` of memory, with that memory warm.
///
/// Where the work first fills `source` of these bytes as shared memory and then moves them, as much is kept out of the
/// way until then, or what there is room for beside the work. 0 for other work.
///
/// # Errors
/// When there is not so much memory; what the work returns.
pub fn run<T>(bytes: u64, source: u64, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let available = host::available().unwrap_or(u64::MAX);
    anyhow::ensure!(
        bytes < available,
        "the runs need {} MiB of memory at once and {} MiB are available; use a smaller --memory",
        bytes >> 20,
        available >> 20
    );
    let hold = source.min(available - bytes);
    let held = (hold > 0).then(|| Warm::up(hold)).transpose()?;
    drop(Warm::up(bytes - hold)?);
    let arrived = host::shared().unwrap_or(0) + source + ARRIVED;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| held.map(|held| held.until_shared(arrived, &over)));
        let result = work();
        over.store(true, Ordering::Relaxed);
        result
    })
}

/// Memory that has been touched, and is free again when this is dropped.
struct Warm {
    address: usize,
    len: usize,
}

impl Warm {
    fn up(bytes: u64) -> anyhow::Result<Self> {
        let len = bytes as usize;
        // SAFETY: a new private mapping where the kernel likes it; nothing existing is replaced.
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
        let warm = Warm { address, len };
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

    /// Keeps the memory until there are `enough` bytes of shared memory, or the work is over.
    fn until_shared(self, enough: u64, over: &AtomicBool) {
        while !over.load(Ordering::Relaxed) && host::shared().is_some_and(|shared| shared < enough) {
            thread::sleep(STEP);
        }
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        // SAFETY: the mapping that `up` made, to which nothing refers any more.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.len) };
    }
}

/// Populates every `threads`th piece from number `first` on.
fn populate(address: usize, len: usize, first: usize, threads: usize) -> bool {
    (0..len).step_by(PIECE).skip(first).step_by(threads).all(|offset| {
        let piece = PIECE.min(len - offset);
        // SAFETY: the piece lies inside the caller's mapping, which outlives the call; the advice
        // faults pages in and changes no content.
        unsafe { libc::madvise((address + offset) as *mut libc::c_void, piece, MADV_POPULATE_WRITE) == 0 }
    })
}
