//! Frames from the tap into the guest's buffers.
//!
//! The length of a frame is known only once it has been read. So a frame is read only when there is
//! room for the longest one: as many chains as that takes if the guest has accepted mergeable buffers,
//! which let a frame span several chains, and otherwise one chain, which such a guest makes long enough.
//! Chains that the frame did not need stay for the next one, and go back to the available ring when
//! there is none.

use super::tap::{Tap, vector};
use super::{ETHERNET_HEADER, HEADER, MAX_FRAME};
use crate::memory::{GuestMemory, Slice};
use crate::virtio::queue::{Chain, LockedQueue, QueueError, WaitFor};
use std::collections::VecDeque;
use std::mem::offset_of;
use virtio_bindings::virtio_net::virtio_net_hdr_v1;
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

/// Most parts of memory that one system call takes, but for the one after the guest's.
const MAX_PARTS: usize = libc::UIO_MAXIOV as usize - 1;
/// Where the header says how many chains a frame spans.
const NUM_BUFFERS: usize = offset_of!(virtio_net_hdr_v1, num_buffers);

/// How frames are received, by what the guest has negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveConfig {
    /// A frame may span several chains.
    pub mergeable: bool,
    /// Bytes of the longest frame, with its header.
    pub longest: usize,
}

impl ReceiveConfig {
    /// For frames of `mtu` bytes beside their hardware header, or for TCP segments that are still to be cut
    /// into such frames.
    pub fn new(mergeable: bool, unsegmented: bool, mtu: u16) -> Self {
        let frame = if unsegmented { MAX_FRAME } else { usize::from(mtu) + ETHERNET_HEADER };
        ReceiveConfig { mergeable, longest: HEADER + frame }
    }
}

/// Chains to read into.
#[derive(Default)]
struct ReceiveBuffers<'m> {
    /// Their heads, and how many parts of memory each has.
    chains: VecDeque<(u16, usize)>,
    parts: VecDeque<Slice<'m>>,
    len: usize,
}

impl<'m> ReceiveBuffers<'m> {
    fn add(&mut self, memory: &'m GuestMemory, chain: &mut Chain<'m>) -> Result<(), QueueError> {
        let before = self.parts.len();
        for buffer in chain.by_ref() {
            if !buffer.is_write_only() {
                return Err(QueueError::Request("a receive buffer cannot be written"));
            }
            for slice in GuestMemoryBackend::get_slices(memory, buffer.addr(), buffer.len() as usize) {
                let slice = slice.map_err(|_| QueueError::OUTSIDE)?;
                self.len += slice.len();
                self.parts.push_back(slice);
            }
            if self.parts.len() > MAX_PARTS {
                return Err(QueueError::Request("a receive buffer is in too many parts"));
            }
        }
        self.chains.push_back((chain.head_index(), self.parts.len() - before));
        Ok(())
    }

    fn is_enough(&self, config: ReceiveConfig) -> bool {
        if config.mergeable { self.len >= config.longest } else { !self.chains.is_empty() }
    }

    /// Marks what the kernel wrote through bare addresses: the first `len` bytes.
    fn mark(&self, mut len: usize) {
        for part in &self.parts {
            let written = part.len().min(len);
            part.bitmap().mark_dirty(0, written);
            len -= written;
            if len == 0 {
                break;
            }
        }
    }

    /// Writes into the header.
    fn write(&self, mut at: usize, mut bytes: &[u8]) {
        for part in &self.parts {
            if at >= part.len() {
                at -= part.len();
                continue;
            }
            let Ok(place) = part.offset(at) else { return };
            let count = place.len().min(bytes.len());
            place.copy_from(&bytes[..count]);
            (at, bytes) = (0, &bytes[count..]);
            if bytes.is_empty() {
                return;
            }
        }
    }

    /// The chains that `len` bytes fill: their heads, and how much is in each.
    fn filled(&self, mut len: usize, filled: &mut Vec<(u16, u32)>) {
        filled.clear();
        let mut parts = self.parts.iter();
        for (head, count) in &self.chains {
            if len == 0 {
                break;
            }
            let room: usize = parts.by_ref().take(*count).map(|part| part.len()).sum();
            let written = room.min(len);
            // A frame has less than 4 GiB.
            filled.push((*head, written as u32));
            len -= written;
        }
    }

    /// Takes the first `count` chains away.
    fn remove(&mut self, count: usize) {
        let parts: usize = self.chains.drain(..count).map(|(_, parts)| parts).sum();
        self.len -= self.parts.drain(..parts).map(|part| part.len()).sum::<usize>();
    }
}

/// Reads frames as long as there are frames, and room for them.
pub fn receive(
    tap: &Tap,
    index: usize,
    config: ReceiveConfig,
    queue: &mut LockedQueue<'_>,
) -> Result<WaitFor, QueueError> {
    let memory = queue.memory();
    let mut buffers = ReceiveBuffers::default();
    let mut filled = Vec::new();
    let mut vectors = Vec::new();
    let mut more = [0u8; 1];
    let next = loop {
        while !buffers.is_enough(config) {
            match queue.pop()? {
                Some(mut chain) => buffers.add(memory, &mut chain)?,
                None => break,
            }
        }
        if !buffers.is_enough(config) {
            break WaitFor::Buffers;
        }
        // Frames that are too long are dropped, as long as they come, without a further chain being taken.
        if queue.is_wanted() {
            break WaitFor::Input;
        }
        // What does not fit shows by the byte that follows.
        let after = vector(more.as_mut_ptr(), more.len());
        let parts = buffers.parts.iter().map(|part| vector(part.ptr_guard_mut().as_ptr(), part.len()));
        vectors.clear();
        vectors.extend(parts.chain([after]));
        // SAFETY: each vector is a part of guest RAM, which `memory` keeps mapped and into which no
        // reference exists, but for the last, which is a byte of our own that nobody reads.
        let read = unsafe { tap.read(index, &vectors) };
        let len = match read {
            Ok(None) => break WaitFor::Input,
            Ok(Some(len)) => len,
            Err(_) => {
                // A call that failed may have written in part.
                buffers.mark(buffers.len);
                break WaitFor::Input;
            }
        };
        // After the write, so that whoever clears the mark in between sees it.
        buffers.mark(len);
        if len > buffers.len || len < HEADER {
            continue;
        }
        buffers.filled(len, &mut filled);
        buffers.write(NUM_BUFFERS, &(filled.len() as u16).to_le_bytes());
        buffers.remove(filled.len());
        queue.add_used_all(&filled)?;
    };
    queue.undo_pop(buffers.chains.len() as u16);
    Ok(next)
}
