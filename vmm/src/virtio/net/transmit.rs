//! Frames from the guest to the tap.

use super::tap::{Tap, vector};
use super::{HEADER, MAX_FRAME};
use crate::virtio::queue::{LockedQueue, QueueError, WaitFor};
use vm_memory::GuestMemoryBackend;

/// Most parts of memory that one system call takes.
const MAX_PARTS: usize = libc::UIO_MAXIOV as usize;

/// Sends what there is. A frame that the tap does not take, or that is none, is lost: drivers have
/// no use for an answer.
pub fn transmit(tap: &Tap, index: usize, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
    let memory = queue.memory();
    let mut vectors = Vec::new();
    while let Some(mut chain) = queue.pop()? {
        let mut len = 0;
        vectors.clear();
        for buffer in chain.by_ref().filter(|descriptor| !descriptor.is_write_only()) {
            for slice in GuestMemoryBackend::get_slices(memory, buffer.addr(), buffer.len() as usize) {
                let slice = slice.map_err(|_| QueueError::OUTSIDE)?;
                len += slice.len();
                vectors.push(vector(slice.ptr_guard().as_ptr(), slice.len()));
            }
            if vectors.len() > MAX_PARTS {
                break;
            }
        }
        if vectors.len() <= MAX_PARTS && (HEADER..=HEADER + MAX_FRAME).contains(&len) {
            // SAFETY: each vector is a part of guest RAM, which `memory` keeps mapped; the kernel
            // expects that it changes meanwhile.
            unsafe { tap.write(index, &vectors) };
        }
        queue.add_used(chain.head_index(), 0)?;
    }
    Ok(WaitFor::Buffers)
}
