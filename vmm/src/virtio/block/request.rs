//! A request's buffers, however the guest has cut them up: a header of 16 bytes, data, and a byte
//! for the outcome.

pub use crate::memory::Slice;

use crate::memory::GuestMemory;
use crate::virtio::queue::{Broken, Chain};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestMemoryBackend};

const HEADER: usize = 16;
/// Length of a range to be discarded or zeroed, in a request that names several.
const RANGE: usize = 16;
/// Most ranges in one request.
pub const MOST_RANGES: usize = 32;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
    Identify,
    Discard,
    WriteZeroes,
    Unknown,
}

/// A range of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub sector: u64,
    pub sectors: u32,
    /// Its storage may be given back.
    pub unmap: bool,
    /// It has flags that nobody knows.
    pub strange: bool,
}

/// One request; used again for the next, so that its lists need not grow anew.
#[derive(Default)]
pub struct Request<'m> {
    readable: Vec<Slice<'m>>,
    writable: Vec<Slice<'m>>,
    outcome: Option<Slice<'m>>,
    pub sector: u64,
}

impl<'m> Request<'m> {
    /// Takes a chain apart.
    ///
    /// # Errors
    /// [`Broken::Request`] if a part is missing or outside RAM.
    pub fn parse(&mut self, memory: &'m GuestMemory, chain: &mut Chain<'m>) -> Result<Operation, Broken> {
        self.readable.clear();
        self.writable.clear();
        for buffer in chain {
            let list = if buffer.is_write_only() { &mut self.writable } else { &mut self.readable };
            let slices = GuestMemoryBackend::get_slices(memory, buffer.addr(), buffer.len() as usize);
            for slice in slices {
                list.push(slice.map_err(|_| Broken::Request("a buffer lies outside guest memory"))?);
            }
        }
        let mut header = [0; HEADER];
        if take_front(&mut self.readable, &mut header) != HEADER {
            return Err(Broken::Request("it has no header"));
        }
        self.outcome = take_last_byte(&mut self.writable);
        if self.outcome.is_none() {
            return Err(Broken::Request("it has no place for its outcome"));
        }
        let [kind, _, sector @ ..]: [[u8; 4]; 4] =
            std::array::from_fn(|word| std::array::from_fn(|byte| header[word * 4 + byte]));
        let [low, high] = sector.map(u32::from_le_bytes);
        self.sector = u64::from(low) | u64::from(high) << 32;
        Ok(match u32::from_le_bytes(kind) {
            VIRTIO_BLK_T_IN => Operation::Read,
            VIRTIO_BLK_T_OUT => Operation::Write,
            VIRTIO_BLK_T_FLUSH => Operation::Flush,
            VIRTIO_BLK_T_GET_ID => Operation::Identify,
            VIRTIO_BLK_T_DISCARD => Operation::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
            _ => Operation::Unknown,
        })
    }

    /// The data that goes to the disk.
    pub fn outgoing(&self) -> &[Slice<'m>] {
        &self.readable
    }

    /// Where data from the disk goes.
    pub fn incoming(&self) -> &[Slice<'m>] {
        &self.writable
    }

    /// How many bytes that is.
    pub fn incoming_len(&self) -> u64 {
        self.writable.iter().map(|slice| slice.len() as u64).sum()
    }

    /// The next of the ranges that the outgoing data names.
    pub fn next_range(&mut self) -> Option<Range> {
        let mut bytes = [0; RANGE];
        if take_front(&mut self.readable, &mut bytes) != RANGE {
            return None;
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
        let flags = word(12);
        Some(Range {
            sector,
            sectors: word(8),
            unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            strange: flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        })
    }

    /// Writes the outcome.
    pub fn conclude(&self, outcome: u8) -> Result<(), Broken> {
        let written = self.outcome.as_ref().map(|slice| slice.write_obj(outcome, 0));
        match written {
            Some(Ok(())) => Ok(()),
            _ => Err(Broken::Request("it has no place for its outcome")),
        }
    }
}

/// Copies the first bytes into `buffer` and takes them off the list; how many there were.
fn take_front(slices: &mut Vec<Slice<'_>>, buffer: &mut [u8]) -> usize {
    let (mut copied, mut whole) = (0, 0);
    while copied < buffer.len()
        && let Some(slice) = slices.get_mut(whole)
    {
        let count = slice.copy_to(&mut buffer[copied..]);
        copied += count;
        match slice.offset(count) {
            Ok(rest) if !rest.is_empty() => *slice = rest,
            _ => whole += 1,
        }
    }
    slices.drain(..whole);
    copied
}

/// Takes the last byte off the list.
fn take_last_byte<'m>(slices: &mut Vec<Slice<'m>>) -> Option<Slice<'m>> {
    let last = slices.pop()?;
    let (rest, byte) = last.split_at(last.len().checked_sub(1)?).ok()?;
    if !rest.is_empty() {
        slices.push(rest);
    }
    Some(byte)
}
