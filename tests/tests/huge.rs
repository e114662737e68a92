//! Guests in huge pages. The lab's VM reserves none by itself; the test reserves them, and only there.

use std::fs;
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::lab;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, hop_as, receiver_on, request};

const GUEST: Guest = Guest { memory: 64 << 20, vcpus: 1, working_set: 8 << 20, fill: 24 << 20 };

/// Bytes of a huge page.
const HUGE: u64 = 2 << 20;

/// Has the kernel set huge pages aside.
fn reserve(pages: u64) {
    // Names a variable of the lab, without which this would change the host.
    let _ = lab::node();
    fs::write("/proc/sys/vm/nr_hugepages", pages.to_string()).expect("a kernel with huge pages");
    assert_eq!(meminfo("HugePages_Total:"), pages, "memory is too fragmented");
}

fn meminfo(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).expect(name);
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Bytes of a process's memory that is mapped by huge pages.
fn mapped_huge(node: &Node) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", node.pid())).unwrap();
    let kib = |line: &str, name| {
        line.strip_prefix(name).map(|rest| rest.trim().trim_end_matches(" kB").parse().unwrap())
    };
    let (mut size, mut huge) = (0u64, 0);
    for line in smaps.lines() {
        if let Some(kib) = kib(line, "Size:") {
            size = kib;
        } else if kib(line, "KernelPageSize:") == Some(HUGE >> 10) {
            huge += size;
        }
    }
    huge << 10
}

/// Over RDMA, over TCP, and over RDMA again; both sides are in huge pages each time.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_guest_in_huge_pages_moves() {
    // Three machines may be there at once, the last of them in this process.
    reserve(3 * GUEST.memory / HUGE);
    let folder = tempfile::tempdir().unwrap();
    let mut node = GUEST.start_by(whimbrel(), &["--pages", "2m"], folder.path(), "guest-0");
    assert_eq!(mapped_huge(&node), GUEST.memory);
    for (number, transport) in
        [(1, TransportChoice::Rdma), (2, TransportChoice::Tcp), (3, TransportChoice::Rdma)]
    {
        let name = format!("guest-{number}");
        let (mut next, address) = receiver_on(folder.path(), &name, (lab::peer(), 0).into());
        let free = meminfo("HugePages_Free:");
        let report = hop_as(&node, &mut next, &MigrationRequest { transport, ..request(address) });
        assert!(report.declined.is_empty(), "{:?}", report.declined);
        assert_eq!(mapped_huge(&next), GUEST.memory);
        let taken = (free - meminfo("HugePages_Free:")) * HUGE;
        let here: u64 = report.lanes.iter().map(|lane| lane.registration_us).sum();
        say::moved(number, &report);
        say::figures(
            "huge pages",
            format_args!("{} MiB taken there, registered here in {here} µs", taken >> 20),
        );
        assert!(taken >= GUEST.fill + GUEST.working_set, "{taken} bytes");
        assert_eq!(report.transport == "rdma", here > 0);
        node = next;
    }
    settle(&node, &GUEST);
}
