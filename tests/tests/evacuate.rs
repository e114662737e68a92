//! A host is emptied in one command.

use migration::monitor::Phase;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use whimbrel::api::model::VmState;
use whimbrel::host::run_dir::RunDir;
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::named::{arrived, at, command, machine, receiver};
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, request, wait_until};

const MIB: u64 = 1 << 20;

fn hosts(folder: &Path) -> [RunDir; 2] {
    ["a", "b"].map(|host| RunDir::new(Some(&folder.join(host))))
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// What the summary says of each machine: its name, what became of it, and why each host did not take it.
fn outcomes(summary: &Value) -> Vec<(String, String, Vec<Option<String>>)> {
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let of = |machine: &Value| {
        let tries = machine["tries"].as_array().unwrap();
        let why = tries.iter().map(|one| one["why"]["code"].as_str().map(String::from)).collect();
        (text(&machine["name"]), text(&machine["outcome"]), why)
    };
    summary["machines"].as_array().unwrap().iter().map(of).collect()
}

#[test]
fn a_host_is_emptied() {
    let folder = tempfile::tempdir().unwrap();
    let [here, there] = hosts(folder.path());
    let guests = [("db", 48), ("web1", 24), ("web2", 32), ("web3", 16)];
    let guest = |memory: u64| Guest { memory: memory * MIB, working_set: MIB, ..Guest::SMALL };
    let _sources = guests.map(|(name, memory)| machine(folder.path(), &here, name, &guest(memory)));
    // One that takes nobody, and four that take one each.
    let (mut refusing, address) = receiver(folder.path(), &there, &["--max-memory", "15M"]);
    let mut addresses = vec![address];
    let mut receivers: Vec<Node> = Vec::new();
    for _ in &guests {
        let (node, address) = receiver(folder.path(), &there, &[]);
        receivers.push(node);
        addresses.push(address);
    }
    let to = list(&addresses);
    let ran = at(&here, &["evacuate", "--on-stall", "switch", "--json", "--to", &to]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    let summary = ran.json();
    assert_eq!((&summary["empty"], summary["left"].as_array().unwrap().len()), (&Value::Bool(true), 0));
    let told = outcomes(&summary);
    assert_eq!(told.len(), guests.len());
    for (name, outcome, tries) in &told {
        assert_eq!((outcome.as_str(), tries.last()), ("moved", Some(&None)), "{name}: {summary}");
    }
    let refused =
        told.iter().flat_map(|(.., tries)| tries).filter(|why| why.as_deref() == Some("limits")).count();
    assert!(refused > 0, "nobody was offered to the host that takes nobody: {summary}");
    assert_eq!(refusing.expect("refused").unwrap()["why"]["code"], "limits");
    wait_until("an empty host", || here.machines().unwrap().is_empty());
    let mut arrivals = BTreeSet::new();
    for node in &mut receivers {
        let name = arrived(node, &there);
        let (_, memory) = guests.iter().find(|(guest, _)| *guest == name).unwrap();
        settle(node, &guest(*memory));
        arrivals.insert(name);
    }
    assert_eq!(arrivals.len(), guests.len());
    // There is nothing more to be done.
    let ran = at(&here, &["evacuate", "--to", &to]);
    assert_eq!((ran.code, ran.stdout.trim()), (Some(0), "no machine is here"), "{ran:?}");
    say::figures("an evacuation", format_args!("{} guests, {refused} refusals", guests.len()));
}

#[test]
fn a_guest_that_is_held_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let [here, there] = hosts(folder.path());
    let held = machine(folder.path(), &here, "held", &Guest::SMALL);
    let other = machine(folder.path(), &here, "other", &Guest::SMALL);
    at(&here, &["pause", "other"]);
    // Its destination dies after it was told to run it, and before it could say that it does.
    let (mut dies, address) = receiver(folder.path(), &there, &[]);
    let proxy =
        Proxy::start(address, Rules { control_delay: Duration::from_millis(400), ..Rules::default() });
    held.migrate(&request(proxy.address())).unwrap();
    wait_until("the hand-over", || held.migration().is_ok_and(|m| m.progress.phase == Phase::Committed));
    dies.kill().unwrap();
    held.wait_migration(PATIENCE).unwrap();
    let (mut next, address) = receiver(folder.path(), &there, &[]);
    let ran = at(&here, &["evacuate", "--to", &address.to_string()]);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("held is held") && ran.stderr.contains("other has moved to"), "{ran:?}");
    assert!(ran.stdout.contains("1 of 2 moved") && ran.stdout.contains("still here: held"), "{ran:?}");
    assert_eq!(held.status().unwrap().state, VmState::Held);
    assert_eq!(arrived(&mut next, &there), "other");
    assert_eq!(next.status().unwrap().state, VmState::Paused, "as it was");
    drop(other);
    say::figures("an evacuation with a held guest", "exit code 4, the other one has moved");
}

#[test]
fn an_evacuation_is_called_off_and_taken_up_again() {
    const LOADED: Guest = Guest { fill: 8 * MIB, ..Guest::SMALL };
    const SLOW: Rules = Rules {
        control_delay: Duration::ZERO,
        data_delay: Duration::from_millis(10),
        cut: None,
        cut_before: None,
    };
    let folder = tempfile::tempdir().unwrap();
    let [here, there] = hosts(folder.path());
    let names = ["web1", "web2", "web3"];
    let sources = names.map(|name| machine(folder.path(), &here, name, &LOADED));
    let mut receivers: Vec<_> = names.iter().map(|_| receiver(folder.path(), &there, &[])).collect();
    let proxies: Vec<_> = receivers.iter().map(|(_, address)| Proxy::start(*address, SLOW)).collect();
    let slow: Vec<_> = proxies.iter().map(Proxy::address).collect();
    let mut evacuating = command(&here, &["evacuate", "--json", "--to", &list(&slow)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let travels = |node: &Node| {
        node.migration().is_ok_and(|m| m.progress.phase == Phase::Precopy && m.progress.sent > 0)
    };
    wait_until("two moves", || sources.iter().filter(|node| travels(node)).count() == 2);
    // SAFETY: the process is a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(evacuating.id() as libc::pid_t, libc::SIGINT) }, 0);
    let mut stdout = String::new();
    std::io::Read::read_to_string(&mut evacuating.stdout.take().unwrap(), &mut stdout).unwrap();
    assert_eq!(evacuating.wait().unwrap().code(), Some(3), "{stdout}");
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    let mut told = outcomes(&summary);
    assert!(told.iter().all(|(_, outcome, _)| outcome == "stayed"), "{summary}");
    assert_eq!(summary["left"].as_array().unwrap().len(), 3);
    told.retain(|(.., tries)| tries.iter().flatten().any(|why| why == "cancelled"));
    assert!(told.len() >= 2, "{summary}");
    for node in &sources {
        assert_runs(node);
    }
    // One of them is being moved when the next evacuation begins.
    sources[2].migrate(&request(slow[2])).unwrap();
    wait_until("a move", || travels(&sources[2]));
    let addresses: Vec<_> = receivers.iter().map(|(_, address)| *address).collect();
    let ran = at(&here, &["evacuate", "--on-stall", "switch", "--to", &list(&addresses)]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("3 of 3 moved") && ran.stdout.contains("the host is empty"), "{ran:?}");
    wait_until("an empty host", || here.machines().unwrap().is_empty());
    let mut arrivals = BTreeSet::new();
    for (node, _) in &mut receivers {
        // It was told of the moves that were called off.
        let event =
            std::iter::repeat_with(|| node.next_event().unwrap()).find(|event| event["event"] != "refused");
        let event = event.unwrap();
        assert_eq!(event["event"], "arrived");
        let name = event["name"].as_str().unwrap();
        node.is_at(there.find(name).unwrap()).unwrap();
        settle(node, &LOADED);
        arrivals.insert(name.to_string());
    }
    assert_eq!(arrivals.len(), names.len());
    say::figures("an evacuation that was called off", "all stayed, and were moved by the next one");
}
