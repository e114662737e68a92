//! Destinations that could not run the guest: they refuse before a page has moved, the guest stays and is
//! moved elsewhere.

use migration::Code;
use migration::report::{Report, Verdict};
use migration::source::Migration;
use migration::transport::Token;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use transport_tcp::TcpSource;
use vmm::guest::{Content, Workload, testimony};
use vmm::{Host, Machine, MachineConfig, SerialOutput};
use whimbrel::node::Node;
use whimbrel_tests::command::run_command;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop, migrate, receiver, request, wait_until};

/// Arguments of `unshare` that run what follows in a mount namespace of its own, if this host allows it.
fn namespace() -> Option<&'static [&'static str]> {
    let ways: [&[&str]; 2] = [&["--mount"], &["--mount", "--map-root-user"]];
    ways.into_iter().find(|way| run_command(Command::new("unshare").args(*way).arg("true")).code == Some(0))
}

/// A receiver in a world that `script` has changed for it.
fn receiver_in(folder: &Path, name: &str, prefix: &[&str]) -> (Node, SocketAddr) {
    let (program, arguments) = prefix.split_first().unwrap();
    let whimbrel = whimbrel().to_str().unwrap();
    let receive = [whimbrel, "receive", "--listen", "127.0.0.1:0", "--serial", "none"];
    let mut node = Node::start(Path::new(program), folder, name, [arguments, &receive].concat()).unwrap();
    let event = node.expect("listening").unwrap();
    let address = event["address"].as_str().unwrap().parse().unwrap();
    (node, address)
}

#[test]
fn without_kvm() {
    let Some(namespace) = namespace() else {
        say::skipped("a host without /dev/kvm", "this user may not make a mount namespace (unshare --mount)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let script = r#"mount -t tmpfs none /dev && exec "$0" "$@""#;
    let run = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(namespace).args(["sh", "-c", script]).arg(whimbrel()).args(arguments);
        run_command(&mut command)
    };
    run(&["receive", "--listen", "127.0.0.1:0"]).refused(1, "load the kvm_intel or kvm_amd module");
    run(&["run", "--serial", "none"]).refused(1, "load the kvm_intel or kvm_amd module");
    let doctor = run(&["doctor", "--json"]);
    assert_eq!(doctor.code, Some(1), "{doctor:?}");
    assert_eq!(doctor.json()["healthy"], false);
    drop(folder);
    say::figures("a host without /dev/kvm", "run and receive say so, the doctor finds it");
}

/// A receiver refuses a guest of 3 GiB for want of memory; a small one it takes.
fn refuses_for_memory(what: &str, prefix: &[&str], folder: &Path) {
    let large = Guest { memory: 3 << 30, ..Guest::SMALL };
    let source = large.start(folder, &format!("{what}-large"));
    let (mut node, address) = receiver_in(folder, &format!("{what}-receiver"), prefix);
    let report = migrate(&source, &request(address));
    assert_eq!(report.verdict, Verdict::Stayed);
    let failure = report.failure.unwrap();
    assert_eq!(failure.code, Code::MEMORY, "{failure}");
    assert!(failure.message.contains("guest memory"), "{failure}");
    assert!(report.rounds.is_empty(), "a page has moved");
    assert_runs(&source);
    assert_eq!(node.expect("refused").unwrap()["why"]["code"], "memory");
    let (mut other, elsewhere) = receiver(folder, &format!("{what}-other"));
    hop(&source, &mut other, elsewhere);
    settle(&other, &large);
    let small = Guest::SMALL.start(folder, &format!("{what}-small"));
    hop(&small, &mut node, address);
    settle(&node, &Guest::SMALL);
    say::figures(&format!("a host without memory, {what}"), &failure.message);
}

#[test]
fn with_too_little_memory_available() {
    let Some(namespace) = namespace() else {
        say::skipped("a host without memory", "this user may not make a mount namespace (unshare --mount)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let meminfo = folder.path().join("meminfo");
    std::fs::write(&meminfo, "MemTotal: 1000000 kB\nMemFree: 300000 kB\nMemAvailable: 400000 kB\n").unwrap();
    let script = r#"mount --bind "$0" /proc/meminfo && exec "$@""#;
    let prefix = [&["unshare"], namespace, &["sh", "-c", script, meminfo.to_str().unwrap()]].concat();
    refuses_for_memory("available", &prefix, folder.path());
}

#[test]
fn with_a_limit_on_memory() {
    let folder = tempfile::tempdir().unwrap();
    refuses_for_memory("limited", &["prlimit", "--as=2500000000"], folder.path());
}

/// The source is a machine in this process, whose CPU has a feature that no host has.
#[test]
fn with_fewer_cpu_features() {
    let folder = tempfile::tempdir().unwrap();
    let (mut node, address) = receiver(folder.path(), "receiver");
    let host = Host::open().unwrap();
    let mut config = MachineConfig::new(&host, 32 << 20, 1).unwrap();
    config.serial = SerialOutput::Null;
    // Itanium emulation: a bit that no KVM offers.
    config.cpuid.iter_mut().filter(|entry| entry.function == 1).for_each(|entry| entry.edx |= 1 << 30);
    let machine = Machine::build(&host, config).unwrap();
    let content = Content::Random;
    let workload =
        Workload { vcpus: 1, working_set: 1 << 20, rate: 0, hz: None, fill: 0, content, journal: 0 };
    workload.boot(&machine).unwrap();
    machine.resume().unwrap();
    let report = move_away(&machine, address);
    assert_eq!(report.verdict, Verdict::Stayed);
    let failure = report.failure.unwrap();
    assert_eq!(failure.code, Code::CPU);
    assert!(failure.message.contains("CPUID 0x1 EDX bit 30"), "{failure}");
    assert!(report.rounds.is_empty(), "a page has moved");
    assert_eq!(node.expect("refused").unwrap()["why"]["code"], "cpu");
    let passes = || testimony(machine.memory()).map_or(0, |t| t.passes);
    let before = passes();
    wait_until("the guest goes on", || passes() > before + 1);
    assert!(testimony(machine.memory()).unwrap().clean);
    let guest = Guest::SMALL.start(folder.path(), "guest");
    hop(&guest, &mut node, address);
    settle(&node, &Guest::SMALL);
    say::figures("a host with fewer CPU features", &failure.message);
}

/// What `whimbrel run` does with a machine that is to be moved.
fn move_away(machine: &Machine, to: SocketAddr) -> Report {
    let token = Token::random().unwrap();
    let mut link = transport_tcp::connect_control(&to.to_string(), token, Duration::from_secs(10)).unwrap();
    let transport = TcpSource::new(link.peer(), 0);
    Migration::new(machine, &mut link).transport(transport).run()
}
