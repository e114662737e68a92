//! Frames from the tap into the guest's buffers.
//!
//! How long the next frame is, nobody knows before it has been read. So it is read only when there
//! is room for the longest one: as many chains as that takes when the guest has agreed that a frame
//! may be spread over several of them (mergeable buffers), or else one, which such a guest makes
//! long enough. Chains that the frame did not need stay for the next one, and go back to the ring
//! when there is none.

use super::tap::{Tap, vector};
use super::{HEADER, MAX_FRAME};
use crate::memory::{GuestMemory, Slice};
use crate::virtio::queue::{Chain, LockedQueue, QueueError, WaitFor};
use std::collections::VecDeque;
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

/// Most parts of memory that one system call takes, but for the one after the guest's.
const MAX_PARTS: usize = libc::UIO_MAXIOV as usize - 1;
/// Where the header says over how many chains a frame is spread.
const CHAINS_AT: usize = 10;

/// What the guest has agreed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// A frame may be spread over several chains.
    pub mergeable: bool,
    /// Bytes of the longest frame, with its header.
    pub longest: usize,
}

impl Terms {
    /// Terms with frames of `mtu` bytes beside their hardware header, or with such as are yet to be
    /// cut up.
    pub fn new(mergeable: bool, uncut: bool, mtu: u16) -> Self {
        let frame = if uncut { MAX_FRAME } else { usize::from(mtu) + 18 };
        Terms { mergeable, longest: HEADER + frame }
    }
}

/// Chains to read into.
#[derive(Default)]
struct Room<'m> {
    /// Their heads, and how many parts of memory each has.
    chains: VecDeque<(u16, usize)>,
    parts: VecDeque<Slice<'m>>,
    len: usize,
}

impl<'m> Room<'m> {
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

    fn is_enough(&self, terms: Terms) -> bool {
        if terms.mergeable { self.len >= terms.longest } else { !self.chains.is_empty() }
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
    terms: Terms,
    queue: &mut LockedQueue<'_>,
) -> Result<WaitFor, QueueError> {
    let memory = queue.memory();
    let mut room = Room::default();
    let mut filled = Vec::new();
    let mut vectors = Vec::new();
    let mut more = [0u8; 1];
    let next = loop {
        while !room.is_enough(terms) {
            match queue.pop()? {
                Some(mut chain) => room.add(memory, &mut chain)?,
                None => break,
            }
        }
        if !room.is_enough(terms) {
            break WaitFor::Buffers;
        }
        // What does not fit shows by the byte that follows.
        let after = vector(more.as_mut_ptr(), more.len());
        let parts = room.parts.iter().map(|part| vector(part.ptr_guard_mut().as_ptr(), part.len()));
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
                room.mark(room.len);
                break WaitFor::Input;
            }
        };
        // After the write, so that whoever clears the mark in between sees it.
        room.mark(len);
        if len > room.len || len < HEADER {
            continue;
        }
        room.filled(len, &mut filled);
        room.write(CHAINS_AT, &(filled.len() as u16).to_le_bytes());
        room.remove(filled.len());
        queue.add_used_all(&filled)?;
    };
    queue.undo_pop(room.chains.len() as u16);
    Ok(next)
}
