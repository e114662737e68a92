//! All that a guest reaches by ports and by memory that is not RAM: serial port, power registers,
//! PCI configuration, BARs.

#![no_main]

use kvm_ioctls::{Kvm, VmFd};
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, OnceLock};
use vmm::devices::Devices;
use vmm::memory::{GuestRam, PageSize};
use vmm::power::Power;
use vmm::serial::SerialPort;
use vmm::virtio::console::ConsoleConfig;
use vmm::virtio::{DeviceConfig, LocalConfig, VirtioFunction};
use vmm::{SerialOutput, pci};
use whimbrel_fuzz::Input;
use whimbrel_fuzz::guest::Nowhere;

fn vm() -> Arc<VmFd> {
    static VM: OnceLock<Arc<VmFd>> = OnceLock::new();
    VM.get_or_init(|| Arc::new(Kvm::new().and_then(|kvm| kvm.create_vm()).expect("KVM"))).clone()
}

fn devices() -> Devices {
    let serial = SerialPort::new(vm(), &SerialOutput::Null).expect("a serial port");
    let console = ConsoleConfig { output: SerialOutput::Null, input: None };
    let local = LocalConfig { console, ..LocalConfig::default() };
    let ram = GuestRam::new(16 << 20, PageSize::Small).expect("memory");
    let virtio = [DeviceConfig::Rng, DeviceConfig::Console].iter().zip(0..).map(|(config, index)| {
        let device = config.build(&local).expect("a device");
        Arc::new(VirtioFunction::new(index, device, Arc::new(Nowhere), ram.memory()).expect("a function"))
    });
    Devices::new(serial, Power::new(Box::new(|_| {})), virtio.collect())
}

fn play(devices: &Devices, input: &mut Input<'_>) -> Option<()> {
    loop {
        let what = input.byte()?;
        let len = [1, 2, 4, 8][usize::from(what >> 4) % 4];
        let address = |offset: u16| {
            u64::from(pci::bar_address(0)) + u64::from(what >> 6) * pci::BAR_SLICE + u64::from(offset)
        };
        match what & 15 {
            0 | 1 => drop(devices.port_out(input.word()?, &input.access(len.min(4))[..len.min(4)])),
            2 => devices.port_in(input.word()?, &mut [0; 4][..len.min(4)]),
            // A register of a PCI function.
            3 | 4 => {
                let (device, register) = (u32::from(input.byte()?), u32::from(input.byte()?));
                let at = 1 << 31 | (device & 0xff) << 11 | register & 0xfc;
                devices.port_out(pci::CONFIG_ADDRESS_PORT, &at.to_le_bytes());
                let port = pci::CONFIG_DATA_PORT + (register & 3) as u16;
                if what & 1 != 0 {
                    devices.port_out(port, &input.access(len.min(4))[..len.min(4)]);
                } else {
                    devices.port_in(port, &mut [0; 4][..len.min(4)]);
                }
            }
            5 => devices.mmio_write(address(input.word()?), &input.access(len)[..len]),
            6 => devices.mmio_read(address(input.word()?), &mut [0; 8][..len]),
            7 => devices.mmio_write(u64::from_le_bytes(input.array()?), &input.access(len)[..len]),
            8 => devices.mmio_read(u64::from_le_bytes(input.array()?), &mut [0; 8][..len]),
            9 => devices.pause(),
            10 => devices.resume(),
            11 => drop(devices.announce()),
            12 => drop(devices.power().press()),
            13 => drop(devices.serial().load(&devices.serial().save())),
            _ => devices.pci().load(&devices.pci().save()),
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let _ = play(&devices(), &mut Input(bytes));
});
