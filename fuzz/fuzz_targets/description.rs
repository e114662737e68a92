//! A peer's description of its machine.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::internals::described;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = described(bytes) {
        let _ = vmm::memory::layout::regions(config.memory);
    }
});
