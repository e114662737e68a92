//! Warming the machine's memory up.
//!
//! In a virtual machine, memory that was never touched since the machine started has yet to be found by its
//! host: the first touch of it costs many times what a later one does. Whoever runs first would pay for all.
//! Where free memory is handed back to the host (free page reporting), what was warm grows cold again within
//! a minute, so it has to be done before every run, and alike for all that are compared.

use anyhow::Context;
use std::thread;

/// Pieces that threads populate at once.
const PIECE: usize = 64 << 20;

/// Linux 5.14; libc has it only for some targets.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// Touches `bytes` of memory that was free, at once, and frees it again.
///
/// # Errors
/// When there is not so much.
pub fn up(bytes: u64) -> anyhow::Result<()> {
    let available = vmm::memory::host::available().unwrap_or(u64::MAX);
    anyhow::ensure!(
        bytes < available,
        "the runs need {} MiB of memory at once and {} MiB are available; use a smaller --memory",
        bytes >> 20,
        available >> 20
    );
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
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let address = start as usize;
    let populated = thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|first| scope.spawn(move || populate(address, len, first, threads))).collect();
        workers.into_iter().all(|worker| worker.join().unwrap_or(false))
    });
    // SAFETY: the mapping made above, which nobody refers to any more.
    unsafe { libc::munmap(start, len) };
    anyhow::ensure!(populated, "cannot touch {} MiB of memory", bytes >> 20);
    Ok(())
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
