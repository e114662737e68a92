//! Bounce buffers: aligned memory of our own, by way of which data goes that direct I/O does not take from a
//! guest as it is.

use super::file_op::Direction;
use super::image::DiskImage;
use super::request::Segment;
use crate::memory::GuestMemory;
use std::alloc::Layout;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use vm_memory::Bytes;

/// Alignment that suits direct I/O everywhere.
pub const PAGE: usize = 4096;
/// Most bytes that are copied at a time.
pub const MAX_BOUNCE: usize = 256 << 10;

/// A buffer that direct I/O takes.
pub struct BounceBuffer {
    address: NonNull<u8>,
    layout: Layout,
}

impl BounceBuffer {
    /// At least `len` bytes of zeros.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let layout =
            Layout::from_size_align(len.max(1).next_multiple_of(PAGE), PAGE).map_err(io::Error::other)?;
        // SAFETY: the layout's size is a page or more.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        let address = NonNull::new(address).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(BounceBuffer { address, layout })
    }

    /// The buffer.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has this size, is initialised with zeros and borrowed through self.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.layout.size()) }
    }
}

impl Drop for BounceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout.
        unsafe { std::alloc::dealloc(self.address.as_ptr(), self.layout) };
    }
}

impl DiskImage {
    /// Moves data between the image, from byte `offset` on, and parts of guest RAM by way of a buffer of our
    /// own.
    ///
    /// # Errors
    /// What the system says.
    pub fn bounce(
        &self,
        direction: Direction,
        offset: u64,
        memory: &GuestMemory,
        parts: &[Segment],
    ) -> io::Result<()> {
        let total: usize = parts.iter().map(|part| part.len).sum();
        let mut bounce = BounceBuffer::new(total.min(MAX_BOUNCE))?;
        let (mut parts, mut done) = (parts.iter().copied(), 0);
        let mut current = parts.next();
        while done < total {
            let piece = MAX_BOUNCE.min(total - done);
            let buffer = &mut bounce.bytes()[..piece];
            if direction == Direction::Read {
                self.file().read_exact_at(buffer, offset + done as u64)?;
            }
            let mut copied = 0;
            while copied < piece {
                let Some(part) = current else { return Err(io::ErrorKind::UnexpectedEof.into()) };
                let count = part.len.min(piece - copied);
                let bytes = &mut buffer[copied..copied + count];
                match direction {
                    // Marks what it writes.
                    Direction::Read => memory.write_slice(bytes, part.address),
                    Direction::Write => memory.read_slice(bytes, part.address),
                }
                .map_err(io::Error::other)?;
                copied += count;
                current = part.after(count).or_else(|| parts.next());
            }
            if direction == Direction::Write {
                self.file().write_all_at(buffer, offset + done as u64)?;
            }
            done += piece;
        }
        Ok(())
    }
}
