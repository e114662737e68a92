//! Which pages have to travel: one bit a page, one bitmap a region, as KVM's dirty log has them.

use crate::memory::{PAGE_SIZE, Ram};

/// Pages per bitmap word.
pub const WORD_PAGES: u64 = 64;

/// A set of pages of a machine's RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtySet {
    regions: Vec<Bitmap>,
}

/// One region's pages: bit `p % 64` of word `p / 64` is page `p`. Bits past the end are 0.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bitmap {
    words: Vec<u64>,
    pages: u64,
}

impl Bitmap {
    /// The valid bits of the last word.
    fn last_mask(&self) -> u64 {
        match self.pages % WORD_PAGES {
            0 => u64::MAX,
            tail => (1 << tail) - 1,
        }
    }

    fn trim(&mut self) {
        let mask = self.last_mask();
        if let Some(last) = self.words.last_mut() {
            *last &= mask;
        }
    }
}

impl DirtySet {
    /// No page of `ram`.
    pub fn empty(ram: &Ram) -> Self {
        let bitmap = |pages: u64| Bitmap { words: vec![0; pages.div_ceil(WORD_PAGES) as usize], pages };
        DirtySet { regions: ram.regions().iter().map(|r| bitmap(r.pages())).collect() }
    }

    /// Adds every page.
    pub fn fill(&mut self) {
        for bitmap in &mut self.regions {
            bitmap.words.fill(u64::MAX);
            bitmap.trim();
        }
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        for bitmap in &mut self.regions {
            bitmap.words.fill(0);
        }
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.regions.iter().flat_map(|b| &b.words).map(|w| u64::from(w.count_ones())).sum()
    }

    /// Bytes of all pages in the set.
    pub fn bytes(&self) -> u64 {
        self.count() * PAGE_SIZE
    }

    /// Number of regions.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// A region's bitmap words.
    pub fn words(&self, region: usize) -> &[u64] {
        &self.regions[region].words
    }

    /// A region's bitmap words, to be OR-ed into. Bits past the region's end must stay 0; call
    /// [`trim`](Self::trim) if they may not have.
    pub fn words_mut(&mut self, region: usize) -> &mut [u64] {
        &mut self.regions[region].words
    }

    /// Clears the bits past each region's end.
    pub fn trim(&mut self) {
        self.regions.iter_mut().for_each(Bitmap::trim);
    }

    /// Adds the pages of `other`, a set over the same RAM.
    pub fn union(&mut self, other: &DirtySet) {
        for (mine, theirs) in self.regions.iter_mut().zip(&other.regions) {
            for (a, b) in mine.words.iter_mut().zip(&theirs.words) {
                *a |= b;
            }
        }
    }

    /// Adds one page.
    pub fn insert(&mut self, region: usize, page: u64) {
        self.regions[region].words[(page / WORD_PAGES) as usize] |= 1 << (page % WORD_PAGES);
    }
}

/// Runs of consecutive set bits in `words`, as (first page, pages), pages counted from
/// `first_page`, the page of the first word's lowest bit.
///
/// Word-wise: a word of zeros or ones costs one comparison, a run inside a word two bit scans, so
/// that a clean gibibyte (4096 words) costs microseconds.
pub fn runs(words: &[u64], first_page: u64) -> Runs<'_> {
    Runs { words, index: 0, word: words.first().copied().unwrap_or(0), first_page }
}

/// Iterator of [`runs`].
pub struct Runs<'a> {
    words: &'a [u64],
    index: usize,
    /// What is left of `words[index]`: bits already returned are cleared.
    word: u64,
    first_page: u64,
}

impl Runs<'_> {
    /// Moves on to the next word; false, with no bits left, at the end.
    fn next_word(&mut self) -> bool {
        self.index += 1;
        self.word = self.words.get(self.index).copied().unwrap_or(0);
        self.index < self.words.len()
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.word == 0 {
            if !self.next_word() {
                return None;
            }
        }
        let low = self.word.trailing_zeros();
        let start = self.first_page + self.index as u64 * WORD_PAGES + u64::from(low);
        let mut ones = (self.word >> low).trailing_ones();
        let mut end = low + ones;
        let mut pages = u64::from(ones);
        // A run that reaches its word's last bit may go on in the next.
        while end == u64::BITS && self.next_word() {
            ones = self.word.trailing_ones();
            end = ones;
            pages += u64::from(ones);
        }
        self.word &= u64::MAX.checked_shl(end).unwrap_or(0);
        Some((start, pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(words: &[u64]) -> Vec<(u64, u64)> {
        runs(words, 0).collect()
    }

    #[test]
    fn runs_of_every_shape() {
        type Case = (&'static [u64], &'static [(u64, u64)]);
        let cases: &[Case] = &[
            (&[], &[]),
            (&[0], &[]),
            (&[0, 0], &[]),
            (&[1], &[(0, 1)]),
            (&[1 << 63], &[(63, 1)]),
            (&[u64::MAX], &[(0, 64)]),
            (&[u64::MAX, u64::MAX], &[(0, 128)]),
            (&[u64::MAX, 1], &[(0, 65)]),
            (&[1 << 63, 1], &[(63, 2)]),
            (&[1 << 63, 2], &[(63, 1), (65, 1)]),
            (&[0b0101_1001], &[(0, 1), (3, 2), (6, 1)]),
            (&[u64::MAX << 60, u64::MAX, 0b1011], &[(60, 70), (131, 1)]),
            (&[0, u64::MAX, 0], &[(64, 64)]),
        ];
        for (words, expected) in cases {
            assert_eq!(&all(words), expected, "{words:x?}");
        }
    }

    #[test]
    fn runs_cover_exactly_the_set_bits() {
        // A fixed linear congruential generator: the same thousand bitmaps in every run.
        let mut seed = 12345u64;
        let mut next = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            seed
        };
        for _ in 0..1000 {
            let words: Vec<u64> = (0..5)
                .map(|_| match next() >> 62 {
                    0 => 0,
                    1 => u64::MAX,
                    2 => next() & (next() >> 7),
                    _ => next() | (next() << 9),
                })
                .collect();
            let mut rebuilt = vec![0u64; words.len()];
            let mut last_end = None;
            for (start, pages) in runs(&words, 0) {
                assert!(pages > 0 && last_end < Some(start), "runs are maximal and ordered");
                last_end = Some(start + pages);
                for page in start..start + pages {
                    rebuilt[(page / 64) as usize] |= 1 << (page % 64);
                }
            }
            assert_eq!(rebuilt, words);
        }
    }
}
