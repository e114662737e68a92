//! A machine's state, loaded into a machine. The input changes a state that this host has saved.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use vmm::virtio::console::ConsoleConfig;
use vmm::virtio::{DeviceConfig, LocalConfig};
use vmm::{Host, Machine, MachineConfig, SerialOutput};
use whimbrel_fuzz::{Input, change};

fn machine() -> &'static (Machine, Vec<u8>) {
    static MACHINE: OnceLock<(Machine, Vec<u8>)> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let host = Host::open().expect("KVM");
        let console = ConsoleConfig { output: SerialOutput::Null, input: None };
        let config = MachineConfig {
            serial: SerialOutput::Null,
            devices: vec![DeviceConfig::Rng, DeviceConfig::Console],
            local: LocalConfig { console, ..LocalConfig::default() },
            ..MachineConfig::new(&host, 16 << 20, 1).expect("a machine")
        };
        let machine = Machine::build(&host, config).expect("a machine");
        let state = machine.save().expect("a state");
        (machine, state)
    })
}

fuzz_target!(|bytes: &[u8]| {
    let (machine, saved) = machine();
    let mut state = saved.clone();
    let mut input = Input(bytes);
    while let Some((at, bytes)) = change(saved.len(), &mut input) {
        state[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let loaded = machine.load(&state);
    assert!(state != *saved || loaded.is_ok(), "{loaded:?}");
});
