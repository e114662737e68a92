//! The last move of a guest: into the test's own process, where it is told to verify all that it has.
//!
//! From outside, a guest can only be asked how it is. In this process its memory is at hand, so it can be
//! told to verify each page of its working set once more and to power off; and what it says then is
//! final.

use crate::namespace::Namespace;
use crate::sides::{Guest, PATIENCE, request};
use migration::destination::Migration;
use migration::report::Verdict;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use transport_tcp::{Listener, TcpDestination};
use vmm::guest::{self, Request, Testimony};
use vmm::incoming::{IncomingHost, IncomingOptions};
use vmm::{Machine, Outcome, SerialOutput};
use whimbrel::node::Node;

/// Moves the guest of `node` here, with all memory compared on the way, has it verify everything and power
/// off; nothing may be wrong.
pub fn settle(node: &Node, expected: &Guest) -> Testimony {
    let listener =
        Namespace::of(node.pid()).unwrap().within(|| Listener::bind(([127, 0, 0, 1], 0).into()).unwrap());
    let mut request = request(listener.local_addr());
    request.compare_memory = true;
    let taking = thread::spawn(move || take(&listener));
    node.migrate(&request).unwrap();
    let report = node.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    verify(&taking.join().unwrap(), expected)
}

fn take(listener: &Listener) -> Arc<Machine> {
    let options = IncomingOptions { serial: SerialOutput::Null, ..IncomingOptions::default() };
    let mut host = IncomingHost::open(options).unwrap();
    let mut call = listener.next_control(PATIENCE).unwrap().unwrap();
    let transport = TcpDestination::new(listener);
    let taken = Migration::new(&mut host, &mut call).transport(transport).software("inspector").run();
    taken.unwrap().conclude().machine()
}

fn verify(machine: &Machine, expected: &Guest) -> Testimony {
    guest::request(machine, Request::PowerOff);
    let outcome = machine.wait_timeout(PATIENCE);
    let testimony = guest::testimony(machine.memory()).unwrap();
    // Of a guest that never ends it matters most whether it still does something.
    thread::sleep(Duration::from_millis(100));
    let later = guest::testimony(machine.memory()).unwrap();
    assert_eq!(outcome, Some(Outcome::PoweredOff), "{testimony:?}, and 0.1 s later {later:?}");
    assert!(testimony.clean, "{:?}", testimony.problems);
    assert_eq!(testimony.state, "finished");
    assert_eq!(testimony.vcpus, expected.vcpus);
    assert_eq!(testimony.working_set, expected.working_set);
    assert_eq!(testimony.verified * 4096, expected.working_set);
    testimony
}
