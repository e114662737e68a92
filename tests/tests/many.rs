//! As many machines on one host as it carries: what listing them costs.

use hyper::Method;
use std::fs;
use std::time::{Duration, Instant};
use whimbrel::api::model::VmState;
use whimbrel_tests::named::at;
use whimbrel_tests::say;
use whimbrel_tests::service::Service;
use whimbrel_tests::sides::wait_until;

/// Most memory that the service may have, in KiB.
const SERVICE: u64 = 64 << 10;

/// As many machines as `WHIMBREL_MACHINES` says, 200 without it. They tick 20 times a second, as an idle
/// operating system does at most, so that it is the host that is measured and not the guests.
#[test]
#[ignore = "takes minutes: run it by `--ignored`"]
fn two_hundred_machines_are_listed() {
    let machines = std::env::var("WHIMBREL_MACHINES").map_or(200, |number| number.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("machines");
    fs::create_dir(&files).unwrap();
    let host = Service::start(&folder.path().join("host"), &format!("machines = {files:?}\n"));
    let mut names: Vec<_> = (0..machines).map(|number| format!("web{number:03}")).collect();
    for name in &names {
        let machine = "memory = '16M'\ntimer-hz = 20\nserial = 'none'\n";
        fs::write(files.join(format!("{name}.toml")), machine).unwrap();
        host.change(Method::POST, &format!("/v1/machines/{name}/start")).unwrap();
    }
    let running = |name: &String| host.vm(name).is_ok_and(|vm| vm.state == VmState::Running);
    wait_until("all run", || names.iter().all(running));
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let began = Instant::now();
            let listed = at(host.run(), &["list", "--json"]);
            let took = began.elapsed();
            let listed = listed.json();
            let listed = listed.as_array().unwrap().iter();
            assert_eq!(listed.filter(|machine| machine["state"] == "running").count(), machines);
            took
        })
        .collect();
    times.sort_unstable();
    let memory = resident(host.status().pid);
    say::figures(
        &format!("{machines} machines"),
        format_args!(
            "`list` takes {} ms, {} at most; the service has {} MiB",
            times[times.len() / 2].as_millis(),
            times[times.len() - 1].as_millis(),
            memory >> 10
        ),
    );
    assert!(memory < SERVICE, "{memory} KiB");
    names.sort_unstable();
    assert_eq!(host.names(), names);
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
