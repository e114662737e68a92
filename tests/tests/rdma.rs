//! Migrations over RDMA, between two devices of one VM, and what happens when RDMA fails.

use migration::monitor::Phase;
use migration::report::{Report, Verdict};
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::Duration;
use whimbrel::api::model::TransportChoice;
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::lab::{self, CableCut, DeviceGone};
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{
    Guest, PATIENCE, assert_runs, hop, hop_as, receiver, receiver_on, request, wait_until,
};

/// Enough to send that RDMA in the lab takes seconds over it.
const LOADED: Guest = Guest { memory: 256 << 20, vcpus: 1, working_set: 2 << 20, fill: 64 << 20 };

/// A receiver on the far device.
fn far_receiver(folder: &Path, name: &str) -> (Node, SocketAddr) {
    receiver_on(folder, name, (lab::peer(), 0).into())
}

fn choice(to: SocketAddr, transport: TransportChoice) -> whimbrel::api::model::MigrationRequest {
    whimbrel::api::model::MigrationRequest { transport, ..request(to) }
}

fn declined(report: &Report) -> String {
    report.declined.iter().map(|d| format!("{}: {}\n", d.transport, d.why)).collect()
}

/// Ten moves, over RDMA and TCP by turns; the guest verifies all that it has at the end.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_chain_alternates_between_rdma_and_tcp() {
    let guest = Guest { working_set: 8 << 20, ..LOADED };
    let folder = tempfile::tempdir().unwrap();
    let mut node = guest.start(folder.path(), "guest-0");
    for number in 1..=10 {
        let (mut next, address) = far_receiver(folder.path(), &format!("guest-{number}"));
        let (transport, name) = match number % 2 {
            1 => (TransportChoice::Auto, "rdma"),
            _ => (TransportChoice::Tcp, "tcp"),
        };
        let report = hop_as(&node, &mut next, &choice(address, transport));
        assert_eq!(report.transport, name, "{}", declined(&report));
        assert!(report.declined.is_empty(), "{}", declined(&report));
        say::moved(number, &report);
        node = next;
    }
    settle(&node, &guest);
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn an_address_on_no_device_means_tcp_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let node = Guest::SMALL.start(folder.path(), "source");
    let (mut next, address) = receiver(folder.path(), "destination");
    let report = migrate(&node, address, TransportChoice::Rdma);
    assert_eq!(report.verdict, Verdict::Stayed);
    assert!(report.failure.unwrap().message.contains("127.0.0.1"), "the address is named");
    assert_runs(&node);
    next.expect("refused").unwrap();
    let report = hop(&node, &mut next, address);
    assert_eq!(report.transport, "tcp");
    assert!(declined(&report).contains("127.0.0.1 is on no RDMA device"), "{}", declined(&report));
    settle(&next, &Guest::SMALL);
}

fn migrate(node: &Node, to: SocketAddr, transport: TransportChoice) -> Report {
    whimbrel_tests::sides::migrate(node, &choice(to, transport))
}

/// Starts a move over RDMA with a control line as slow as `line`, and returns once it has come to `phase`.
fn begin(
    folder: &Path,
    transport: TransportChoice,
    phase: Phase,
    line: Duration,
) -> (Node, Node, SocketAddr, Proxy) {
    let source = LOADED.start(folder, "source");
    let (destination, address) = far_receiver(folder, "destination");
    let rules = Rules { control_delay: line, ..Rules::default() };
    let proxy = Proxy::start(address, rules);
    source.migrate(&choice(proxy.address(), transport)).unwrap();
    wait_until("the phase", || {
        let progress = source.migration().unwrap().progress;
        progress.phase == phase && (phase != Phase::Precopy || progress.sent > 8 << 20)
    });
    (source, destination, address, proxy)
}

/// Under `auto` a device that goes away costs nothing but time, whenever it goes.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_device_that_goes_away_in_any_phase_is_made_up_for_by_tcp() {
    for (phase, expected) in [
        // Before the destination has offered RDMA, or between the offer and the connection.
        (Phase::Preparing, None),
        (Phase::Precopy, Some("tcp")),
        // The last pages may be through.
        (Phase::Switchover, None),
        (Phase::Committed, Some("rdma")),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (source, mut destination, _, _proxy) =
            begin(folder.path(), TransportChoice::Auto, phase, Duration::from_millis(150));
        let gone = DeviceGone::begin();
        let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
        assert_eq!(report.verdict, Verdict::Moved, "{phase:?}: {:?}", report.failure);
        if let Some(expected) = expected {
            assert_eq!(report.transport, expected, "{phase:?}: {}", declined(&report));
        }
        say::figures(
            &format!("device removed in {phase:?}"),
            format_args!("moved over {}; {}", report.transport, declined(&report).trim()),
        );
        destination.expect("arrived").unwrap();
        settle(&destination, &LOADED);
        drop((source, destination));
        drop(gone);
    }
}

/// Under `rdma` it fails, the guest runs on, and moves over TCP at once.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_device_that_goes_away_leaves_the_guest_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (source, mut destination, address, _proxy) =
        begin(folder.path(), TransportChoice::Rdma, Phase::Precopy, Duration::ZERO);
    let gone = DeviceGone::begin();
    let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Stayed);
    say::figures("device removed under --transport rdma", report.failure.unwrap());
    assert_runs(&source);
    destination.expect("refused").unwrap();
    let report = hop(&source, &mut destination, address);
    assert_eq!(report.transport, "tcp");
    settle(&destination, &LOADED);
    drop((source, destination));
    drop(gone);
}

/// A cable that is out for less than the retransmissions' patience is not noticed but by the clock.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_short_outage_is_ridden_out() {
    let folder = tempfile::tempdir().unwrap();
    let (source, mut destination, _, _proxy) =
        begin(folder.path(), TransportChoice::Auto, Phase::Precopy, Duration::ZERO);
    let cut = CableCut::new();
    thread::sleep(Duration::from_millis(700));
    drop(cut);
    let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    say::figures("cable out for 0.7 s", format_args!("moved over {}", report.transport));
    destination.expect("arrived").unwrap();
    settle(&destination, &LOADED);
}

/// A cable that stays out takes TCP with it: the guest runs on, and moves when the cable is back.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_long_outage_leaves_the_guest_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let source = LOADED.start(folder.path(), "source");
    let (mut destination, address) = far_receiver(folder.path(), "destination");
    let mut asked = choice(address, TransportChoice::Auto);
    asked.silence_s = 3;
    source.migrate(&asked).unwrap();
    wait_until("memory travels", || source.migration().unwrap().progress.sent > 8 << 20);
    let cut = CableCut::new();
    let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Stayed);
    say::figures("cable out", report.failure.unwrap());
    assert_runs(&source);
    drop(cut);
    destination.expect("refused").unwrap();
    // Over which transport is up to the device: soft-RoCE's sometimes receives nothing after an outage under
    // load until it is made anew.
    let report = hop(&source, &mut destination, address);
    say::figures("cable back", format_args!("moved over {}", report.transport));
    settle(&destination, &LOADED);
}
