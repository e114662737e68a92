//! What travels beside guest memory over RDMA: messages, the private data of connections, offers.

#![no_main]

use libfuzzer_sys::fuzz_target;
use transport_rdma::internals;

fuzz_target!(|bytes: &[u8]| {
    if let Some((what, bytes)) = bytes.split_first() {
        match what % 3 {
            0 => internals::message(bytes),
            1 => internals::hello(bytes),
            _ => internals::offer(bytes, 2),
        }
    }
});
