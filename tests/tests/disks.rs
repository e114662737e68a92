//! `kill -9` of either side at fifty random moments, as in `kill`, of a guest that keeps a journal on a disk that both
//! sides may open: at most one process ever touches it, and only while it has its lock; what is on it is never lost, torn
//! or of another time; and the guest runs at exactly one side, or has died with the machine that it ran on and
//! can be started from the disk.
//!
//! That only one touches the disk is shown by the kernel ([`Observer`]), not by what the sides say of themselves.

use migration::report::Verdict;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use vmm::api::model::VmState;
use vmm::node::Node;
use whimbrel_tests::command::run_command;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::journal::{BLOCKS, Disk};
use whimbrel_tests::kills::{LINE, Outcomes, Schedule, Side, schedules};
use whimbrel_tests::observer::{Observer, Standing, owners};
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::proxy::{Proxy, Rules, Way};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, assert_stands_still, hop, request};

/// A disk, and who touches it.
struct Scene {
    folder: tempfile::TempDir,
    disk: Disk,
    observer: Option<Observer>,
}

impl Scene {
    fn new() -> Self {
        // Where programs are built there is a real file system, more likely than where temporary files are.
        let disk = Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")));
        let observer = match Observer::begin(&disk.path()) {
            Ok(observer) => Some(observer),
            Err(error) => {
                say::skipped(
                    "who touches a disk",
                    format_args!("no FAN_PRE_ACCESS (Linux 6.14, root): {error}"),
                );
                None
            }
        };
        Scene { folder: tempfile::tempdir().unwrap(), disk, observer }
    }

    fn guest(&self, name: &str) -> Node {
        let more = self.disk.of_the_guest();
        let more: Vec<_> = more.iter().map(String::as_str).collect();
        Guest::SMALL.start_by(whimbrel(), &more, self.folder.path(), name)
    }

    fn receiver(&self, name: &str) -> (Node, SocketAddr) {
        Node::receiver(whimbrel(), self.folder.path(), name, self.disk.of_a_receiver()).unwrap()
    }

    /// The guest works at this side, its disk included.
    fn assert_writes(&self, node: &Node) {
        let before = assert_runs(node).journal;
        let went_round = |guest: &vmm::guest::Testimony| guest.journal > before + BLOCKS;
        let after = node.wait_guest("the journal goes on", PATIENCE, went_round).unwrap();
        assert!(after.clean, "{:?}", after.problems);
    }

    /// The guest works at this side; at its end all is well, and the disk has what the guest wrote.
    fn finish_at(&self, node: &Node) {
        self.assert_writes(node);
        let testimony = settle(node, &Guest::SMALL);
        assert_eq!(self.disk.entries(), Ok(testimony.journal));
    }

    /// The guest is gone: what it wrote is there, `known` entries at least, and another starts from its disk, moves to
    /// `receiver`, if there is one, and works.
    fn finish_anew(&self, known: u64, receiver: Option<(&mut Node, SocketAddr)>) {
        let entries = self.disk.entries().unwrap();
        assert!(entries >= known, "{entries} entries of {known} that were confirmed");
        let mut other = self.guest("other");
        if let Some((receiver, address)) = receiver {
            hop(&other, receiver, address);
            self.finish_at(receiver);
        } else {
            self.assert_writes(&other);
            other.kill().unwrap();
        }
    }

    /// Nobody touched the disk without its lock, or after another had. How many had it.
    fn owners(&self) -> usize {
        let Some(observer) = &self.observer else { return 0 };
        let mut seen = observer.seen();
        // This process reads it when nobody has it. That it has the lock is where guests have come to be inspected.
        seen.retain(|access| access.pid != std::process::id() || access.standing != Standing::Unlocked);
        let owners = owners(&seen).unwrap();
        assert!(!owners.is_empty(), "the observer sees nothing");
        owners.len()
    }
}

/// How many entries a guest has written for certain.
fn confirmed(node: &Node) -> u64 {
    node.status().ok().and_then(|vm| vm.guest).map_or(0, |guest| guest.journal)
}

#[test]
fn fifty_kills_with_a_disk() {
    let (mut outcomes, mut touched) = (Outcomes::default(), 0);
    for schedule in schedules("kill -9 with a disk") {
        let scene = Scene::new();
        let mut source = scene.guest("source");
        let (mut destination, address) = scene.receiver("destination");
        source.wait_guest("a full journal", PATIENCE, |guest| guest.journal > BLOCKS).unwrap();
        let proxy = Proxy::start(address, LINE);
        let mut known = 0;
        let phase =
            schedule.strike(&mut source, &mut destination, &proxy, |source| known = confirmed(source));
        let case = Case { schedule, proxy, known };
        let outcome = match case.schedule.victim {
            Side::Source => case.source_died(&mut destination, address, &scene),
            Side::Destination => case.destination_died(&mut source, &scene),
        };
        outcomes.add(schedule.victim, phase, outcome);
        touched += scene.owners();
    }
    outcomes.tell();
    say::figures(
        "50 disks",
        format_args!("{touched} processes had one, each while it had its lock and none after the next"),
    );
}

#[derive(Debug)]
struct Case {
    schedule: Schedule,
    proxy: Proxy,
    /// Entries of the journal that the guest is known to have written.
    known: u64,
}

impl Case {
    fn source_died(&self, destination: &mut Node, address: SocketAddr, scene: &Scene) -> &'static str {
        match destination.next_event().unwrap() {
            event if event["event"] == "arrived" => {
                assert!(self.proxy.delivered(Way::Up, "Commit"), "{self:?}: taken over without Commit");
                scene.finish_at(destination);
                "went on at the destination"
            }
            event => {
                assert_eq!(event["event"], "refused", "{self:?}");
                assert!(
                    !self.proxy.delivered(Way::Up, "Commit"),
                    "{self:?}: discarded after Commit: {event}"
                );
                assert!(destination.status().is_err(), "{self:?}: a guest is there");
                scene.finish_anew(self.known, Some((destination, address)));
                "died with its machine, started anew"
            }
        }
    }

    fn destination_died(&self, source: &mut Node, scene: &Scene) -> &'static str {
        let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
        match report.verdict {
            // Before Commit, or by the disk's lock.
            Verdict::Stayed => {
                assert!(!self.proxy.delivered(Way::Down, "Running"), "{self:?}: {report:?}");
                scene.finish_at(source);
                if self.proxy.delivered(Way::Down, "Ready") {
                    "taken back by its lock"
                } else {
                    "went on at the source"
                }
            }
            // The destination had the disk before it died.
            Verdict::Held => {
                assert!(self.proxy.delivered(Way::Up, "Commit"), "{self:?}: held before Commit: {report:?}");
                held_for_good(source, scene, self.known);
                "died with its machine, held at the source, started anew"
            }
            Verdict::Moved => {
                assert!(self.proxy.delivered(Way::Down, "Running"), "{self:?}: moved without a word");
                source.expect("moved").unwrap();
                assert_eq!(source.wait_exit(PATIENCE).unwrap().code(), Some(0));
                scene.finish_anew(self.known, None);
                "had moved, died with its machine, started anew"
            }
        }
    }
}

/// The source holds a guest whose disk somebody else has had since: it never runs again, not even by force.
fn held_for_good(source: &mut Node, scene: &Scene, known: u64) {
    assert_eq!(source.status().unwrap().state, VmState::Held);
    assert_stands_still(source);
    for _ in 0..2 {
        let refused = source.resume(true).unwrap_err().to_string();
        assert!(refused.contains("has been used elsewhere since"), "{refused}");
    }
    assert_stands_still(source);
    // It gives way.
    scene.finish_anew(known, None);
    assert_eq!(source.quit().unwrap().code(), Some(0));
}

/// The destination runs the guest for a while, and dies before the source has heard of it. Nobody has the lock then, but
/// the guest's memory at the source is older than its disk.
#[test]
fn a_guest_that_is_older_than_its_disk_never_runs() {
    for lock_is_free in [false, true] {
        let scene = Scene::new();
        let mut source = scene.guest("source");
        let (mut destination, address) = scene.receiver("destination");
        source.wait_guest("a full journal", PATIENCE, |guest| guest.journal > BLOCKS).unwrap();
        let rules = Rules {
            // Long enough to kill the destination while its word is on its way.
            control_delay: Duration::from_millis(if lock_is_free { 1000 } else { 0 }),
            cut_before: Some((Way::Down, "Running")),
            ..Rules::default()
        };
        let proxy = Proxy::start(address, rules);
        let mut request = request(proxy.address());
        request.silence_s = 60;
        source.migrate(&request).unwrap();
        destination.expect("arrived").unwrap();
        let before = confirmed(&destination);
        let on = |guest: &vmm::guest::Testimony| guest.journal > before + 2;
        let known = destination.wait_guest("the journal goes on", PATIENCE, on).unwrap().journal;
        if !lock_is_free {
            let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
            assert_eq!(report.verdict, Verdict::Held, "{:?}", report.failure);
            let refused = source.resume(true).unwrap_err().to_string();
            assert!(refused.contains(&format!("in use by process {}", destination.pid())), "{refused}");
        }
        destination.kill().unwrap();
        let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
        assert_eq!(report.verdict, Verdict::Held, "{:?}", report.failure);
        held_for_good(&mut source, &scene, known);
        scene.owners();
    }
    say::figures(
        "a guest older than its disk",
        "held at the source, also by force, and started anew from the disk",
    );
}

/// That the means of proof would notice.
#[test]
fn a_second_writer_is_noticed() {
    let scene = Scene::new();
    let source = scene.guest("source");
    source.wait_guest("a full journal", PATIENCE, |guest| guest.journal > BLOCKS).unwrap();
    if scene.observer.is_some() {
        assert_eq!(scene.owners(), 1);
    }
    // One block, of zeros, once: by a program that asks for no lock.
    let target = format!("of={}", scene.disk.path().display());
    let options = ["if=/dev/zero", &target, "bs=4k", "count=1", "seek=5", "conv=notrunc", "oflag=direct"];
    assert_eq!(run_command(Command::new("dd").args(options)).code, Some(0));
    let found = source.wait_guest("the guest notices", PATIENCE, |guest| !guest.clean).unwrap();
    assert!(found.problems[0].contains("1 wrong blocks on the disk: block 5"), "{:?}", found.problems);
    if let Some(observer) = &scene.observer {
        let what = owners(&observer.seen()).unwrap_err();
        assert!(what.contains("without its lock"), "{what}");
    }
    say::figures("a second writer", &found.problems[0]);
}
