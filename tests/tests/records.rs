//! Whoever waits for a migration learns how it ended, and both sides remember it.

use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use whimbrel::api::client::Client;
use whimbrel::node::Node;
use whimbrel_tests::command::{run, run_command};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, receiver, wait_until};

fn api(node: &Node) -> &str {
    node.api_path().to_str().unwrap()
}

/// A line as slow as the test needs it.
fn slow(milliseconds: u64) -> Rules {
    Rules { data_delay: Duration::from_millis(milliseconds), ..Rules::default() }
}

/// Others look at the machine all the time, and whoever moves it is told all the same.
#[test]
fn a_success_is_never_reported_as_a_failure() {
    const MOVES: usize = 10;
    let folder = tempfile::tempdir().unwrap();
    let mut node = Guest::SMALL.start(folder.path(), "guest-0");
    for number in 1..=MOVES {
        let (mut next, address) = receiver(folder.path(), &format!("guest-{number}"));
        let over = AtomicBool::new(false);
        let ran = thread::scope(|scope| {
            for _ in 0..2 {
                let client = Client::new(node.api_path()).unwrap();
                let over = &over;
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        // It fails once the process has ended, as it should.
                        let _ = client.get::<Value>("/v1/migration");
                    }
                });
            }
            let to = address.to_string();
            let ran = run(["migrate", "--api", api(&node), "--on-stall", "switch", "--json", "--to", &to]);
            over.store(true, Ordering::Relaxed);
            ran
        });
        assert_eq!(ran.code, Some(0), "move {number}: {ran:?}");
        assert_eq!(ran.json()["report"]["verdict"], "moved");
        next.expect("arrived").unwrap();
        // Nobody else is waited for.
        node.expect("moved").unwrap();
        assert_eq!(node.wait_exit(Duration::from_secs(10)).unwrap().code(), Some(0));
        node = next;
    }
    settle(&node, &Guest::SMALL);
    say::figures("success is reported as success", format_args!("{MOVES} moves under constant looks"));
}

/// The source's process is killed while it is waited for: nobody here knows what has become of the guest.
#[test]
fn a_lost_api_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::SMALL.start(folder.path(), "guest");
    let (_next, address) = receiver(folder.path(), "next");
    let proxy = Proxy::start(address, slow(20));
    let (socket, to) = (api(&guest).to_string(), proxy.address().to_string());
    let migrating = thread::spawn(move || run(["migrate", "--api", &socket, "--to", &to]));
    wait_until("pre-copy", || guest.migration().is_ok_and(|migration| migration.progress.sent > 0));
    guest.kill().unwrap();
    migrating.join().unwrap().refused(6, "Ask the destination");
    run(["migrate", "--api", api(&guest), "--to", "localhost:1"]).refused(8, "no virtual machine answers");
    say::figures("a lost API", "exit code 6, and 8 if it was not there at all");
}

#[test]
fn an_interrupted_command_says_that_the_migration_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let (mut next, address) = receiver(folder.path(), "next");
    let proxy = Proxy::start(address, slow(20));
    let command = Command::new(whimbrel())
        .args(["migrate", "--api", api(&guest), "--on-stall", "switch", "--to", &proxy.address().to_string()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("pre-copy", || guest.migration().is_ok_and(|migration| migration.progress.sent > 0));
    let interrupt = format!("kill -INT {}", command.id());
    assert_eq!(run_command(Command::new("sh").args(["-c", &interrupt])).code, Some(0));
    let output = command.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), output.status.signal()), (Some(130), None), "{said}");
    for part in ["goes on", "whimbrel status --api", "whimbrel cancel --api"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    guest.wait_migration(PATIENCE).unwrap();
    next.expect("arrived").unwrap();
    assert_runs(&next);
    say::figures("an interrupted command", "exit code 130, and the guest moved");
}

fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn both_sides_keep_the_record_of_a_move() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (left, came) = (file("left"), file("came"));
    let keep = ["--record", left.to_str().unwrap()];
    let mut guest = Guest::SMALL.start_by(whimbrel(), &keep, folder.path(), "web1");
    // One that fails, and is told of.
    let nobody = run(["migrate", "--api", api(&guest), "--to", "127.0.0.1:1"]);
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
    let stayed = guest.expect("stayed").unwrap();
    assert_eq!(stayed["migration"]["report"]["verdict"], "stayed");

    // This one has no name of its own.
    let socket = file("next.sock");
    let mut next = Command::new(whimbrel())
        .args(["receive", "--listen", "127.0.0.1:0", "--serial", "none", "--json", "--api"])
        .arg(&socket)
        .arg("--record")
        .arg(&came)
        .stdout(std::fs::File::create(file("log")).unwrap())
        .spawn()
        .unwrap();
    let log = || records(&file("log"));
    wait_until("the receiver listens", || log().first().is_some_and(|event| event["event"] == "listening"));
    let to = log()[0]["address"].as_str().unwrap().to_string();
    let api_next = socket.to_str().unwrap();
    let begun = run(["migrate", "--api", api(&guest), "--on-stall", "switch", "--detach", "--to", &to]);
    assert_eq!(begun.code, Some(0), "{begun:?}");
    let moved = guest.expect("moved").unwrap();
    assert_eq!(moved["migration"]["report"]["verdict"], "moved");
    assert!(moved["migration"]["report"]["rounds"].as_array().unwrap().len() >= 2, "{moved}");
    let status = run(["status", "--api", api(&guest)]);
    assert_eq!(status.code, Some(7), "it runs elsewhere: {status:?}");
    let kept = records(&left);
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert_eq!((&kept[0]["migration"], &kept[1]["migration"]), (&stayed["migration"], &moved["migration"]));
    assert_eq!((&kept[1]["name"], kept[1]["pid"].as_u64()), (&"web1".into(), Some(guest.pid().into())));

    let status = run(["status", "--api", api_next]);
    assert!(status.code == Some(0) && status.stdout.starts_with("web1: running"), "{status:?}");
    assert!(status.stdout.contains("the guest arrived from 127.0.0.1:"), "{status:?}");
    let arrival = run(["status", "--api", api_next, "--json"]).json()["arrival"].clone();
    assert_eq!((&arrival["progress"]["phase"], arrival["number"].as_u64()), (&"arrived".into(), Some(1)));
    assert!(arrival["progress"]["placed"].as_u64().unwrap() > 0, "{arrival}");
    assert!(arrival["ended"].is_string() && arrival["sender"].as_str().unwrap().starts_with("whimbrel "));
    wait_until("the destination's record", || std::fs::read_to_string(&came).unwrap().ends_with('\n'));
    assert_eq!(records(&came)[0]["arrival"], arrival);
    assert_eq!((&log()[1]["name"], &log()[1]["arrival"]), (&"web1".into(), &arrival));
    assert_eq!(run(["quit", "--api", api_next]).code, Some(0));
    assert_eq!(next.wait().unwrap().code(), Some(0));
    say::figures("the record of a move", "log, API and file, on both sides; the guest keeps its name");
}

#[test]
fn a_receiver_is_seen_and_ended() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let (mut next, address) = receiver(folder.path(), "next");
    let status = run(["status", "--api", api(&next)]);
    assert!(status.code == Some(7) && status.stdout.starts_with("next: waiting, process "), "{status:?}");
    let proxy = Proxy::start(address, slow(50));
    let to = proxy.address().to_string();
    assert_eq!(run(["migrate", "--api", api(&guest), "--detach", "--to", &to]).code, Some(0));
    let arrival = || run(["status", "--api", api(&next), "--json"]).json()["arrival"].clone();
    wait_until("memory arrives", || arrival()["progress"]["placed"].as_u64() > Some(0));
    let status = run(["status", "--api", api(&next)]);
    assert!(status.code == Some(7) && status.stdout.starts_with("next: receiving"), "{status:?}");
    assert!(status.stdout.contains("receiving, 32.0 MiB of memory, "), "{status:?}");
    // The guest is refused, and runs on where it was.
    assert_eq!(run(["quit", "--api", api(&next)]).code, Some(0));
    next.expect("refused").unwrap();
    next.expect("quit").unwrap();
    assert_eq!(next.wait_exit(PATIENCE).unwrap().code(), Some(0));
    assert!(!next.api_path().exists(), "the socket stays behind");
    guest.wait_migration(PATIENCE).unwrap();
    assert_runs(&guest);
    let (mut waiting, _) = receiver(folder.path(), "waiting");
    assert_eq!(waiting.quit().unwrap().code(), Some(0));
    say::figures("a receiver", "seen waiting and receiving, ended in both states");
}
