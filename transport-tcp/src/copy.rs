//! Places what arrives through a protected channel: it has been decrypted in memory, from where it is copied
//! to the guest's pages.
//!
//! Memory that does not exist yet is written to its file, so that the kernel need not clear pages that are
//! overwritten at once, nor take a fault for each. If another stream writes to that file, the pages are made
//! to exist in one call, and are copied to. `place` tells why.

use crate::channel::Decrypted;
use crate::place::{Turns, is_new, populate};
use migration::memory::{Extent, Ram};
use std::io;

/// From this length on, it is worth asking whether an extent exists.
const MIN_POPULATE_BYTES: u64 = 64 << 10;

/// Most bytes that are made to exist at once: the caches still have them when their content comes.
const POPULATE_BYTES: u64 = 1 << 20;

/// Receives the content of checked extents.
pub(crate) fn place(
    from: &mut dyn Decrypted,
    ram: &Ram,
    turns: &Turns,
    extents: &[Extent],
) -> io::Result<()> {
    for extent in extents {
        let region = ram.check(extent).map_err(io::Error::other)?;
        let mut at = extent.offset;
        for piece in region.pieces(extent.offset, extent.len) {
            let end = at + piece.len;
            while at < end {
                let len = POPULATE_BYTES.min(end - at);
                let address = region.address().wrapping_add(at as usize);
                if len >= MIN_POPULATE_BYTES && is_new(region, at) {
                    if let Some(_turn) = turns.try_take(extent.region, piece.part) {
                        write(from, piece.fd, piece.offset + (at + piece.len - end), len)?;
                        at += len;
                        continue;
                    }
                    populate(address, len);
                }
                // SAFETY: the bytes from `at` on, so many of them, lie in the extent, which `Ram::check` has
                // found inside the region's mapping. The guest does not run here yet, and no reference to its
                // memory exists.
                unsafe { copy(from, address, len)? };
                at += len;
            }
        }
    }
    Ok(())
}

/// Writes the next bytes to a file of guest memory, which has none of these pages yet.
fn write(from: &mut dyn Decrypted, file: libc::c_int, mut offset: u64, len: u64) -> io::Result<()> {
    let end = offset + len;
    while offset < end {
        let mut failed = None;
        let count = from.deliver((end - offset) as usize, &mut |chunk| {
            let mut rest = chunk;
            while !rest.is_empty() && failed.is_none() {
                // SAFETY: the pointer and the length are those of `rest`.
                let put =
                    unsafe { libc::pwrite(file, rest.as_ptr().cast(), rest.len(), offset as libc::off_t) };
                match usize::try_from(put) {
                    Ok(put) => {
                        rest = &rest[put..];
                        offset += put as u64;
                    }
                    Err(_) => {
                        let error = io::Error::last_os_error();
                        failed = Some(error).filter(|error| error.kind() != io::ErrorKind::Interrupted);
                    }
                }
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Copies the next `len` bytes to an address.
///
/// # Safety
/// So many bytes may be written there, and nobody has a reference to them.
unsafe fn copy(from: &mut dyn Decrypted, address: *mut u8, len: u64) -> io::Result<()> {
    let (mut to, mut left) = (address, len as usize);
    while left > 0 {
        let count = from.deliver(left, &mut |chunk| {
            // SAFETY: all chunks together have at most the bytes that were asked for, and the caller vouches
            // for those. A chunk is other memory.
            unsafe { std::ptr::copy_nonoverlapping(chunk.as_ptr(), to, chunk.len()) };
            to = to.wrapping_add(chunk.len());
        })?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::conformance::bed::ram_of;
    use migration::memory::PAGE_SIZE;

    /// Bytes that arrive by so many.
    struct Chunks<'a>(&'a [u8], usize);

    impl Decrypted for Chunks<'_> {
        fn deliver(&mut self, most: usize, to: &mut dyn FnMut(&[u8])) -> io::Result<usize> {
            let (now, later) = self.0.split_at(self.0.len().min(most).min(self.1));
            self.0 = later;
            to(now);
            Ok(now.len())
        }
    }

    #[test]
    fn chunks_of_any_length_end_up_where_they_belong() {
        let extent = |first_page: u64, pages: u64| Extent {
            region: 0,
            offset: first_page * PAGE_SIZE,
            len: pages * PAGE_SIZE,
        };
        let extents = [extent(0, 1), extent(3, 40), extent(100, 700), extent(99, 1)];
        let bytes: u64 = extents.iter().map(|extent| extent.len).sum();
        let content: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(bytes as usize).collect();
        for chunk in [1000, 4096, 16 << 10, 1 << 20] {
            let ram = ram_of(&[1024]);
            let mut from = Chunks(&content, chunk);
            let turns = Turns::new(&ram);
            place(&mut from, &ram, &turns, &extents).unwrap();
            let mut at = 0;
            for extent in &extents {
                let len = extent.len as usize;
                // SAFETY: inside the mapping; nobody writes any more.
                let got = unsafe { std::slice::from_raw_parts(ram.address(extent).unwrap(), len) };
                assert!(got == &content[at..at + len], "{extent:?} by chunks of {chunk}");
                at += len;
            }
            assert!(from.0.is_empty());
            let error = place(&mut from, &ram, &turns, &extents[..1]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
