//! A host is emptied to another one, and back: guests with disks and networks, by names alone, through one
//! port of each host. Needs root, for network namespaces.

use serde_json::Value;
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;
use whimbrel::api::model::VmState;
use whimbrel::host::links;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel_tests::command::must;
use whimbrel_tests::journal::BLOCKS;
use whimbrel_tests::named::at;
use whimbrel_tests::namespace::Namespace;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::service::Service;
use whimbrel_tests::sides::wait_until;

const NETWORKS: [&str; 2] = ["blue", "green"];

/// A host in a network namespace of its own, with a bridge for each network.
struct Host {
    service: Service,
    namespace: Namespace,
    letter: char,
}

impl Host {
    fn bridge(letter: char, network: &str) -> String {
        format!("{letter}-{network}")
    }

    /// The bridge that this machine's tap belongs to, if it has one here.
    fn bridge_of(&self, machine: &str, taps: usize) -> Option<u32> {
        let whose = format!("of {machine}, network");
        let find = |number| links::find(&format!("whim{number}")).unwrap();
        self.namespace.within(|| (0..taps).filter_map(find).find(|tap| tap.alias.contains(&whose))?.bridge)
    }

    /// The guest is on the bridge of its network, runs on, its disk too, and finds nothing wrong.
    fn assert_has(&self, name: &str, network: &str, guests: usize) {
        let bridge = Host::bridge(self.letter, network);
        let index = self.namespace.within(|| links::find(&bridge).unwrap().unwrap().index);
        assert_eq!(self.bridge_of(name, guests), Some(index), "{name} at {bridge}");
        let guest = || self.service.vm(name).unwrap();
        let before = guest();
        assert_eq!(before.state, VmState::Running, "{before:?}");
        let before = before.guest.unwrap();
        wait_until("the guest goes on, and its journal comes round", || {
            guest().guest.is_some_and(|now| {
                now.pages > before.pages && now.journal > before.journal + BLOCKS && now.ticks > before.ticks
            })
        });
        let after = guest().guest.unwrap();
        assert!(after.clean, "{name}: {:?}", after.problems);
    }
}

/// A guest: its name, its memory in MiB, and its network.
type Guest = (&'static str, u64, &'static str);

/// Two hosts, and the guests that belong to them. Nothing is prepared at either but its configuration.
struct Pair<'a> {
    hosts: [Host; 2],
    guests: &'a [Guest],
}

impl<'a> Pair<'a> {
    /// All guests run at the first host, and are at work.
    fn start(folder: &Path, guests: &'a [Guest], working_set: u64) -> Self {
        let authority = Authority::create(&folder.join("pki")).unwrap();
        let (images, machines) = (folder.join("images"), folder.join("machines"));
        [&images, &machines].iter().for_each(|folder| fs::create_dir(folder).unwrap());
        for (number, (name, memory, network)) in guests.iter().enumerate() {
            let image = fs::File::create(images.join(format!("{name}.raw"))).unwrap();
            image.set_len(4 << 20).unwrap();
            let machine = format!(
                "memory = '{memory}M'\nworking-set = '{working_set}M'\njournal = {BLOCKS}\nserial = 'none'\n\
                 disk = 'storage=fast,file={name}.raw'\nnet = 'network={network},mac=52:54:00:00:00:{number:02x}'\n"
            );
            fs::write(machines.join(format!("{name}.toml")), machine).unwrap();
        }
        let hosts = spaces().map(|(letter, number, namespace)| {
            let address = format!("10.77.0.{number}");
            let name = format!("{letter}.hosts.example");
            authority.issue(&name, std::slice::from_ref(&address), days_from_now(1)).unwrap();
            let bridge = |network: &&str| {
                format!("[networks.{network}]\nbridge = '{}'\n", Host::bridge(letter, network))
            };
            let config = format!(
                "tls = {:?}\nallow = ['*.hosts.example']\nmachines = {machines:?}\n{}[storage.fast]\npath = {images:?}\n",
                authority.host(&name),
                NETWORKS.iter().map(bridge).collect::<String>(),
            );
            let listen = format!("{address}:0").parse().unwrap();
            let start = || Service::start_at(&folder.join(letter.to_string()), &config, listen);
            let service = namespace.within(start);
            Host { service, namespace, letter }
        });
        for (name, ..) in guests {
            let ran = at(hosts[0].service.run(), &["start", name]);
            assert_eq!(ran.code, Some(0), "{ran:?}");
        }
        let works =
            |name: &str| hosts[0].service.vm(name).unwrap().guest.is_some_and(|guest| guest.journal > 0);
        wait_until("all guests are at work", || guests.iter().all(|(name, ..)| works(name)));
        Pair { hosts, guests }
    }

    /// Empties the host that has the guests before this turn, counted from 0. While it does, `disturb` is
    /// called with the host that takes them, until they are there. Returns the summary.
    fn empty(&mut self, turn: usize, disturb: impl Fn(&mut Host)) -> Value {
        let [first, second] = &mut self.hosts;
        let (from, to) = if turn.is_multiple_of(2) { (&*first, second) } else { (&*second, first) };
        let address = to.service.address().to_string();
        let command = ["evacuate", "--on-stall", "switch", "--parallel", "3", "--json", "--to", &address];
        let ran = thread::scope(|scope| {
            let emptying = scope.spawn(|| at(from.service.run(), &command));
            while !emptying.is_finished() {
                disturb(to);
            }
            emptying.join().unwrap()
        });
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "turn {turn}: {ran:?}");
        let guests = self.guests;
        let mut names: Vec<_> = guests.iter().map(|(name, ..)| name.to_string()).collect();
        names.sort_unstable();
        wait_until("the service knows them all", || to.service.status().processes.settled == names.len());
        for (name, _, network) in guests {
            to.assert_has(name, network, guests.len());
        }
        assert_eq!(to.service.names(), names);
        wait_until("nothing is left behind", || {
            from.service.names().is_empty()
                && guests.iter().all(|(name, ..)| from.bridge_of(name, guests.len()).is_none())
        });
        ran.json()
    }
}

/// Two joined network namespaces with bridges: each with its letter and the last number of its address.
fn spaces() -> [(char, u8, Namespace); 2] {
    let spaces = [('a', 1), ('b', 2)].map(|(letter, number)| {
        let namespace = Namespace::new().unwrap();
        namespace.within(|| {
            must("ip link set lo up");
            for network in NETWORKS {
                let bridge = Host::bridge(letter, network);
                must(&format!("ip link add {bridge} type bridge"));
                must(&format!("ip link set {bridge} up"));
            }
        });
        (letter, number, namespace)
    });
    let beyond = spaces[1].2.path();
    spaces[0].2.within(|| must(&format!("ip link add wire type veth peer name wire netns {beyond}")));
    for (_, number, namespace) in &spaces {
        namespace.within(|| {
            must(&format!("ip address add 10.77.0.{number}/24 dev wire"));
            must("ip link set wire up");
        });
    }
    spaces
}

/// Lets an evacuation go on.
fn watch(_: &mut Host) {
    thread::sleep(Duration::from_millis(10));
}

#[test]
fn a_host_is_emptied_to_another_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let guests = [("db", 48, "blue"), ("web1", 24, "blue"), ("web2", 32, "green"), ("web3", 16, "green")];
    let mut pair = Pair::start(folder.path(), &guests, 1);
    (0..2).for_each(|turn| drop(pair.empty(turn, watch)));
}

/// Minutes. The service of the host that takes the guests is killed, or ended and replaced by a program in
/// another file, at random moments: no guest and no move is harmed, and the new service knows all.
#[test]
#[ignore = "takes minutes: run it by `--ignored`"]
fn services_end_fifty_times_while_hosts_are_emptied() {
    const ENDS: usize = 50;
    let folder = tempfile::tempdir().unwrap();
    let guests = [
        ("db", 96, "blue"),
        ("web1", 64, "blue"),
        ("web2", 48, "green"),
        ("web3", 32, "green"),
        ("edge", 16, "blue"),
    ];
    let mut pair = Pair::start(folder.path(), &guests, 4);
    // Another file is another program, as after an upgrade: what runs is still made from the old one.
    let programs = ["old", "new"].map(|name| folder.path().join(name));
    for program in &programs {
        fs::copy(whimbrel(), program).unwrap();
    }
    let (kills, upgrades) = (Cell::new(0), Cell::new(0));
    let mut turns = 0;
    while kills.get() + upgrades.get() < ENDS {
        pair.empty(turns, |to| {
            thread::sleep(Duration::from_millis(fastrand::u64(0..1000)));
            let Host { service, namespace, .. } = to;
            if fastrand::bool() {
                kills.set(kills.get() + 1);
                namespace.within(|| service.replace());
            } else {
                upgrades.set(upgrades.get() + 1);
                let program = &programs[upgrades.get() % 2];
                namespace.within(|| service.upgrade(program));
            }
        });
        turns += 1;
    }
    say::figures(
        "services that end",
        format_args!(
            "{} kills and {} upgrades in {turns} evacuations of {} guests: all moved",
            kills.get(),
            upgrades.get(),
            guests.len()
        ),
    );
}

/// Some minutes, and 2 GiB of memory on each side.
#[test]
#[ignore = "takes minutes: run it by `--ignored`"]
fn eight_large_guests_go_to_and_fro_ten_times() {
    let folder = tempfile::tempdir().unwrap();
    let guests = [
        ("db1", 512, "blue"),
        ("db2", 512, "green"),
        ("app1", 256, "blue"),
        ("app2", 256, "green"),
        ("web1", 128, "blue"),
        ("web2", 128, "green"),
        ("edge1", 64, "blue"),
        ("edge2", 64, "green"),
    ];
    let mut pair = Pair::start(folder.path(), &guests, 16);
    for turn in 0..20 {
        let summary = pair.empty(turn, watch);
        let machines = summary["machines"].as_array().unwrap();
        let report = |machine: &Value, what: &str| machine["migration"]["report"][what].as_f64().unwrap();
        let sum = |what: &str| machines.iter().map(|machine| report(machine, what)).sum::<f64>() / 1000.0;
        let most = machines.iter().map(|machine| report(machine, "blackout_us")).fold(0.0, f64::max) / 1000.0;
        say::figures(
            "an evacuation of eight guests",
            format_args!(
                "{} ms in all, {:.0} ms if one after the other; the longest blackout {most:.2} ms",
                summary["elapsed_ms"],
                sum("total_us"),
            ),
        );
    }
}
