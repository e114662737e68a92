//! Small guests for tests: machine code assembled with this program, in a PVH ELF made by hand.

#![allow(dead_code, unreachable_pub)] // each test program uses its own part of this module

use std::path::Path;
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;
use whimbrel_vmm::virtio::block::BlockConfig;
use whimbrel_vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel_vmm::{Boot, Host, Image, Machine, MachineConfig, SerialOutput};

pub mod elf;
pub mod guests;

pub use elf::pvh_elf;

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

/// A machine with PCI devices.
pub fn machine_with_devices(mib: u64, vcpus: u32, devices: Vec<DeviceConfig>) -> Machine {
    let host = Host::open().unwrap();
    let serial = SerialOutput::Null;
    let config = MachineConfig { serial, devices, ..MachineConfig::new(&host, mib << 20, vcpus).unwrap() };
    Machine::build(&host, config).unwrap()
}

/// Length of a [`disk`].
pub const DISK_BYTES: u64 = 4 << 20;

/// An image in a folder; cached where the folder's file system has no direct I/O.
pub fn disk(folder: &Path, name: &str) -> DeviceConfig {
    let path = folder.join(name);
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    }
    let direct = BlockConfig::new(path);
    let config = DeviceConfig::Block(direct.clone());
    match config.build(&LocalConfig::default()) {
        Ok(_) => config,
        Err(_) => DeviceConfig::Block(BlockConfig { cached: true, ..direct }),
    }
}

/// Four bytes of guest memory.
pub fn peek(machine: &Machine, address: u64) -> u32 {
    machine.memory().read_obj(GuestAddress(address)).unwrap()
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
