//! A console with a hostile driver. What it reads is there once.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use tempfile::NamedTempFile;
use vmm::SerialOutput;
use vmm::virtio::console::ConsoleConfig;
use vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel_fuzz::guest;

fuzz_target!(|input: &[u8]| {
    static TYPED: OnceLock<NamedTempFile> = OnceLock::new();
    let typed = TYPED.get_or_init(|| {
        let file = NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), [b'x'; 300]).expect("a file with content");
        file
    });
    let console = ConsoleConfig { output: SerialOutput::Null, input: Some(typed.path().into()) };
    let local = LocalConfig { console, ..LocalConfig::default() };
    guest::drive(DeviceConfig::Console.build(&local).expect("a device"), &local, input);
});
