//! A machine's state, as far as it is read without a machine.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::{component, state};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(components) = component::decode(bytes) {
        assert_eq!(component::encode(&components).expect("an encoding"), bytes);
        let _ = state::timeless(bytes, 2);
    }
});
