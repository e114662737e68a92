//! Places what arrives through a protected channel: it has been decrypted in memory, from where it is copied
//! to the guest's pages.
//!
//! Memory that does not exist yet is made to exist a large extent at a time, which costs less than a page
//! fault for each page.

use crate::channel::Decrypted;
use crate::place::populate;
use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::scan;
use std::io;

/// From this length on, it is worth asking whether an extent exists.
const MIN_POPULATE_BYTES: u64 = 64 << 10;

/// Most bytes that are made to exist at once: the caches still have them when their content comes.
const POPULATE_BYTES: u64 = 1 << 20;

/// Receives the content of checked extents.
pub(crate) fn place(from: &mut dyn Decrypted, ram: &Ram, extents: &[Extent]) -> io::Result<()> {
    for extent in extents {
        let region = ram.check(extent).map_err(io::Error::other)?;
        let (mut at, end) = (extent.offset, extent.offset + extent.len);
        let mut exists_to = at;
        while at < end {
            if at == exists_to {
                exists_to = end.min(at + POPULATE_BYTES);
                let mut exists = exists_to - at < MIN_POPULATE_BYTES || region.backing_page() > PAGE_SIZE;
                scan::existing(region, at / PAGE_SIZE, 1, |_, _| exists = true);
                if !exists {
                    populate(region.address().wrapping_add(at as usize), exists_to - at);
                }
            }
            let mut to = region.address().wrapping_add(at as usize);
            let count = from.deliver((exists_to - at) as usize, &mut |chunk| {
                // SAFETY: all chunks together have at most the bytes that were asked for: those from `at` to
                // `exists_to`. They lie in the extent, which `Ram::check` has found inside the region's
                // mapping, and a chunk is other memory. The guest does not run here yet, and no reference to
                // its memory exists.
                unsafe { std::ptr::copy_nonoverlapping(chunk.as_ptr(), to, chunk.len()) };
                to = to.wrapping_add(chunk.len());
            })?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += count as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::conformance::bed::ram_of;

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
            place(&mut from, &ram, &extents).unwrap();
            let mut at = 0;
            for extent in &extents {
                let len = extent.len as usize;
                // SAFETY: inside the mapping; nobody writes any more.
                let got = unsafe { std::slice::from_raw_parts(ram.address(extent).unwrap(), len) };
                assert!(got == &content[at..at + len], "{extent:?} by chunks of {chunk}");
                at += len;
            }
            assert!(from.0.is_empty());
            let error = place(&mut from, &ram, &extents[..1]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
