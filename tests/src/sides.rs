//! The two sides of a migration, each a process.

use crate::program::whimbrel;
use migration::policy::OnStall;
use migration::report::{Report, Verdict};
use serde_json::json;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use vmm::guest::Testimony;
use whimbrel::api::model::{MigrationRequest, VmState};
use whimbrel::node::Node;

/// How long anything may take that is sure to happen.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// An embedded guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Bytes of RAM.
    pub memory: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes that it keeps rewriting.
    pub working_set: u64,
    /// Bytes that hold random content beside that.
    pub fill: u64,
}

impl Guest {
    /// A guest with one vCPU that rewrites 2 MiB: quick to start and to move.
    pub const SMALL: Guest = Guest { memory: 32 << 20, vcpus: 1, working_set: 2 << 20, fill: 0 };

    /// The options of `whimbrel run` for it.
    pub fn arguments(&self) -> Vec<String> {
        let size = |bytes: u64| bytes.to_string();
        let options = [
            ("--memory", size(self.memory)),
            ("--vcpus", self.vcpus.to_string()),
            ("--working-set", size(self.working_set)),
            ("--fill", size(self.fill)),
            ("--serial", "none".into()),
        ];
        options.into_iter().flat_map(|(option, value)| [option.to_string(), value]).collect()
    }

    /// Starts it in a process of its own; returns when it is at work.
    pub fn start(&self, folder: &Path, name: &str) -> Node {
        self.start_by(whimbrel(), &[], folder, name)
    }

    /// The same by a program that stands in for `whimbrel`, with further arguments.
    pub fn start_by(&self, program: &Path, more: &[&str], folder: &Path, name: &str) -> Node {
        let arguments = self.arguments().into_iter().chain(more.iter().map(ToString::to_string));
        let mut node =
            Node::start(program, folder, name, std::iter::once("run".to_string()).chain(arguments)).unwrap();
        node.expect("running").unwrap();
        node.wait_guest("the guest's start", PATIENCE, |guest| guest.state == "running").unwrap();
        node
    }
}

/// A receiver in a process of its own, and where it listens.
pub fn receiver(folder: &Path, name: &str) -> (Node, SocketAddr) {
    Node::receiver(whimbrel(), folder, name, [""; 0]).unwrap()
}

/// The same at an address of this host.
pub fn receiver_on(folder: &Path, name: &str, listen: SocketAddr) -> (Node, SocketAddr) {
    Node::receiver_on(whimbrel(), folder, name, listen, [""; 0]).unwrap()
}

/// A migration that switches over in any case: how fast this machine is decides nothing.
pub fn request(to: SocketAddr) -> MigrationRequest {
    let mut request: MigrationRequest = serde_json::from_value(json!({ "to": to.to_string() })).unwrap();
    request.on_stall = OnStall::Switch;
    request.insecure = true;
    request
}

/// Moves the guest; it must succeed.
pub fn hop(from: &Node, to: &mut Node, address: SocketAddr) -> Report {
    hop_as(from, to, &request(address))
}

/// Moves the guest as asked; it must succeed.
pub fn hop_as(from: &Node, to: &mut Node, request: &MigrationRequest) -> Report {
    let report = migrate(from, request);
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    to.expect("arrived").unwrap();
    report
}

/// Tries to move the guest, to the end.
pub fn migrate(from: &Node, request: &MigrationRequest) -> Report {
    from.migrate(request).unwrap();
    from.wait_migration(PATIENCE).unwrap().report.unwrap()
}

/// The guest runs at this side: its counters advance, and it finds nothing wrong.
pub fn assert_runs(node: &Node) -> Testimony {
    let vm = node.status().unwrap();
    assert_eq!(vm.state, VmState::Running, "{vm:?}");
    let before = vm.guest.unwrap();
    let what = "the guest's counters advance";
    let after = node
        .wait_guest(what, PATIENCE, |now| {
            now.samples > before.samples
                && now.pit_ticks > before.pit_ticks
                && now.ticks - now.pit_ticks > before.ticks - before.pit_ticks
                && (now.pages > before.pages || now.working_set == 0)
        })
        .unwrap();
    assert!(after.clean, "{:?}", after.problems);
    after
}

/// No guest has arrived at this receiver.
pub fn is_empty(node: &Node) -> bool {
    matches!(node.status().unwrap().state, VmState::Waiting | VmState::Receiving)
}

/// The guest stands still at this side: nothing of it advances.
pub fn assert_stands_still(node: &Node) {
    let counters = || node.status().unwrap().guest.map(|g| (g.samples, g.ticks, g.pages));
    let before = counters();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(counters(), before);
}

/// Waits until something is so.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "{what} does not happen");
        thread::sleep(Duration::from_millis(2));
    }
}
