//! Which pages the VMM itself wrote.
//!
//! KVM's dirty log shows what vCPUs and in-kernel devices write. A write through this process's own
//! mapping (a loader, a device model) passes KVM by, so every region carries this bitmap as its
//! `vm-memory` bitmap, and the two are merged when dirty pages are collected.
//!
//! vm-memory's own `AtomicBitmap` can be read only bit by bit or by a call that allocates and
//! resets everything; dirty rounds want whole words, read without a reset and cleared range-wise.

use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

const PAGE_SHIFT: usize = 12;
const WORD_SHIFT: usize = 6;

/// One bit per 4 KiB page, set by writes through `vm-memory`.
#[derive(Debug, Default)]
pub struct WriteLog {
    words: Box<[AtomicU64]>,
    pages: usize,
}

impl WriteLog {
    /// A clean log for a region of `len` bytes.
    pub fn new(len: usize) -> Self {
        let pages = len.div_ceil(1 << PAGE_SHIFT);
        WriteLog { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), pages }
    }

    /// ORs the log into `out`, word by word. Words that `out` lacks are left out.
    pub fn merge_into(&self, out: &mut [u64]) {
        for (word, out) in self.words.iter().zip(out) {
            *out |= word.load(Ordering::Acquire);
        }
    }

    /// Clears the bits that are set in `mask`, whose first word covers page `first_page`, a
    /// multiple of 64. Words past the region's end are ignored.
    pub fn clear(&self, first_page: u64, mask: &[u64]) {
        let first = usize::try_from(first_page >> WORD_SHIFT).unwrap_or(usize::MAX);
        for (word, mask) in self.words.iter().skip(first).zip(mask) {
            // Hardly ever set: a plain load keeps the cache line shared between lanes.
            if word.load(Ordering::Relaxed) & mask != 0 {
                // Acquire and Release: the read of the page that follows must not move before
                // this, or a write between the two would be neither read nor logged.
                word.fetch_and(!mask, Ordering::AcqRel);
            }
        }
    }

    /// Marks everything.
    pub fn mark_all(&self) {
        self.mark_dirty(0, self.pages << PAGE_SHIFT);
    }

    /// Clears everything.
    pub fn reset(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::Release));
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, WriteLog>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || self.pages == 0 {
            return;
        }
        let first = offset >> PAGE_SHIFT;
        let last = (offset.saturating_add(len - 1) >> PAGE_SHIFT).min(self.pages - 1);
        for page in first..=last {
            // Release: a thread that sees the bit also sees the write that it stands for.
            self.words[page >> WORD_SHIFT].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        self.words
            .get(page >> WORD_SHIFT)
            .is_some_and(|w| w.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, WriteLog> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_marks_every_page_it_touches_and_no_other() {
        let log = WriteLog::new(200 << PAGE_SHIFT);
        log.mark_dirty((63 << PAGE_SHIFT) + 4095, 2);
        log.mark_dirty(199 << PAGE_SHIFT, usize::MAX);
        let mut words = [0u64; 4];
        log.merge_into(&mut words);
        assert_eq!(words, [1 << 63, 1, 0, 1 << 7]);
        assert!(log.dirty_at(64 << PAGE_SHIFT) && !log.dirty_at(65 << PAGE_SHIFT));
    }

    #[test]
    fn clearing_is_by_mask_and_leaves_the_rest() {
        let log = WriteLog::new(200 << PAGE_SHIFT);
        log.mark_dirty(64 << PAGE_SHIFT, 3 << PAGE_SHIFT);
        log.clear(64, &[0b010, u64::MAX, u64::MAX, u64::MAX]);
        let mut words = [0u64; 4];
        log.merge_into(&mut words);
        assert_eq!(words, [0, 0b101, 0, 0]);
        log.clear(!63, &[u64::MAX]);
        log.reset();
        let mut words = [0u64; 4];
        log.merge_into(&mut words);
        assert_eq!(words, [0; 4]);
    }
}
