//! What another implementation makes of the devices: the `ibverbs` crate, which has bindings and wrappers of
//! its own and links the library. It has no part in the data plane, which it could not carry; but it must see
//! what our probe sees, and its messages must go where our writes go.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};
use transport_rdma::probe;

/// A gid as the network address that it stands for.
fn address(gid: &ibverbs::Gid) -> IpAddr {
    let bits = u128::from(gid.subnet_prefix()) << 64 | u128::from(gid.interface_id());
    Ipv6Addr::from_bits(bits).to_canonical()
}

/// The number under which the kernel knows a network interface.
fn interface_number(name: &str) -> u32 {
    let path = format!("/sys/class/net/{name}/ifindex");
    std::fs::read_to_string(path).expect("an interface").trim().parse().expect("a number")
}

/// A row of a device's table of addresses: port, index, address, whether it is RoCE v2, interface.
type Row = (u8, u32, IpAddr, bool, u32);

/// `IBV_GID_TYPE_ROCE_V2`, which the crate does not pass on.
const ROCE_V2: ibverbs::ibv_gid_type = 2;

fn theirs(context: &ibverbs::Context) -> Vec<Row> {
    let rows = context.gid_table().iter().map(|entry| {
        let v2 = entry.gid_type == ROCE_V2;
        (entry.port_num as u8, entry.gid_index, address(&entry.gid), v2, entry.ndev_ifindex)
    });
    rows.collect()
}

fn ours(device: &probe::Device) -> Vec<Row> {
    let rows = device.ports.iter().flat_map(|port| {
        port.gids.iter().map(|gid| {
            (port.number, gid.index, gid.address, gid.kind == "RoCE v2", interface_number(&gid.interface))
        })
    });
    rows.collect()
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn both_see_the_same_devices_ports_and_addresses() {
    let probed = probe::devices().expect("devices");
    let listed = ibverbs::devices().expect("devices");
    let name = |device: &ibverbs::Device<'_>| device.name().map(CStr::to_string_lossy).map(String::from);
    let names: Vec<_> = listed.iter().filter_map(|device| name(&device)).collect();
    assert_eq!(names, probed.iter().map(|device| device.name.clone()).collect::<Vec<_>>());
    for (device, probed) in listed.iter().zip(&probed) {
        // Opening fails where port 1 is not active.
        let context = device.open().expect("an active port");
        assert!(probed.ports[0].active && probed.ports[0].number == 1, "{probed:?}");
        let (theirs, ours) = (theirs(&context), ours(probed));
        assert!(ours.iter().any(|row| row.2.is_ipv4() && row.3), "{ours:?}");
        assert_eq!(theirs, ours, "{}", probed.name);
    }
}

/// Takes one completion, of a request that went well, and returns its number.
fn completion(queue: &ibverbs::CompletionQueue<'_>) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut room = [ibverbs::ibv_wc::default()];
    loop {
        if let [done] = queue.poll(&mut room).expect("a queue that can be polled") {
            assert_eq!(done.error(), None, "request {}", done.wr_id());
            return done.wr_id();
        }
        assert!(Instant::now() < deadline, "no completion");
    }
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_message_of_theirs_crosses_between_the_devices_that_we_use() {
    const SENT: u64 = 1;
    const RECEIVED: u64 = 2;
    let addresses = probe::addresses(&probe::host());
    let devices = ibverbs::devices().expect("devices");
    let contexts: Vec<_> = devices.iter().map(|device| device.open().expect("a device")).collect();
    let [near, far] = contexts.as_slice() else { panic!("{} devices, not two", contexts.len()) };
    // The address by which migrations would go.
    let index = |context: &ibverbs::Context| {
        let mut rows = theirs(context).into_iter();
        rows.find(|row| row.3 && row.2.is_ipv4() && addresses.contains(&row.2)).expect("a known address").1
    };
    let queues = [near, far].map(|context| context.create_cq(4, 0).expect("a completion queue"));
    let domains = [near, far].map(|context| context.alloc_pd().expect("a protection domain"));
    let prepare = |side: usize, context: &ibverbs::Context| {
        domains[side]
            .create_qp(&queues[side], &queues[side], ibverbs::ibv_qp_type::IBV_QPT_RC)
            .set_gid_index(index(context))
            // Half a second: the crate's own time-out is shorter than an emulated device's answer.
            .set_timeout(17)
            .build()
            .expect("a queue pair")
    };
    let (sender, receiver) = (prepare(0, near), prepare(1, far));
    let (here, there) = (sender.endpoint(), receiver.endpoint());
    let mut sender = sender.handshake(there).expect("a connection");
    let mut receiver = receiver.handshake(here).expect("a connection");
    let [mut from, mut into] = domains.each_ref().map(|domain| domain.allocate::<u64>(512).expect("memory"));
    from.iter_mut().zip(0..).for_each(|(word, number)| *word = number * 0x0101_0101_0101);
    // SAFETY: the memory is left alone until the completions below.
    unsafe { receiver.post_receive(&mut into, .., RECEIVED) }.expect("a posted buffer");
    // SAFETY: as above.
    unsafe { sender.post_send(&mut from, .., SENT) }.expect("a posted message");
    assert_eq!(completion(&queues[1]), RECEIVED);
    assert_eq!(completion(&queues[0]), SENT);
    assert!(into[..] == from[..]);
}
