//! A guest that keeps a journal on a disk that two hosts may open, and what must hold of both whatever fails.

use crate::inspect::settle;
use crate::journal::{BLOCKS, Disk};
use crate::kills::{LINE, Outcomes, Schedule, Side, schedules};
use crate::nfs::Nfs;
use crate::observer::{Observer, Standing, owners};
use crate::program::whimbrel;
use crate::proxy::{Proxy, Rules, Way};
use crate::say;
use crate::sides::{Guest, PATIENCE, assert_runs, assert_stands_still, hop, is_empty, request};
use migration::report::Verdict;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use whimbrel::api::model::VmState;
use whimbrel::node::Node;

/// A disk, and who touches it.
pub struct Scene {
    folder: tempfile::TempDir,
    /// The disk.
    pub disk: Disk,
    /// The kernel's word, where it has one.
    pub observer: Option<Observer>,
    /// Its guests.
    pub like: Guest,
    /// The `whimbrel` of each host.
    programs: [PathBuf; 2],
}

/// Which host.
#[derive(Clone, Copy, Debug)]
pub enum Host {
    /// The one that the guest comes from.
    A,
    /// The one that it goes to.
    B,
}

impl Scene {
    /// A disk below `parent`, of one host, which is both.
    ///
    /// # Panics
    /// Where no files can be written.
    pub fn local(parent: &Path) -> Self {
        let disk = Disk::new(parent);
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
        Scene { observer, ..Scene::unobserved(disk) }
    }

    /// A disk of one host, which is both, and nobody watches who touches it.
    pub fn unobserved(disk: Disk) -> Self {
        let programs = [whimbrel(), whimbrel()].map(Path::to_path_buf);
        let folder = tempfile::tempdir().expect("a folder");
        Scene { folder, disk, observer: None, like: Guest::SMALL, programs }
    }

    /// A disk on an NFS server. Each host is a client of its own. The lab's kernel cannot tell which process
    /// touches the disk.
    ///
    /// # Panics
    /// Outside the lab.
    pub fn on_nfs() -> Self {
        let nfs = Nfs::get();
        let (folder, disk) = (tempfile::tempdir().expect("a folder"), Disk::new(&nfs.folder()));
        Scene { folder, disk, observer: None, like: Guest::SMALL, programs: nfs.programs() }
    }

    /// The `whimbrel` of this host.
    pub fn program(&self, host: Host) -> &Path {
        &self.programs[host as usize]
    }

    /// Starts the guest, and waits until its journal has come round.
    ///
    /// # Panics
    /// When it does not start.
    pub fn guest(&self, host: Host, name: &str) -> Node {
        let more = self.disk.of_the_guest();
        let more: Vec<_> = more.iter().map(String::as_str).collect();
        let node = self.like.start_by(self.program(host), &more, self.folder.path(), name);
        node.wait_guest("a full journal", PATIENCE, |guest| guest.journal > BLOCKS).expect("a journal");
        node
    }

    /// Starts a receiver that may have the disk.
    ///
    /// # Panics
    /// When it does not come to listen.
    pub fn receiver(&self, host: Host, name: &str) -> (Node, SocketAddr) {
        self.receiver_on(host, name, (Ipv4Addr::LOCALHOST, 0).into())
    }

    /// The same at an address of this host.
    pub fn receiver_on(&self, host: Host, name: &str, listen: SocketAddr) -> (Node, SocketAddr) {
        let (program, more) = (self.program(host), self.disk.of_a_receiver());
        Node::receiver_on(program, self.folder.path(), name, listen, more).expect("a receiver")
    }

    /// Where its processes leave their logs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The guest works at this side, its disk included.
    pub fn assert_writes(&self, node: &Node) {
        let before = assert_runs(node).journal;
        let went_round = |guest: &vmm::guest::Testimony| guest.journal > before + BLOCKS;
        let after = node.wait_guest("the journal goes on", PATIENCE, went_round).unwrap();
        assert!(after.clean, "{:?}", after.problems);
    }

    /// The guest works at this side; at its end all is well, and the disk has what the guest wrote.
    pub fn finish_at(&self, node: &Node) {
        self.assert_writes(node);
        let testimony = settle(node, &self.like);
        assert_eq!(self.disk.entries(), Ok(testimony.journal));
    }

    /// Nobody has the disk, and what the guest wrote is there, `known` entries at least.
    pub fn assert_kept(&self, known: u64) {
        let entries = self.disk.entries().unwrap();
        assert!(entries >= known, "{entries} entries of {known} that were confirmed");
    }

    /// The guest is gone: what it wrote is there, `known` entries at least. Another starts with its disk.
    pub fn guest_anew(&self, known: u64) -> Node {
        self.assert_kept(known);
        self.disk.begin_anew();
        self.guest(Host::A, "other")
    }

    /// The same, and that one moves to `receiver`, if there is one, and works.
    pub fn finish_anew(&self, known: u64, receiver: Option<(&mut Node, SocketAddr)>) {
        let mut other = self.guest_anew(known);
        if let Some((receiver, address)) = receiver {
            hop(&other, receiver, address);
            self.finish_at(receiver);
        } else {
            self.assert_writes(&other);
            other.kill().unwrap();
        }
    }

    /// Nobody touched the disk without its lock, or after another had. How many had it.
    pub fn owners(&self) -> usize {
        let Some(observer) = &self.observer else { return 0 };
        let mut seen = observer.seen();
        // This process reads it when nobody has it. That it has the lock is where guests have come to be
        // inspected.
        seen.retain(|access| access.pid != std::process::id() || access.standing != Standing::Unlocked);
        let owners = owners(&seen).unwrap();
        assert!(!owners.is_empty(), "the observer sees nothing");
        owners.len()
    }
}

/// How many entries a guest has written for certain.
pub fn confirmed(node: &Node) -> u64 {
    node.status().ok().and_then(|vm| vm.guest).map_or(0, |guest| guest.journal)
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
                assert!(is_empty(destination), "{self:?}: a guest is there");
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
            other => panic!("{self:?}: {other:?}"),
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

/// Kills either side `count` times, at random moments: the guest runs at exactly one side, or has died with
/// its machine. How many processes were seen to have the disk, one after the other.
///
/// # Panics
/// When anything else comes of it.
pub fn kills(scenario: &str, count: usize, scene: impl Fn() -> Scene) -> usize {
    let (mut outcomes, mut touched) = (Outcomes::default(), 0);
    for schedule in schedules(scenario, count) {
        let scene = scene();
        let mut source = scene.guest(Host::A, "source");
        let (mut destination, address) = scene.receiver(Host::B, "destination");
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
    outcomes.tell(count);
    touched
}

/// The destination runs the guest for a while, and dies before the source has heard of it. Nobody has the
/// lock then, but the guest's memory at the source is older than its disk, and must never run. While the
/// destination has the lock, the source names the `holder`.
///
/// # Panics
/// When it does run.
pub fn older_than_its_disk(scene: impl Fn() -> Scene, holder: impl Fn(&Node) -> String) {
    for lock_is_free in [false, true] {
        let scene = scene();
        let mut source = scene.guest(Host::A, "source");
        let (mut destination, address) = scene.receiver(Host::B, "destination");
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
            assert!(refused.contains(&format!("in use by {}", holder(&destination))), "{refused}");
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
