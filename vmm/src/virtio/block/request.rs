//! A request's buffers, however the guest has cut them up: a header of 16 bytes, data, and a byte
//! for its status.

use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::structure::Structure;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, virtio_blk_discard_write_zeroes,
    virtio_blk_outhdr,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes of a sector, by which requests and configuration count, whatever the image's own unit is.
pub const SECTOR: u64 = 512;
/// Most buffers of one request: as many as descriptors in the queue.
pub const MAX_BUFFERS: usize = 256;
/// Most ranges in one request.
pub const MAX_RANGES: usize = 32;

/// What a request asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestType {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    #[default]
    Unknown,
}

/// A range of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    pub sector: u64,
    pub sectors: u32,
    /// The file system may free it.
    pub unmap: bool,
    /// It has flags that this device does not know.
    pub unknown_flags: bool,
}

/// A piece of a buffer in guest RAM, all of it in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub address: GuestAddress,
    pub len: usize,
}

impl Segment {
    /// What is left of it after `count` bytes.
    pub fn after(self, count: usize) -> Option<Segment> {
        let len = self.len.checked_sub(count).filter(|len| *len > 0)?;
        Some(Segment { address: self.address.unchecked_add(count as u64), len })
    }

    /// Where it is in this process.
    pub fn vector(self, memory: &GuestMemory) -> Result<libc::iovec, QueueError> {
        let slice = memory.get_slice(self.address, self.len).map_err(|_| QueueError::OUTSIDE)?;
        Ok(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: self.len })
    }
}

/// One request; used again for another, so that its lists need not grow anew.
#[derive(Default)]
pub struct Request {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    /// What is readable, as it was before ranges were taken off.
    ranges: Vec<Segment>,
    status_at: GuestAddress,
    pub sector: u64,
}

impl Request {
    /// Takes a chain apart.
    ///
    /// # Errors
    /// [`QueueError::Request`] if a part is missing or outside RAM.
    pub fn parse(&mut self, memory: &GuestMemory, chain: &mut Chain<'_>) -> Result<RequestType, QueueError> {
        self.readable.clear();
        self.writable.clear();
        self.ranges.clear();
        for (count, buffer) in chain.enumerate() {
            // With indirect descriptors a chain could have far more.
            if count == MAX_BUFFERS {
                return Err(QueueError::Request("it has more buffers than a queue holds"));
            }
            let list = if buffer.is_write_only() { &mut self.writable } else { &mut self.readable };
            let mut address = buffer.addr();
            for slice in GuestMemoryBackend::get_slices(memory, address, buffer.len() as usize) {
                let len = slice.map_err(|_| QueueError::OUTSIDE)?.len();
                list.push(Segment { address, len });
                address = address.unchecked_add(len as u64);
            }
        }
        let header: Option<virtio_blk_outhdr> = take_front(&mut self.readable, memory);
        let header = header.ok_or(QueueError::Request("it has no header"))?;
        let status_at = take_last_byte(&mut self.writable);
        self.status_at = status_at.ok_or(QueueError::Request("it has no status byte"))?;
        self.sector = header.sector;
        Ok(match header.type_ {
            VIRTIO_BLK_T_IN => RequestType::Read,
            VIRTIO_BLK_T_OUT => RequestType::Write,
            VIRTIO_BLK_T_FLUSH => RequestType::Flush,
            VIRTIO_BLK_T_GET_ID => RequestType::GetId,
            VIRTIO_BLK_T_DISCARD => RequestType::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => RequestType::WriteZeroes,
            _ => RequestType::Unknown,
        })
    }

    /// Takes over a request that was taken apart before.
    pub fn restore(
        &mut self,
        sector: u64,
        readable: impl Iterator<Item = Segment>,
        writable: impl Iterator<Item = Segment>,
        status_at: GuestAddress,
    ) {
        self.readable.clear();
        self.writable.clear();
        self.ranges.clear();
        self.readable.extend(readable);
        self.writable.extend(writable);
        (self.sector, self.status_at) = (sector, status_at);
    }

    /// Where its status goes.
    pub fn status_at(&self) -> GuestAddress {
        self.status_at
    }

    /// The data that goes to the disk, with ranges that were taken off.
    pub fn all_outgoing(&self) -> &[Segment] {
        if self.ranges.is_empty() { &self.readable } else { &self.ranges }
    }

    /// The data that goes to the disk.
    pub fn outgoing(&self) -> &[Segment] {
        &self.readable
    }

    /// Where data from the disk goes.
    pub fn incoming(&self) -> &[Segment] {
        &self.writable
    }

    /// Marks all of that as written: the kernel writes there through bare addresses. To be called after it
    /// has, also where it failed, since that may have been half-way.
    pub fn mark(&self, memory: &GuestMemory) {
        for part in &self.writable {
            if let Ok(slice) = memory.get_slice(part.address, part.len) {
                slice.bitmap().mark_dirty(0, part.len);
            }
        }
    }

    /// The next of the ranges that the outgoing data names.
    pub fn next_range(&mut self, memory: &GuestMemory) -> Option<SectorRange> {
        if self.ranges.is_empty() {
            self.ranges.extend_from_slice(&self.readable);
        }
        let range: virtio_blk_discard_write_zeroes = take_front(&mut self.readable, memory)?;
        Some(SectorRange {
            sector: range.sector,
            sectors: range.num_sectors,
            unmap: range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            unknown_flags: range.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        })
    }

    /// Writes the status byte.
    pub fn complete(&self, memory: &GuestMemory, status: u8) -> Result<(), QueueError> {
        memory.write_obj(status, self.status_at).map_err(|_| QueueError::OUTSIDE)
    }
}

/// Takes a structure off the front of the list, if it is there as a whole.
fn take_front<T: Default>(parts: &mut Vec<Segment>, memory: &GuestMemory) -> Option<T>
where
    Structure<T>: ByteValued,
{
    let mut taken = Structure(T::default());
    let buffer = taken.as_mut_slice();
    let (mut copied, mut whole) = (0, 0);
    while copied < buffer.len()
        && let Some(part) = parts.get_mut(whole)
    {
        let count = part.len.min(buffer.len() - copied);
        if memory.read_slice(&mut buffer[copied..copied + count], part.address).is_err() {
            break;
        }
        copied += count;
        match part.after(count) {
            Some(rest) => *part = rest,
            None => whole += 1,
        }
    }
    if copied < buffer.len() {
        return None;
    }
    parts.drain(..whole);
    Some(taken.0)
}

/// Takes the last byte off the list.
fn take_last_byte(parts: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = parts.last_mut()?;
    last.len -= 1;
    let byte = last.address.unchecked_add(last.len as u64);
    if last.len == 0 {
        parts.pop();
    }
    Some(byte)
}
