//! Machines of a host are known by their names.

use serde_json::Value;
use whimbrel::host::run_dir::RunDir;
use whimbrel_tests::command::run;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::named::{arrived, at, listed, machine, receiver, state};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, wait_until};

#[test]
fn a_machine_is_found_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let host = RunDir::new(Some(&folder.path().join("run")));
    let ran = at(&host, &["list"]);
    assert_eq!((ran.code, ran.stdout.contains("no machine is in")), (Some(0), true), "{ran:?}");
    at(&host, &["status", "web1"]).refused(8, "no machine called web1");
    let mut web = machine(folder.path(), &host, "web1", &Guest::SMALL);
    let mut db = machine(folder.path(), &host, "db 1", &Guest::SMALL);
    let path = host.path().to_str().unwrap();
    let ran = run(["status", "--run-dir", path, "web1"]);
    assert_eq!((ran.code, ran.stdout.starts_with("web1: running")), (Some(0), true), "{ran:?}");
    at(&host, &["status", "web2"]).refused(8, "there are: db 1, web1");
    assert_eq!(run(["status"]).code, Some(2));
    assert_eq!(at(&host, &["status", "web1", "--api", "x"]).code, Some(2));
    let ran = at(&host, &["list"]);
    let rows: Vec<_> = ran.stdout.lines().collect();
    assert!(ran.code == Some(0) && rows.len() == 4, "{ran:?}");
    assert!(rows[2].contains("db 1") && rows[3].contains("web1") && rows[3].contains("32.0 MiB"), "{ran:?}");

    // A name is of one machine.
    at(&host, &["run", "--memory", "16M", "--serial", "none", "--name", "web1"])
        .refused(1, "a machine called web1 is on this host already");
    at(&host, &["run", "--memory", "16M", "--serial", "none", "--name", "../web3"])
        .refused(1, "is that of a file");
    // As long as its process lives.
    web.kill().unwrap();
    assert!(host.find("web1").is_ok(), "killed, it leaves its socket behind");
    at(&host, &["status", "web1"]).refused(8, "no virtual machine answers");
    let _again = machine(folder.path(), &host, "web1", &Guest::SMALL);
    db.kill().unwrap();
    assert_eq!(state(&host, "db 1"), None);
    assert_eq!(host.machines().unwrap(), ["web1"], "nobody serves the other socket any more");

    assert_eq!(at(&host, &["pause", "web1"]).code, Some(0));
    assert_eq!(state(&host, "web1").as_deref(), Some("paused"));
    assert_eq!(at(&host, &["resume", "web1"]).code, Some(0));
    say::figures("machines of a host", "found, listed and unique by name");
}

#[test]
fn a_machine_that_hangs_is_listed_as_silent() {
    let folder = tempfile::tempdir().unwrap();
    let host = RunDir::new(Some(folder.path()));
    let machines = ["a", "b", "c"].map(|name| machine(folder.path(), &host, name, &Guest::SMALL));
    let signal = |signal| {
        // SAFETY: the process is a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(machines[1].pid() as libc::pid_t, signal) }, 0);
    };
    signal(libc::SIGSTOP);
    wait_until("the silence", || state(&host, "b").as_deref() == Some("silent"));
    wait_until("the others' answers", || {
        ["a", "c"].iter().all(|name| state(&host, name).as_deref() == Some("running"))
    });
    signal(libc::SIGCONT);
    wait_until("its answer", || state(&host, "b").as_deref() == Some("running"));
    assert_runs(&machines[1]);
}

#[test]
fn a_machine_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let host = RunDir::new(Some(folder.path()));
    let mut guest = machine(folder.path(), &host, "web1", &Guest::SMALL);
    // This guest has no ear for its power button.
    at(&host, &["stop", "web1"]).refused(1, "does not listen to its power button");
    assert_runs(&guest);
    let ran = at(&host, &["stop", "web1", "--force", "--json"]);
    assert_eq!((ran.code, &ran.json()["shut_down"]), (Some(0), &Value::Bool(false)), "{ran:?}");
    assert_eq!(guest.wait_exit(PATIENCE).unwrap().code(), Some(0));
    assert_eq!(state(&host, "web1"), None);
}

/// From one host to the other and back: it keeps its name.
#[test]
fn a_guest_keeps_its_name_when_it_moves() {
    let folder = tempfile::tempdir().unwrap();
    let hosts = ["a", "b"].map(|host| RunDir::new(Some(&folder.path().join(host))));
    let _first = machine(folder.path(), &hosts[0], "web1", &Guest::SMALL);
    let mut nodes = Vec::new();
    for hop in 0..4 {
        let (from, to) = (&hosts[hop % 2], &hosts[(hop + 1) % 2]);
        let (mut next, address) = receiver(folder.path(), to, &[]);
        let address = address.to_string();
        assert_eq!(state(to, "web1"), None);
        let ran = at(from, &["migrate", "web1", "--on-stall", "switch", "--to", &address]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(arrived(&mut next, to), "web1");
        let there = listed(to, "web1").unwrap();
        assert_eq!(there["state"], "running");
        assert!(there["arrival"]["from"].as_str().unwrap().starts_with("127.0.0.1:"), "{there}");
        assert!(at(to, &["list"]).stdout.contains("127.0.0.1:"));
        wait_until("the name's return", || from.machines().unwrap().is_empty());
        nodes.push(next);
    }
    settle(nodes.last().unwrap(), &Guest::SMALL);
    say::figures("a guest of a host", "moved 4 times by its name");
}
