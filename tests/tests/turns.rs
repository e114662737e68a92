//! Who may do what when: two sources at one receiver, a second migration during the first, one after it, and
//! migrations that are called off or do not converge.

use migration::monitor::Phase;
use migration::report::Verdict;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use whimbrel::api::model::VmState;
use whimbrel::node::Node;
use whimbrel_tests::command::{Ran, run};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{
    Guest, PATIENCE, assert_runs, assert_stands_still, hop, receiver, request, wait_until,
};

/// A guest with enough to send that a slow line keeps it for a while.
const LOADED: Guest = Guest { fill: 16 << 20, memory: 64 << 20, ..Guest::SMALL };

/// A line over which [`LOADED`] travels for seconds.
const SLOW: Rules = Rules {
    control_delay: Duration::ZERO,
    data_delay: Duration::from_millis(10),
    cut: None,
    cut_before: None,
};

fn api(node: &Node) -> &str {
    node.api_path().to_str().unwrap()
}

fn migrate(node: &Node, to: impl ToString, more: &[&str]) -> Ran {
    let to = to.to_string();
    run([&["migrate", "--api", api(node), "--json", "--to", &to], more].concat())
}

fn failure(ran: &Ran) -> Value {
    ran.json()["report"]["failure"].clone()
}

/// Starts a guest and its move over a slow line; returns when memory travels.
fn begin(folder: &Path) -> (Node, Node, std::net::SocketAddr, Proxy) {
    let source = LOADED.start(folder, "source");
    let (destination, address) = receiver(folder, "destination");
    let proxy = Proxy::start(address, SLOW);
    source.migrate(&request(proxy.address())).unwrap();
    wait_until("pre-copy", || {
        let progress = source.migration().unwrap().progress;
        progress.phase == Phase::Precopy && progress.sent > 0
    });
    assert_eq!(source.status().unwrap().state, VmState::Migrating);
    (source, destination, address, proxy)
}

#[test]
fn two_sources_at_one_receiver() {
    let folder = tempfile::tempdir().unwrap();
    let second = Guest::SMALL.start(folder.path(), "second");
    let (first, mut destination, address, _proxy) = begin(folder.path());
    let ran = migrate(&second, address, &[]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert_eq!(failure(&ran)["code"], "busy");
    assert_runs(&second);
    let (mut other, elsewhere) = receiver(folder.path(), "other");
    hop(&second, &mut other, elsewhere);
    settle(&other, &Guest::SMALL);
    let report = first.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    destination.expect("arrived").unwrap();
    // It holds a guest now and takes in no other.
    let third = Guest::SMALL.start(folder.path(), "third");
    let ran = migrate(&third, address, &[]);
    assert_eq!((ran.code, failure(&ran)["code"].as_str()), (Some(3), Some("link")), "{ran:?}");
    assert_runs(&third);
    assert_runs(&destination);
    settle(&destination, &LOADED);
    say::figures("two sources at one receiver", "the second was told so, stayed, and moved elsewhere");
}

#[test]
fn a_second_migration_during_the_first_and_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let (source, mut destination, _, _proxy) = begin(folder.path());
    let (_other, elsewhere) = receiver(folder.path(), "other");
    migrate(&source, elsewhere, &[]).refused(1, "the guest is being moved");
    run(["pause", "--api", api(&source)]).refused(1, "the guest is being moved");
    run(["resume", "--api", api(&source)]).refused(1, "the guest is being moved");
    // Its report is not fetched, so the process stays for a while.
    wait_until("the move", || source.status().unwrap().state == VmState::Moved);
    assert!(source.status().unwrap().guest.is_none(), "a guest that has gone has nothing to say here");
    migrate(&source, elsewhere, &[]).refused(1, "the guest runs elsewhere now");
    run(["resume", "--api", api(&source), "--force"]).refused(1, "the guest runs elsewhere now");
    run(["pause", "--api", api(&source)]).refused(1, "the guest runs elsewhere now");
    destination.expect("arrived").unwrap();
    assert_runs(&destination);
    settle(&destination, &LOADED);
    say::figures("a second migration", "refused during the first and after it");
}

#[test]
fn called_off_and_moved_again_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let idle = run(["cancel", "--api", api(&Guest::SMALL.start(folder.path(), "idle"))]);
    idle.refused(1, "no migration is under way");
    let (source, mut destination, address, proxy) = begin(folder.path());
    for attempt in 1..=3 {
        let ran = run(["cancel", "--api", api(&source), "--json"]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let migration = source.wait_migration(PATIENCE).unwrap();
        assert_eq!(migration.number, attempt);
        let report = migration.report.unwrap();
        assert_eq!(report.verdict, Verdict::Stayed);
        assert_eq!(report.failure.unwrap().code, migration::Code::CANCELLED);
        assert_runs(&source);
        let event = destination.expect("refused").unwrap();
        assert_eq!(event["why"]["code"], "cancelled", "the other side's operator reads it too: {event}");
        source.migrate(&request(proxy.address())).unwrap();
        wait_until("pre-copy", || {
            let progress = source.migration().unwrap().progress;
            progress.phase == Phase::Precopy && progress.sent > attempt << 18
        });
    }
    source.cancel().unwrap();
    source.wait_migration(PATIENCE).unwrap();
    destination.expect("refused").unwrap();
    hop(&source, &mut destination, address);
    settle(&destination, &LOADED);
    say::figures("called off", "4 times in pre-copy, then moved");
}

/// It waits before the switchover. What was asked for at first no longer counts when it ends.
#[test]
fn a_migration_is_changed_while_it_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let source = Guest::SMALL.start(folder.path(), "source");
    run(["switch-now", "--api", api(&source)]).refused(1, "no migration is under way");
    let (mut destination, address) = receiver(folder.path(), "destination");
    // No switchover is that short.
    let asked =
        ["--downtime-limit", "1ms", "--on-stall", "switch", "--pause-before-switchover", "1h", "--detach"];
    let ready = |node: &Node| node.migration().unwrap().progress.phase == Phase::ReadyToSwitch;
    assert_eq!(migrate(&source, address, &asked).code, Some(0));
    wait_until("the wait before the switchover", || ready(&source));
    assert!(source.status().unwrap().guest.unwrap().clean);
    assert_eq!(source.status().unwrap().state, VmState::Migrating);
    assert_eq!(run(["change", "--api", api(&source), "--downtime-limit", "1h"]).code, Some(0));
    let proceed = serde_json::json!({ "proceed": true });
    let _: Value = source.api().call(hyper::Method::PATCH, "/v1/migration", &proceed).unwrap();
    let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!((report.verdict, report.over_limit), (Verdict::Moved, None), "the new limit was kept to");
    destination.expect("arrived").unwrap();

    let (mut last, address) = receiver(folder.path(), "last");
    assert_eq!(migrate(&destination, address, &asked).code, Some(0));
    wait_until("the wait before the switchover", || ready(&destination));
    assert_eq!(run(["switch-now", "--api", api(&destination)]).code, Some(0));
    let report = destination.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    assert!(report.over_limit.unwrap().contains("an operator asked for the switchover"));
    last.expect("arrived").unwrap();
    settle(&last, &Guest::SMALL);
    say::figures("a migration that waits", "its limit was changed, and an operator switched it over");
}

#[test]
fn a_guest_that_does_not_converge() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest { working_set: 16 << 20, vcpus: 2, ..LOADED };
    let source = guest.start(folder.path(), "source");
    let (mut destination, address) = receiver(folder.path(), "destination");
    // No switchover is that short, so every round ends over the limit.
    let limit = ["--downtime-limit", "1ms"];
    for (more, why) in [
        (&["--on-stall", "abort"][..], "rounds made no progress"),
        (&["--max-rounds", "2"], "after 2 rounds"),
    ] {
        let ran = migrate(&source, address, &[&limit, more].concat());
        assert_eq!(ran.code, Some(3), "{ran:?}");
        let failure = failure(&ran);
        assert_eq!(failure["code"], "not-converging");
        assert!(failure["message"].as_str().unwrap().contains(why), "{failure}");
        assert_runs(&source);
        destination.expect("refused").unwrap();
    }
    let ran = migrate(&source, address, &[&limit[..], &["--on-stall", "switch"]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report = &ran.json()["report"];
    assert_eq!(report["verdict"], "moved");
    assert!(report["over_limit"].as_str().is_some_and(|why| why.contains("limit 1.0 ms")), "{report}");
    destination.expect("arrived").unwrap();
    settle(&destination, &guest);
    say::figures("a guest that does not converge", "stayed twice, then moved over its limit");
}

#[test]
fn a_paused_guest() {
    let folder = tempfile::tempdir().unwrap();
    let source = Guest::SMALL.start(folder.path(), "source");
    let (mut destination, address) = receiver(folder.path(), "destination");
    assert_eq!(run(["pause", "--api", api(&source)]).code, Some(0));
    assert_eq!(source.status().unwrap().state, VmState::Paused);
    assert_stands_still(&source);
    // A move that fails leaves it paused as well.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_ne!(migrate(&source, nobody, &[]).code, Some(0));
    assert_eq!(source.status().unwrap().state, VmState::Paused);
    assert_stands_still(&source);
    hop(&source, &mut destination, address);
    assert_eq!(destination.status().unwrap().state, VmState::Paused);
    assert_stands_still(&destination);
    // Once more, from a process in which it has never run.
    let (mut third, address) = receiver(folder.path(), "third");
    hop(&destination, &mut third, address);
    assert_eq!(third.status().unwrap().state, VmState::Paused);
    assert_stands_still(&third);
    assert_eq!(run(["resume", "--api", api(&third)]).code, Some(0));
    assert_runs(&third);
    settle(&third, &Guest::SMALL);
    say::figures("a paused guest", "moved twice, paused, and resumed there");
}
