//! Stamping pages, checking them, and telling what is wrong with one.

use crate::abi::{self, PAGE, PER_GENERATION, PER_PAGE, PER_WORD};
use core::arch::asm;

/// What a page turned out to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Its content is not of this page, or of no generation.
    Lost,
    /// It holds another generation, and that one throughout.
    Stale,
    /// Parts of it are of different generations.
    Torn,
}

/// How pages are stamped: so many words, evenly spread.
#[derive(Clone, Copy)]
pub struct Stamps {
    words: u64,
    stride: u64,
}

/// The number of words for which there is a fast loop: one in each 512 bytes.
const USUAL: u64 = 8;

impl Stamps {
    pub fn new(words: u64) -> Self {
        Stamps { words, stride: PAGE / 8 / words }
    }

    fn word(self, address: *mut u64, index: u64) -> *mut u64 {
        // The last is at (words - 1) * (512 / words), which is less than 512.
        address.wrapping_add((index * self.stride) as usize)
    }

    /// Stamps a page, whatever it holds.
    pub fn write(self, address: *mut u64, page: u64, generation: u64) {
        let mut value = abi::stamp(page, generation, 0);
        for index in 0..self.words {
            // SAFETY: a page of the working set, which only this vCPU uses; the word is in it.
            unsafe { self.word(address, index).write_volatile(value) };
            value = value.wrapping_add(PER_WORD);
        }
    }

    /// Index of the first word that is not of this generation, and that word.
    pub fn check(self, address: *mut u64, page: u64, generation: u64) -> Result<(), (u64, u64)> {
        let mut value = abi::stamp(page, generation, 0);
        for index in 0..self.words {
            // SAFETY: as in `write`.
            let found = unsafe { self.word(address, index).read_volatile() };
            if found != value {
                return Err((index, found));
            }
            value = value.wrapping_add(PER_WORD);
        }
        Ok(())
    }

    /// Checks `count` pages, `step` apart, for `generation` and stamps them with the next one. Stops at a
    /// page that is wrong and leaves it as it is. Returns how many were right.
    ///
    /// A page is read in full before it is written. A vCPU that is paused between two stores, moved and
    /// resumed goes on with the next store: there is no moment at which that looks like damage.
    pub fn renew(self, address: *mut u64, page: u64, step: u64, count: u64, generation: u64) -> u64 {
        if self.words == USUAL {
            return renew_usual(address, abi::stamp(page, generation, 0), step, count);
        }
        for done in 0..count {
            let (address, page) =
                (address.wrapping_add((done * step * PAGE / 8) as usize), page + done * step);
            if self.check(address, page, generation).is_err() {
                return done;
            }
            self.write(address, page, generation + 1);
        }
        count
    }

    /// Tells what is wrong with a page that is not of `generation`.
    pub fn diagnose(self, address: *mut u64, page: u64, generation: u64) -> Damage {
        // SAFETY: as in `write`.
        let found = |index| unsafe { self.word(address, index).read_volatile() };
        let first = abi::generation_of(found(0), page, 0);
        let mut damage = Damage::Stale;
        for index in 0..self.words {
            let other = abi::generation_of(found(index), page, index);
            if other > generation + 1 {
                return Damage::Lost;
            }
            if other != first {
                damage = Damage::Torn;
            }
        }
        damage
    }
}

/// [`Stamps::renew`] for the usual number of words, in 36 instructions a page. Where KVM emulates
/// every instruction, their number is all that counts; so the next generation is added in memory instead of
/// being computed in a register.
fn renew_usual(address: *mut u64, expected: u64, step: u64, count: u64) -> u64 {
    let next_page = step.wrapping_mul(PER_PAGE).wrapping_sub(USUAL.wrapping_mul(PER_WORD));
    let mut left = count;
    // SAFETY: reads and writes words of `count` pages of the working set that only this vCPU uses.
    unsafe {
        asm!(
            "test {left}, {left}",
            "jz 3f",
            "2:",
            "cmp [{page}], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "cmp [{page} + 512], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "cmp [{page} + 1024], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "cmp [{page} + 1536], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "cmp [{page} + 2048], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "cmp [{page} + 2560], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "cmp [{page} + 3072], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "cmp [{page} + 3584], {expected}",
            "jne 3f",
            "add {expected}, {per_word}",
            "add [{page}], {per_generation}",
            "add [{page} + 512], {per_generation}",
            "add [{page} + 1024], {per_generation}",
            "add [{page} + 1536], {per_generation}",
            "add [{page} + 2048], {per_generation}",
            "add [{page} + 2560], {per_generation}",
            "add [{page} + 3072], {per_generation}",
            "add [{page} + 3584], {per_generation}",
            "add {page}, {step}",
            "add {expected}, {next_page}",
            "dec {left}",
            "jnz 2b",
            "3:",
            page = inout(reg) address => _,
            expected = inout(reg) expected => _,
            left = inout(reg) left,
            step = in(reg) step * PAGE,
            next_page = in(reg) next_page,
            per_word = in(reg) PER_WORD,
            per_generation = in(reg) PER_GENERATION,
            options(nostack),
        );
    }
    count - left
}
