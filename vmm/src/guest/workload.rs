//! Starting the embedded guest.

use super::abi::{PAGE, WORKING_SET_START};
use crate::error::Error;
use crate::loader::{Boot, Image};
use crate::machine::Machine;
use crate::memory::layout;
use std::borrow::Cow;
use vm_memory::{Bytes, GuestAddress};

/// The guest's ELF file.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

/// Timer interrupts a second where nothing is asked for: a guest that always works looks at the clock anyway,
/// one that sleeps only when it is woken.
const BUSY_HZ: u32 = 100;
const SLEEPY_HZ: u32 = 1000;

/// What RAM is filled with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// What does not compress and is nowhere zero.
    #[default]
    Random,
    /// The same eight bytes all over a page, others in the next: what a compressor likes best.
    Repeating,
    /// Zeros, in pages that exist.
    Zero,
}

/// What the embedded guest is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Virtual CPUs, which it has to be told. Beyond [`MAX_VCPUS`](super::MAX_VCPUS) it starts none.
    pub vcpus: u32,
    /// Bytes that it keeps rewriting and checking; 0 for an idle guest. Cut down to the RAM there is.
    pub working_set: u64,
    /// Pages rewritten each second; 0 for as many as it can.
    pub rate: u64,
    /// Timer interrupts a second on each vCPU; `None` for what suits the rest.
    pub hz: Option<u32>,
    /// Bytes of RAM to be filled before it starts, beside its working set. Cut down to the RAM there is.
    pub fill: u64,
    /// With what.
    pub content: Content,
    /// Blocks of its first disk, of 4 KiB each, that it keeps writing and checking in turn, whatever they
    /// hold; 0 for none.
    pub journal: u64,
}

impl Workload {
    /// Nothing, on so many virtual CPUs.
    pub fn idle(vcpus: u32) -> Self {
        Workload { vcpus, working_set: 0, rate: 0, hz: None, fill: 0, content: Content::Random, journal: 0 }
    }

    /// The guest's command line. It knows a few more words, of which the last one given counts:
    /// `words=512` checks whole pages, `step=7` scatters the writes (`guest/options.rs`).
    pub fn command_line(&self) -> String {
        let sleeps = self.working_set == 0 || self.rate != 0;
        let hz = self.hz.unwrap_or(if sleeps { SLEEPY_HZ } else { BUSY_HZ });
        let journal = if self.journal == 0 { String::new() } else { format!(" journal={}", self.journal) };
        format!("vcpus={} ws={} rate={} hz={hz}{journal}", self.vcpus, self.working_set, self.rate)
    }

    /// The guest, as it is booted.
    pub fn guest(&self) -> Boot {
        Boot { kernel: Image::Bytes(Cow::Borrowed(ELF)), cmdline: self.command_line(), initramfs: None }
    }

    /// Loads the guest into a machine that has not run.
    ///
    /// # Errors
    /// [`Error::Loader`] when the guest does not fit.
    pub fn boot(&self, machine: &Machine) -> Result<(), Error> {
        machine.boot(&self.guest())?;
        self.fill(machine)
    }

    /// Fills RAM. The working set lies at the
    /// end of low memory and at the beginning of high memory, so low memory is filled from its beginning and
    /// high memory up to its end; the guest's first pass overwrites what it needs.
    fn fill(&self, machine: &Machine) -> Result<(), Error> {
        let writer = machine.write_memory()?;
        let mut left = self.fill / PAGE * PAGE;
        let mut random = Random::default();
        let mut block = vec![0u8; 1 << 20];
        for region in layout::regions(machine.config().memory)? {
            let start = region.guest_address.max(WORKING_SET_START);
            let room = (region.guest_address + region.len).saturating_sub(start).min(left);
            left -= room;
            for at in (0..room).step_by(block.len()) {
                self.content.fill(&mut random, &mut block);
                let length = block.len().min((room - at) as usize);
                // Inside a region of the machine's own layout.
                let _ = writer.memory().write_slice(&block[..length], GuestAddress(start + at));
            }
        }
        Ok(())
    }
}

impl Content {
    /// Fills a block of whole pages.
    fn fill(self, random: &mut Random, block: &mut [u8]) {
        match self {
            Content::Random => random.fill(block),
            Content::Repeating => {
                for page in block.chunks_mut(PAGE as usize) {
                    let mut word = [0; 8];
                    random.fill(&mut word);
                    page.as_chunks_mut::<8>().0.fill(word);
                }
            }
            Content::Zero => block.fill(0),
        }
    }
}

/// A xorshift generator: random enough that nothing compresses it, fast enough for gibibytes.
pub(super) struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Random(0x9e37_79b9_7f4a_7c15)
    }
}

impl Random {
    pub(super) fn fill(&mut self, block: &mut [u8]) {
        for word in block.as_chunks_mut::<8>().0 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *word = self.0.to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_told_what_to_do() {
        let busy = Workload {
            vcpus: 2,
            working_set: 64 << 20,
            rate: 0,
            hz: None,
            fill: 0,
            content: Content::Random,
            journal: 0,
        };
        assert_eq!(busy.command_line(), "vcpus=2 ws=67108864 rate=0 hz=100");
        let slow = Workload { rate: 5, ..busy.clone() };
        assert_eq!(slow.command_line(), "vcpus=2 ws=67108864 rate=5 hz=1000");
        let idle = Workload { working_set: 0, ..busy };
        assert_eq!(idle.command_line(), "vcpus=2 ws=0 rate=0 hz=1000");
        let keeper = Workload { journal: 16, ..idle.clone() };
        assert_eq!(keeper.command_line(), "vcpus=2 ws=0 rate=0 hz=1000 journal=16");
        let drowsy = Workload { hz: Some(20), ..idle };
        assert_eq!(drowsy.command_line(), "vcpus=2 ws=0 rate=0 hz=20");
    }

    #[test]
    fn pages_are_filled_with_what_was_asked_for() {
        let mut random = Random::default();
        let mut block = vec![1u8; 3 * PAGE as usize];
        let mut words = |content: Content| -> Vec<u64> {
            content.fill(&mut random, &mut block);
            let mut words: Vec<u64> =
                block.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
            words.dedup();
            words
        };
        assert_eq!(words(Content::Zero), [0]);
        assert_eq!(words(Content::Repeating).len(), 3, "a word for each page");
        let random = words(Content::Random);
        assert!(random.len() == 3 * 512 && !random.contains(&0));
    }

    #[test]
    fn the_guest_is_an_elf_file() {
        assert_eq!(&ELF[..4], b"\x7fELF");
    }
}
