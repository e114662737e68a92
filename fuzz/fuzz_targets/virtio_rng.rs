//! A source of entropy with a hostile driver.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel_fuzz::guest;

fuzz_target!(|input: &[u8]| {
    let local = LocalConfig::default();
    guest::drive(DeviceConfig::Rng.build(&local).expect("a device"), &local, input);
});
