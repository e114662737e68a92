//! Two hosts: the guest moves back and forth between two joined VMs, ten times, alternately over RDMA and
//! TCP. The same test runs in both VMs. The number of a move tells each of them which side it is.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::lab;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, receiver_on, request};

const MOVES: u16 = 10;

/// Where the receiver of a move listens.
fn port(number: u16) -> u16 {
    5000 + number
}

#[test]
#[ignore = "needs two joined VMs with RDMA devices: ci/rdma runs it in the lab"]
fn a_guest_goes_to_and_fro_between_two_hosts() {
    let guest = Guest { memory: 256 << 20, vcpus: 1, working_set: 4 << 20, fill: 32 << 20 };
    let folder = tempfile::tempdir().unwrap();
    // The guest begins at a: odd moves go from a to b, even ones back.
    let sends_odd = lab::node() == "a";
    let mut node = sends_odd.then(|| guest.start(folder.path(), "guest-0"));
    for number in 1..=MOVES {
        node = match node.take() {
            Some(node) => {
                send(&node, number);
                None
            }
            None => {
                let listen = (lab::address(), port(number)).into();
                let (mut next, _) = receiver_on(folder.path(), &format!("guest-{number}"), listen);
                arrived(&mut next);
                Some(next)
            }
        };
    }
    assert_eq!(node.is_some(), sends_odd, "after an even number of moves it is back");
    if let Some(node) = node {
        settle(&node, &guest);
        say::figures("two hosts", format_args!("{MOVES} moves; all right"));
    }
}

/// Waits for the guest, past callers that only knocked.
fn arrived(next: &mut Node) {
    loop {
        match next.next_event().unwrap()["event"].as_str() {
            Some("arrived") => return,
            Some("refused") => {}
            other => panic!("{other:?}: {}", next.stderr()),
        }
    }
}

/// Sends the guest to the other host as soon as that listens.
fn send(node: &Node, number: u16) {
    let (transport, name) =
        if number % 4 < 2 { (TransportChoice::Rdma, "rdma") } else { (TransportChoice::Tcp, "tcp") };
    let to = SocketAddr::new(lab::peer(), port(number));
    let asked = MigrationRequest { transport, ..request(to) };
    let deadline = Instant::now() + PATIENCE;
    loop {
        node.migrate(&asked).unwrap();
        let report = node.wait_migration(PATIENCE).unwrap().report.unwrap();
        match report.failure {
            None => {
                assert_eq!(report.transport, name);
                say::moved(number.into(), &report);
                return;
            }
            Some(why) if why.message.contains("refused") && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(200));
            }
            Some(why) => panic!("move {number} over {name}: {why}"),
        }
    }
}
