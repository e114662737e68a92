//! The embedded guest, seen from outside: starting it, what it says of itself, and telling it things.
//!
//! The guest (`vmm/guest/`) keeps a report in its own RAM. It is read from there without the guest's
//! help, by whichever side has the guest; [`Testimony`] is what it comes to. What is in there is a
//! guest's word: any content gives a testimony or none, never a panic.

mod gaps;
pub mod journal;
#[cfg(test)]
mod live;
mod testimony;
mod workload;

pub use gaps::{Gaps, LongGap};
pub use testimony::Testimony;
pub use workload::{Content, ELF, Workload};

/// What both sides agree on.
#[allow(dead_code)] // the guest uses some items that this side does not
pub(crate) mod abi {
    include!("../../guest/abi.rs");
}

use crate::machine::{Machine, RamView};
pub use abi::MAX_VCPUS;
use abi::{Cpu, Header, MAGIC, PAGE, REPORT_ADDRESS, VERSION};
use std::mem::offset_of;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

// SAFETY: the struct consists of integers and is `repr(C)`; its six u32 fields stand together between
// u64 fields, so that there is no padding.
unsafe impl ByteValued for Header {}
// SAFETY: the struct consists of integers and structs of u64, and is `repr(C)`; all u64 fields come
// first, and the u32 arrays after them have even lengths, so that there is no padding.
unsafe impl ByteValued for Cpu {}

/// When a gap was felt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the switchover.
    Before,
    /// From just before the pause until some time after the guest runs again.
    During,
    /// After that.
    After,
}

/// What the guest can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To complete its pass, verify the whole working set once and be idle from then on; its state is then
    /// `finished`.
    Finish,
    /// The same, and then to power off.
    PowerOff,
}

/// Tells the guest which phase its gaps belong to from here on. Does nothing for other guests, nor for one
/// whose memory is being moved.
pub fn set_phase(machine: &Machine, when: When) {
    let phase = match when {
        When::Before => abi::PHASE_BEFORE,
        When::During => abi::PHASE_DURING,
        When::After => abi::PHASE_AFTER,
    };
    tell_machine(machine, offset_of!(Header, phase), phase);
}

/// Asks the guest for something; it takes a pass of its working set to happen. Does nothing for other
/// guests, nor for one whose memory is being moved.
pub fn request(machine: &Machine, request: Request) {
    let command = match request {
        Request::Finish => abi::COMMAND_FINISH,
        Request::PowerOff => abi::COMMAND_POWER_OFF,
    };
    tell_machine(machine, offset_of!(Header, command), command);
}

/// What the embedded guest says of itself; `None` for other guests, and before it has begun.
pub fn testimony(ram: RamView<'_>) -> Option<Testimony> {
    testimony_in(&ram)
}

/// Memory that can be read.
trait Readable {
    fn read<T: ByteValued>(&self, address: u64) -> Option<T>;
}

impl<M: GuestMemoryBackend> Readable for M {
    fn read<T: ByteValued>(&self, address: u64) -> Option<T> {
        self.read_obj(GuestAddress(address)).ok()
    }
}

impl Readable for RamView<'_> {
    fn read<T: ByteValued>(&self, address: u64) -> Option<T> {
        self.read_obj(GuestAddress(address)).ok()
    }
}

fn testimony_in(memory: &impl Readable) -> Option<Testimony> {
    let header = header(memory)?;
    let vcpus = u64::from(header.vcpus).min(MAX_VCPUS as u64);
    let cpus =
        (1..=vcpus).map(|page| memory.read(REPORT_ADDRESS + page * PAGE)).collect::<Option<Vec<Cpu>>>()?;
    Some(Testimony::of(&header, &cpus))
}

fn header(memory: &impl Readable) -> Option<Header> {
    let header: Header = memory.read(REPORT_ADDRESS)?;
    (header.magic == MAGIC && header.version == VERSION).then_some(header)
}

/// Writes a word of a machine's header, if its memory may be written to.
fn tell_machine(machine: &Machine, offset: usize, value: u32) {
    if let Ok(writer) = machine.write_memory() {
        tell(writer.memory(), offset, value);
    }
}

/// Writes a word of the header. The write is logged as one of the VMM's own, so that a migration under way
/// carries it along.
fn tell(memory: &impl GuestMemoryBackend, offset: usize, value: u32) {
    if header(memory).is_some() {
        // The header could be read, so it can be written.
        let _ = memory.write_obj(value, GuestAddress(REPORT_ADDRESS + offset as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn memory(bytes: usize) -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
    }

    fn write_header(memory: &GuestMemoryMmap<()>, vcpus: u32) {
        let mut header = testimony::tests::running();
        header.vcpus = vcpus;
        memory.write_obj(header, GuestAddress(REPORT_ADDRESS)).unwrap();
    }

    #[test]
    fn other_guests_say_nothing_and_are_not_written_to() {
        let memory = memory(2 << 20);
        assert!(testimony_in(&memory).is_none());
        tell(&memory, offset_of!(Header, phase), 1);
        let untouched: [u64; 8] = memory.read_obj(GuestAddress(REPORT_ADDRESS)).unwrap();
        assert_eq!(untouched, [0; 8]);
        write_header(&memory, 1);
        let version = GuestAddress(REPORT_ADDRESS + offset_of!(Header, version) as u64);
        memory.write_obj(VERSION + 1, version).unwrap();
        assert!(testimony_in(&memory).is_none());
    }

    #[test]
    fn a_report_that_reaches_beyond_memory_is_none() {
        let cut = memory(REPORT_ADDRESS as usize + 2 * PAGE as usize);
        write_header(&cut, 1);
        assert!(testimony_in(&cut).is_some());
        write_header(&cut, 2);
        assert!(testimony_in(&cut).is_none());
        assert!(testimony_in(&memory(REPORT_ADDRESS as usize + 32)).is_none());
    }

    #[test]
    fn any_number_of_vcpus_is_survived() {
        let memory = memory(2 << 20);
        write_header(&memory, u32::MAX);
        assert_eq!(testimony_in(&memory).unwrap().vcpus, MAX_VCPUS as u32);
    }

    #[test]
    fn noise_is_survived() {
        let memory = memory(2 << 20);
        let mut noise = vec![0u8; (1 + MAX_VCPUS) * PAGE as usize];
        let mut random = workload::Random::default();
        for _ in 0..200 {
            random.fill(&mut noise);
            memory.write_slice(&noise, GuestAddress(REPORT_ADDRESS)).unwrap();
            memory.write_obj(MAGIC, GuestAddress(REPORT_ADDRESS)).unwrap();
            let version = GuestAddress(REPORT_ADDRESS + offset_of!(Header, version) as u64);
            memory.write_obj(VERSION, version).unwrap();
            let testimony = testimony_in(&memory).unwrap();
            assert!(!testimony.clean);
            assert!(!testimony.to_string().is_empty());
            assert!(serde_json::to_string(&testimony).is_ok());
        }
    }

    #[test]
    fn what_the_guest_is_told_arrives() {
        let memory = memory(2 << 20);
        write_header(&memory, 1);
        tell(&memory, offset_of!(Header, phase), abi::PHASE_AFTER);
        tell(&memory, offset_of!(Header, command), abi::COMMAND_FINISH);
        let header = header(&memory).unwrap();
        assert_eq!((header.phase, header.command), (abi::PHASE_AFTER, abi::COMMAND_FINISH));
    }

    #[test]
    fn the_generation_is_read_off_a_stamp() {
        for (page, generation, index) in [(0, 0, 0), (1, 7, 3), (1 << 24, 1 << 40, 511)] {
            let stamp = abi::stamp(page, generation, index);
            assert_eq!(abi::generation_of(stamp, page, index), generation);
            // Of another page, at another place, or gone: no generation that a guest could reach.
            assert!(abi::generation_of(stamp, page + 1, index) > 1 << 48);
            assert!(abi::generation_of(stamp, page, index + 1) > 1 << 48);
            assert!(abi::generation_of(0, page, index) > 1 << 48);
        }
    }

    #[test]
    fn both_sides_mean_the_same_port() {
        assert_eq!(
            (abi::POWER_PORT, abi::POWER_OFF),
            (crate::power::CONTROL_PORT, crate::power::SLEEP_ENABLE)
        );
    }
}
