//! Control messages: whatever decodes is encoded and decoded again to the same message.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::message::Message;

fuzz_target!(|frame: &[u8]| {
    if let Ok(message) = Message::decode(frame) {
        assert_eq!(Message::decode(&message.encode()).as_ref(), Ok(&message));
    }
});
