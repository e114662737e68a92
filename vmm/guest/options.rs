//! The command line: `key=value` words. Unknown words are ignored. Numbers may end in K, M or G.

use crate::abi::{MAX_VCPUS, PAGE};

/// What the guest was told.
#[derive(Clone, Copy)]
pub struct Options {
    /// `vcpus`: how many there are to start.
    pub vcpus: u32,
    /// `ws`: bytes that are rewritten, over all vCPUs; 0 for an idle guest.
    pub working_set: u64,
    /// `rate`: pages rewritten each second over all vCPUs, rounded up to the same whole number on each;
    /// 0 for as many as possible.
    pub rate: u64,
    /// `words`: words stamped in each page, evenly spread.
    pub words: u64,
    /// `step`: distance from one visited page to the next. The pages between are visited later in the
    /// pass.
    pub step: u64,
    /// `hz`: timer interrupts a second on each vCPU.
    pub hz: u32,
    /// `pit`: interrupts of the PIT a second.
    pub pit_hz: u32,
    /// `journal`: blocks of the first disk that are written and checked in turn, whatever they hold; 0 for
    /// none.
    pub journal: u64,
}

/// Longest key, one too long to be known included.
const KEY: usize = 8;

impl Options {
    pub const DEFAULT: Options =
        Options { vcpus: 1, working_set: 0, rate: 0, words: 8, step: 1, hz: 100, pit_hz: 100, journal: 0 };

    /// Reads a command line.
    pub fn parse(text: impl Iterator<Item = u8>) -> Self {
        let mut options = Options::DEFAULT;
        let (mut key, mut length, mut number, mut in_number) = ([0u8; KEY], 0, 0u64, false);
        for byte in text.chain(core::iter::once(b' ')) {
            match byte {
                b' ' => {
                    options.set(&key, number);
                    (key, length, number, in_number) = ([0; KEY], 0, 0, false);
                }
                b'=' => in_number = true,
                b'0'..=b'9' if in_number => {
                    number = number.saturating_mul(10).saturating_add(u64::from(byte - b'0'));
                }
                b'K' if in_number => number = number.saturating_mul(1 << 10),
                b'M' if in_number => number = number.saturating_mul(1 << 20),
                b'G' if in_number => number = number.saturating_mul(1 << 30),
                _ => {
                    if let Some(place) = key.get_mut(length) {
                        *place = byte;
                        length += 1;
                    }
                }
            }
        }
        options
    }

    fn set(&mut self, key: &[u8; KEY], number: u64) {
        match key {
            b"vcpus\0\0\0" => self.vcpus = number.clamp(1, MAX_VCPUS as u64) as u32,
            b"ws\0\0\0\0\0\0" => self.working_set = number,
            b"rate\0\0\0\0" => self.rate = number,
            b"words\0\0\0" => self.words = number.clamp(1, PAGE / 8),
            b"step\0\0\0\0" => self.step = number.clamp(1, 1 << 20),
            b"hz\0\0\0\0\0\0" => self.hz = number.clamp(1, 10_000) as u32,
            b"pit\0\0\0\0\0" => self.pit_hz = number.clamp(19, 10_000) as u32,
            b"journal\0" => self.journal = number,
            _ => {}
        }
    }
}
