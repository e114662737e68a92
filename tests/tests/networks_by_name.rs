//! Guests that name their networks and storages: each host has its own bridges and folders for them, makes
//! the taps, and leaves none behind. Needs root, for network namespaces.

use migration::Code;
use migration::report::{Report, Verdict};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use whimbrel::host::links;
use whimbrel::node::Node;
use whimbrel_tests::command::{must, run};
use whimbrel_tests::journal::{BLOCKS, Disk};
use whimbrel_tests::namespace::Namespace;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, hop, is_empty, migrate, request, wait_until};
use whimbrel_tests::wire::{HEADER, Wire};

const MAC: &str = "52:54:00:00:00:07";
const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
const MTU: u32 = 1400;
const RARP: u16 = 0x8035;
/// Capabilities: to make taps, and to lock memory, which all of these processes may.
const NET_ADMIN: u64 = 1 << 12;
const IPC_LOCK: u64 = 1 << 14;

/// A host: a network namespace with a bridge, and what says which network that is.
struct Host {
    namespace: Namespace,
    address: String,
    bridge: String,
    config: PathBuf,
}

/// Two hosts that reach each other, and where their processes have their files.
struct Hosts {
    folder: tempfile::TempDir,
    a: Host,
    b: Host,
}

impl Hosts {
    /// With a bridge called otherwise at each, which is the network of this name there.
    fn new(networks: [&str; 2]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let host = |letter: &str, number: u8, network: &str| {
            let (bridge, address) = (format!("br-{letter}"), format!("10.77.0.{number}"));
            let namespace = Namespace::new().unwrap();
            namespace.within(|| {
                must("ip link set lo up");
                must(&format!("ip link add {bridge} mtu {MTU} type bridge"));
                // The network that is behind the bridge.
                must(&format!("ip link add out-{letter} type veth peer name far-{letter}"));
                must(&format!("ip link set out-{letter} mtu {MTU} master {bridge}"));
                for link in [&bridge, &format!("out-{letter}"), &format!("far-{letter}")] {
                    must(&format!("ip link set {link} addrgenmode none"));
                    must(&format!("ip link set {link} up"));
                }
            });
            let config = folder.path().join(format!("host-{letter}.toml"));
            fs::write(&config, format!("[networks.{network}]\nbridge = '{bridge}'\n")).unwrap();
            Host { namespace, address, bridge, config }
        };
        let (a, b) = (host("a", 1, networks[0]), host("b", 2, networks[1]));
        let beyond = b.namespace.path();
        a.namespace.within(|| must(&format!("ip link add wire type veth peer name wire netns {beyond}")));
        for host in [&a, &b] {
            host.namespace.within(|| {
                must(&format!("ip address add {}/24 dev wire", host.address));
                must("ip link set wire up");
            });
        }
        Hosts { folder, a, b }
    }

    /// A guest at the first host.
    fn guest(&self, net: &str) -> Node {
        let more = ["--net", net, "--host-config", self.a.config.to_str().unwrap()];
        self.a.namespace.within(|| Guest::SMALL.start_by(whimbrel(), &more, self.folder.path(), "web1"))
    }

    /// A receiver at a host.
    fn receiver(&self, host: &Host, name: &str, more: &[&str]) -> (Node, SocketAddr) {
        let more = [&["--host-config", host.config.to_str().unwrap()], more].concat();
        let listen = format!("{}:0", host.address).parse().unwrap();
        host.namespace
            .within(|| Node::receiver_on(whimbrel(), self.folder.path(), name, listen, more).unwrap())
    }
}

impl Host {
    /// The tap that was made here, if there is one.
    fn tap(&self) -> Option<links::Link> {
        self.namespace.within(|| links::find("whim0").unwrap())
    }

    /// The tap that was made here for a process is as it should be.
    fn assert_tap(&self, node: &Node, machine: &str) {
        let tap = self.tap().unwrap();
        let bridge = self.namespace.within(|| links::find(&self.bridge).unwrap().unwrap());
        assert_eq!((tap.bridge, tap.mtu, tap.up), (Some(bridge.index), MTU, true), "{tap:?}");
        let alias = format!("whimbrel {}: interface 1 of {machine}, network blue", node.pid());
        assert_eq!(tap.alias, alias);
        // The bridge does not change its address for it, and the machine's process could not have made it.
        let shown = self.namespace.within(|| must("ip link show whim0"));
        assert!(shown.contains("link/ether fe:"), "{shown}");
        assert_eq!(capabilities(node.pid()) & NET_ADMIN, 0);
    }

    /// There is no tap any more, or will be none.
    fn wait_no_tap(&self) {
        wait_until("the end of the tap", || self.tap().is_none());
    }
}

/// What a process's status says.
fn status(pid: u32, field: &str) -> String {
    // It may be gone.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut fields = status.lines().filter_map(|line| line.split_once(":\t"));
    fields.find(|(name, _)| *name == field).map(|(_, value)| value.into()).unwrap_or_default()
}

fn capabilities(pid: u32) -> u64 {
    u64::from_str_radix(&status(pid, "CapEff"), 16).unwrap()
}

/// A migration that fails before anything has moved.
fn assert_refused(report: &Report, code: Code, parts: &[&str]) {
    let failure = report.failure.as_ref().unwrap();
    assert_eq!((report.verdict, failure.code), (Verdict::Stayed, code), "{failure:?}");
    for part in parts {
        assert!(failure.message.contains(part), "no {part:?} in {failure:?}");
    }
    assert!(report.rounds.is_empty(), "{:?}", report.rounds);
}

#[test]
fn a_guest_arrives_on_the_bridge_of_its_network() {
    let hosts = Hosts::new(["blue", "blue"]);
    let wire = hosts.b.namespace.within(|| Wire::with_protocol("far-b", RARP));
    for pairs in [1, 4] {
        let mut guest = hosts.guest(&format!("network=blue,mac={MAC},queues={pairs}"));
        hosts.a.assert_tap(&guest, "web1");
        let (mut next, address) = hosts.receiver(&hosts.b, "next", &[]);
        assert_eq!(hosts.b.tap(), None, "none before a guest comes");
        hop(&guest, &mut next, address);
        // Its name on the other host is the operator's choice; the tap says what it is called where it came
        // from.
        hosts.b.assert_tap(&next, "web1");
        let frame = wire.next(PATIENCE).expect("word of where the guest is")[HEADER..].to_vec();
        assert_eq!(frame[6..12], MAC_BYTES);
        guest.expect("moved").unwrap();
        guest.wait_exit(PATIENCE).unwrap();
        hosts.a.wait_no_tap();
        assert_runs(&next);
        next.quit().unwrap();
        hosts.b.wait_no_tap();
        while wire.next(Duration::from_millis(100)).is_some() {}
    }
    say::figures("a guest of a network", "arrived on its bridge, with one queue and with four");
}

#[test]
fn a_guest_whose_network_or_storage_is_not_known_stays() {
    let hosts = Hosts::new(["blue", "green"]);
    let guest = hosts.guest("network=blue");
    let (mut next, address) = hosts.receiver(&hosts.b, "next", &[]);
    let refused = |next: &mut Node, parts: &[&str]| {
        assert_refused(&migrate(&guest, &request(address)), Code::DEVICE, parts);
        next.expect("refused").unwrap();
        assert!(is_empty(next));
        assert_runs(&guest);
        hosts.a.assert_tap(&guest, "web1");
    };
    refused(&mut next, &["network blue", "it knows: green", "[networks.blue]"]);
    assert_eq!(hosts.b.tap(), None);
    drop(next);

    // It is known, but what it is said to be is not there, or is not what it should be.
    let bridge = |bridge: &str| {
        fs::write(&hosts.b.config, format!("[networks.blue]\nbridge = '{bridge}'\n")).unwrap();
        hosts.receiver(&hosts.b, "next", &[])
    };
    for (name, parts) in
        [("br-c", ["no bridge br-c", "ip link add br-c type bridge"]), ("wire", ["wire", "is not a bridge"])]
    {
        let (mut next, address) = bridge(name);
        assert_refused(&migrate(&guest, &request(address)), Code::DEVICE, &parts);
        next.expect("refused").unwrap();
    }
    let (mut next, address) = bridge(&hosts.b.bridge);
    hosts.b.namespace.within(|| must("ip link set br-b down"));
    assert_refused(&migrate(&guest, &request(address)), Code::DEVICE, &["ip link set br-b up"]);
    next.expect("refused").unwrap();
    assert_eq!(hosts.b.tap(), None);
    // The same receiver takes it once that is mended.
    hosts.b.namespace.within(|| must("ip link set br-b up"));
    hop(&guest, &mut next, address);
    assert_runs(&next);
}

#[test]
fn taps_go_with_processes_that_are_killed_and_with_guests_that_do_not_come() {
    let hosts = Hosts::new(["blue", "blue"]);
    let mut guest = hosts.guest("network=blue,queues=2");
    // A guest beyond a limit gets none.
    let (mut tight, address) = hosts.receiver(&hosts.b, "tight", &["--max-memory", "1M"]);
    assert_refused(&migrate(&guest, &request(address)), Code::LIMITS, &["at most 1 MiB"]);
    tight.expect("refused").unwrap();
    assert_eq!(hosts.b.tap(), None);
    drop(tight);
    // It gets one that is not good enough.
    let (mut next, address) = hosts.receiver(&hosts.b, "next", &[]);
    hosts.b.namespace.within(|| must("ip link set br-b mtu 1300"));
    assert_refused(&migrate(&guest, &request(address)), Code::DEVICE, &["whim0", "1300", "up to 1400"]);
    next.expect("refused").unwrap();
    hosts.b.wait_no_tap();
    hosts.b.namespace.within(|| must("ip link set br-b mtu 1400"));
    // It is called off once the tap is there, if that is not too late.
    let mut slow = request(address);
    slow.downtime_limit_ms = 1;
    slow.on_stall = migration::policy::OnStall::Abort;
    guest.migrate(&slow).unwrap();
    wait_until("the tap", || hosts.b.tap().is_some() || guest.migration().unwrap().report.is_some());
    let _ = guest.cancel();
    if guest.wait_migration(PATIENCE).unwrap().report.unwrap().verdict == Verdict::Stayed {
        next.expect("refused").unwrap();
        hosts.b.wait_no_tap();
        hop(&guest, &mut next, address);
    }
    guest.wait_exit(PATIENCE).unwrap();
    hosts.a.wait_no_tap();
    assert!(hosts.b.tap().is_some());
    next.kill().unwrap();
    hosts.b.wait_no_tap();
    let mut guest = hosts.guest("network=blue");
    guest.kill().unwrap();
    hosts.a.wait_no_tap();
}

#[test]
fn whoever_makes_taps_for_a_receiver_does_nothing_else_and_ends_with_it() {
    let hosts = Hosts::new(["blue", "blue"]);
    let (mut next, address) = hosts.receiver(&hosts.b, "next", &[]);
    let children = format!("/proc/{0}/task/{0}/children", next.pid());
    let children = fs::read_to_string(children).unwrap();
    let mut children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let maker = children.find(|pid| capabilities(*pid) & NET_ADMIN != 0).expect("a process that makes taps");
    assert_eq!(capabilities(maker), NET_ADMIN | IPC_LOCK);
    for (field, value) in [("Seccomp", "2"), ("NoNewPrivs", "1"), ("Threads", "1")] {
        assert_eq!(status(maker, field), value, "{field}");
    }
    let files = || fs::read_dir(format!("/proc/{maker}/fd")).unwrap().count();
    assert_eq!(files(), 2, "its socket, and where its end would be told");
    hop(&hosts.guest("network=blue,queues=2"), &mut next, address);
    wait_until("the tap to be the machine's alone", || files() == 2);
    next.kill().unwrap();
    // Whoever inherits it may take a while to notice its end.
    wait_until("its end", || ["", "Z (zombie)"].contains(&status(maker, "State").as_str()));
}

#[test]
fn taps_by_name_are_used_and_stay() {
    let hosts = Hosts::new(["blue", "blue"]);
    let make = |host: &Host, name: &str| {
        host.namespace.within(|| {
            must(&format!("ip tuntap add dev {name} mode tap"));
            must(&format!("ip link set {name} mtu {MTU} master {} up", host.bridge));
        });
    };
    make(&hosts.a, "mine");
    make(&hosts.b, "theirs");
    let guest = hosts.guest("network=blue,tap=mine");
    assert_eq!(hosts.a.tap(), None);
    // A receiver without a configuration has taps by position.
    let listen = format!("{}:0", hosts.b.address).parse().unwrap();
    let (mut next, address) = hosts.b.namespace.within(|| {
        Node::receiver_on(whimbrel(), hosts.folder.path(), "next", listen, ["--net", "tap=theirs"]).unwrap()
    });
    hop(&guest, &mut next, address);
    assert_eq!(hosts.b.tap(), None);
    // The name has travelled on: the first host makes a tap for it.
    let (mut last, address) = hosts.receiver(&hosts.a, "last", &[]);
    hop(&next, &mut last, address);
    hosts.a.assert_tap(&last, "web1");
    assert_runs(&last);
    for (host, name) in [(&hosts.a, "mine"), (&hosts.b, "theirs")] {
        assert!(host.namespace.within(|| links::find(name).unwrap()).is_some(), "{name} has been removed");
    }
}

/// The configuration of a host whose storage `fast` is at this path.
fn storage(folder: &Path, host: &str, path: &Path) -> String {
    let config = folder.join(format!("{host}.toml"));
    fs::write(&config, format!("[storage.fast]\npath = '{}'\n", path.display())).unwrap();
    config.display().to_string()
}

#[test]
fn an_image_is_found_in_the_storage_of_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::new(folder.path());
    let (here, image) = (disk.path().parent().unwrap().to_path_buf(), disk.path());
    // The other host has it mounted elsewhere.
    let there = folder.path().join("there");
    std::os::unix::fs::symlink(&here, &there).unwrap();
    let file = image.file_name().unwrap().to_str().unwrap();
    let configs = [storage(folder.path(), "a", &here), storage(folder.path(), "b", &there)];
    let (named, blocks) = (format!("storage=fast,file={file}"), BLOCKS.to_string());
    let more = ["--disk", &named, "--journal", &blocks, "--host-config", &configs[0]];
    let guest = Guest::SMALL.start_by(whimbrel(), &more, folder.path(), "guest");
    let receiver = |name: &str, more: &[&str]| Node::receiver(whimbrel(), folder.path(), name, more).unwrap();

    // A host that knows none, one that has another folder of that name, and one that has another image.
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let elsewhere = storage(folder.path(), "c", &other);
    let below = here.to_str().unwrap();
    let options: [(&[&str], Code, &str); 3] = [
        (&["--disks", below], Code::DEVICE, "the storage fast, which this host does not know"),
        (&["--host-config", &elsewhere], Code::DEVICE, "cannot open the disk image"),
        (&["--host-config", &elsewhere], Code::DEVICE, "is not locked here"),
    ];
    for (number, (options, code, message)) in options.into_iter().enumerate() {
        if number == 2 {
            fs::copy(&image, other.join(file)).unwrap();
        }
        let (mut next, address) = receiver(&format!("refuses-{number}"), options);
        assert_refused(&migrate(&guest, &request(address)), code, &[message]);
        next.expect("refused").unwrap();
        assert_runs(&guest);
    }

    let mut guest = guest;
    for (number, config) in [&configs[1], &configs[0]].into_iter().enumerate() {
        let (mut next, address) = receiver(&format!("next-{number}"), &["--host-config", config]);
        hop(&guest, &mut next, address);
        let before = assert_runs(&next).journal;
        let round = |guest: &vmm::guest::Testimony| guest.journal > before + BLOCKS;
        assert!(next.wait_guest("the journal comes round", PATIENCE, round).unwrap().clean);
        guest = next;
    }
}

#[test]
fn what_this_host_does_not_know_is_said_when_a_machine_starts() {
    let folder = tempfile::tempdir().unwrap();
    let config = storage(folder.path(), "a", folder.path());
    let start = |more: &[&str]| run([&["run", "--serial", "none", "--memory", "32M"], more].concat());
    for config in [&["--host-config", config.as_str()][..], &[]] {
        let with = |option, value| start(&[&[option, value], config].concat());
        with("--net", "network=blue").refused(1, "the network blue, which this host does not know");
        with("--disk", "storage=slow,file=a").refused(1, "the storage slow, which this host does not know");
    }
    let ran = start(&["--net", "mac=52:54:00:00:00:07"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("network=NAME"), "{ran:?}");
    let listen = ["receive", "--listen", "127.0.0.1:0", "--host-config"];
    let receive = |config: &str| run([&listen[..], &[config]].concat());
    receive("/nonexistent/host.toml").refused(1, "cannot read the host's configuration");
    receive(&storage(folder.path(), "b", Path::new("/nonexistent"))).refused(1, "cannot use /nonexistent");
}
