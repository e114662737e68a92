//! What both processes have the kernel copy while a guest moves: over RDMA next to nothing, over TCP all of
//! it. That the processes copy nothing on their own either is shown by `transport-rdma/tests/untouchable.rs`.

use migration::report::Report;
use std::collections::BTreeMap;
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;
use whimbrel_tests::lab;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop_as, request};
use whimbrel_tests::strace::Followed;

const GUEST: Guest = Guest { memory: 96 << 20, vcpus: 1, working_set: 2 << 20, fill: 64 << 20 };

/// Moves a guest; returns the report and what each side, source first, had the kernel move in all its life.
fn traffic(transport: TransportChoice) -> (Report, [u64; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let names = ["source", "destination"];
    let followed = names.map(|name| Followed::new(folder.path(), name));
    let source = GUEST.start_by(&followed[0].program, &[], folder.path(), names[0]);
    let (mut destination, address) =
        Node::receiver_on(&followed[1].program, folder.path(), names[1], (lab::peer(), 0).into(), [""; 0])
            .unwrap();
    let report = hop_as(&source, &mut destination, &MigrationRequest { transport, ..request(address) });
    assert_runs(&destination);
    let sides = [source, destination];
    let pids = sides.each_ref().map(Node::pid);
    drop(sides);
    let calls: [BTreeMap<String, u64>; 2] = std::array::from_fn(|side| followed[side].bytes(pids[side]));
    let bytes = calls.each_ref().map(|calls| calls.values().sum());
    say::figures(
        &format!("{} MiB of pages over {}", report.sent() >> 20, report.transport),
        format_args!(
            "the source had {} KiB moved and the destination {}: {calls:?}",
            bytes[0] >> 10,
            bytes[1] >> 10
        ),
    );
    (report, bytes)
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn over_rdma_no_system_call_carries_pages() {
    let (report, bytes) = traffic(TransportChoice::Rdma);
    assert_eq!(report.transport, "rdma");
    assert!(report.sent() >= GUEST.fill);
    // Libraries, messages, the machine's state, and what the tests ask the API.
    assert!(bytes.iter().all(|bytes| *bytes < report.sent() / 32), "{bytes:?} of {}", report.sent());
    // What this would show if pages were carried.
    let (report, bytes) = traffic(TransportChoice::Tcp);
    assert_eq!(report.transport, "tcp");
    assert!(bytes.iter().all(|bytes| *bytes >= report.sent()), "{bytes:?} of {}", report.sent());
}
