//! Small guests for tests: machine code assembled with this program, in a PVH ELF made by hand.

#![allow(dead_code, unreachable_pub)] // each test program uses its own part of this module

use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm::{Boot, Host, Image, Machine, MachineConfig, SerialOutput};

pub mod guests;

/// Where guests are loaded and entered.
pub const BASE: u32 = 0x10_0000;

fn push<const N: usize>(out: &mut Vec<u8>, fields: [&[u8]; N]) {
    fields.into_iter().for_each(|field| out.extend_from_slice(field));
}

/// An ELF file with `code` at [`BASE`] and a PVH note that points there.
pub fn pvh_elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let mut elf = Vec::new();
    push(&mut elf, [b"\x7fELF", &[2, 1, 1, 0], &[0; 8]]);
    push(&mut elf, [&2u16.to_le_bytes(), &62u16.to_le_bytes(), &1u32.to_le_bytes()]);
    push(&mut elf, [&u64::from(BASE).to_le_bytes(), &64u64.to_le_bytes(), &0u64.to_le_bytes()]);
    push(&mut elf, [&0u32.to_le_bytes(), &64u16.to_le_bytes(), &56u16.to_le_bytes(), &2u16.to_le_bytes()]);
    push(&mut elf, [&[0; 6]]);
    let mut program_header = |kind: u32, offset: u64, address: u64, len: u64| {
        push(&mut elf, [&kind.to_le_bytes(), &7u32.to_le_bytes(), &offset.to_le_bytes()]);
        push(&mut elf, [&address.to_le_bytes(), &address.to_le_bytes()]);
        push(&mut elf, [&len.to_le_bytes(), &len.to_le_bytes(), &4u64.to_le_bytes()]);
    };
    program_header(1, HEADERS + NOTE, BASE.into(), code.len() as u64);
    program_header(4, HEADERS, 0, NOTE);
    push(&mut elf, [&4u32.to_le_bytes(), &4u32.to_le_bytes(), &18u32.to_le_bytes(), b"Xen\0"]);
    push(&mut elf, [&BASE.to_le_bytes(), code]);
    elf
}

/// What boots `code`.
pub fn boot(code: &[u8]) -> Boot {
    Boot { kernel: Image::Bytes(pvh_elf(code).into()), cmdline: String::new(), initramfs: None }
}

/// A machine of `mib` MiB whose serial output goes nowhere.
pub fn machine(mib: u64, vcpus: u32) -> Machine {
    machine_with(mib, vcpus, SerialOutput::Null)
}

/// A machine with its serial output elsewhere.
pub fn machine_with(mib: u64, vcpus: u32, serial: SerialOutput) -> Machine {
    let host = Host::open().unwrap();
    let config = MachineConfig { serial, ..MachineConfig::new(&host, mib << 20, vcpus).unwrap() };
    Machine::build(&host, config).unwrap()
}

/// Four bytes of guest memory.
pub fn peek(machine: &Machine, address: u64) -> u32 {
    machine.memory().memory().read_obj(GuestAddress(address)).unwrap()
}

/// Waits until four bytes of guest memory exceed `value`.
pub fn wait_above(machine: &Machine, address: u64, value: u32) -> u32 {
    let begin = Instant::now();
    loop {
        let now = peek(machine, address);
        if now > value {
            return now;
        }
        assert!(machine.outcome().is_none(), "the guest ended: {}", machine.outcome().unwrap());
        assert!(begin.elapsed() < Duration::from_secs(60), "guest memory at {address:#x} stays at {now}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Copies all RAM of one paused machine into another.
pub fn copy_ram(from: &Machine, to: &Machine) {
    let (from, to) = (from.memory().ram(), to.memory().ram());
    assert_eq!(from.layout(), to.layout());
    for (source, target) in from.regions().iter().zip(to.regions()) {
        migration::scan::existing(source, 0, source.pages(), |first, pages| {
            let (offset, len) = ((first * 4096) as usize, (pages * 4096) as usize);
            // SAFETY: the run lies inside both regions, which have equal layouts and are distinct
            // mappings; neither machine runs.
            unsafe {
                let source = source.address().wrapping_add(offset);
                target.address().wrapping_add(offset).copy_from_nonoverlapping(source, len);
            }
        });
    }
}
