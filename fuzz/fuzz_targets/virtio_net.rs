//! A network interface with a hostile driver and a hostile network. In the place of a tap are sockets, into
//! which the input's frames were sent before; nobody reads what the guest sends.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use vmm::virtio::net::{Mac, Net, NetConfig};
use vmm::virtio::{DeviceConfig, VirtioDevice};
use whimbrel_fuzz::{Input, guest};

/// An interface, and the network's ends of its queues.
fn interface(config: &NetConfig) -> (Arc<dyn VirtioDevice>, Vec<UnixDatagram>) {
    let pairs = (0..config.pairs).map(|_| UnixDatagram::pair().expect("sockets"));
    let (ours, theirs) = pairs.unzip();
    (Arc::new(Net::over(config, ours).expect("an interface")), theirs)
}

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    let Some(how) = input.byte() else { return };
    let mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    let config = NetConfig { number: 0, mac, pairs: u16::from(how & 1) + 1, negotiated: None, network: None };
    let (device, network) = interface(&config);
    for frame in 0..how >> 5 {
        let Some(len) = input.word() else { break };
        let to = &network[usize::from(frame) % network.len()];
        to.set_nonblocking(true).expect("a socket");
        // One that finds no room is lost, as on any network.
        let _ = to.send(input.bytes(len.into()));
    }
    let mut twin = Vec::new();
    let build = |config: &DeviceConfig| {
        let DeviceConfig::Net(config) = config else { unreachable!("an interface") };
        let (device, network) = interface(config);
        twin = network;
        device
    };
    guest::drive_and_build(device, build, &mut input);
});
