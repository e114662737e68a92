//! A host is emptied to another one, and back: guests with disks and networks, by names alone, through one
//! port of each host. Needs root, for network namespaces.

use serde_json::Value;
use std::fs;
use std::path::Path;
use whimbrel::api::model::VmState;
use whimbrel::host::links;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel_tests::command::must;
use whimbrel_tests::journal::BLOCKS;
use whimbrel_tests::named::at;
use whimbrel_tests::namespace::Namespace;
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

/// Empties one host into the other, `turns` times to and fro. Nothing is prepared at either but its
/// configuration. Returns what the guests were told to take: the summaries.
fn to_and_fro(folder: &Path, guests: &[Guest], working_set: u64, turns: usize) -> Vec<Value> {
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
    let hosts = spaces.map(|(letter, number, namespace)| {
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
    wait_until("all guests are at work", || {
        guests
            .iter()
            .all(|(name, ..)| hosts[0].service.vm(name).unwrap().guest.is_some_and(|guest| guest.journal > 0))
    });
    let mut names: Vec<_> = guests.iter().map(|(name, ..)| name.to_string()).collect();
    names.sort_unstable();
    (0..turns)
        .map(|turn| {
            let (from, to) = (&hosts[turn % 2], &hosts[1 - turn % 2]);
            let address = to.service.address().to_string();
            let command = ["evacuate", "--on-stall", "switch", "--parallel", "3", "--json", "--to", &address];
            let ran = at(from.service.run(), &command);
            assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "turn {turn}: {ran:?}");
            for (name, _, network) in guests {
                to.assert_has(name, network, guests.len());
            }
            assert_eq!(to.service.names(), names);
            wait_until("nothing is left behind", || {
                from.service.names().is_empty()
                    && guests.iter().all(|(name, ..)| from.bridge_of(name, guests.len()).is_none())
            });
            ran.json()
        })
        .collect()
}

#[test]
fn a_host_is_emptied_to_another_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let guests = [("db", 48, "blue"), ("web1", 24, "blue"), ("web2", 32, "green"), ("web3", 16, "green")];
    let summaries = to_and_fro(folder.path(), &guests, 1, 2);
    say::figures("two hosts", format_args!("{} guests to and fro, {} turns", guests.len(), summaries.len()));
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
    for summary in to_and_fro(folder.path(), &guests, 16, 20) {
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
