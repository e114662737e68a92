//! Disks on an NFS server, of which each host is a client of its own: what `disks` shows of a local one holds there too.
//! In the lab.

use std::process::Command;
use whimbrel_tests::command::run_command;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::say;
use whimbrel_tests::scene::{Host, Scene, kills, older_than_its_disk};
use whimbrel_tests::sides::{Guest, hop};

/// What is said of a disk that the other host has.
const ELSEWHERE: &str = "a process of another host";

#[test]
#[ignore = "needs an NFS server: ci/rdma runs it in the lab"]
fn a_guest_moves_to_and_fro() {
    const MOVES: u32 = 4;
    let scene = Scene::on_nfs();
    let mut here = scene.guest(Host::A, "side-0");
    for number in 1..=MOVES {
        let host = if number.is_multiple_of(2) { Host::A } else { Host::B };
        let (mut there, address) = scene.receiver(host, &format!("side-{number}"));
        say::moved(number, &hop(&here, &mut there, address));
        scene.assert_writes(&there);
        here = there;
    }
    let testimony = settle(&here, &Guest::SMALL);
    assert_eq!(scene.disk.entries(), Ok(testimony.journal));
    say::figures(
        "a journal over NFS",
        format_args!("{} entries, none lost, torn or stale", testimony.journal),
    );
}

#[test]
#[ignore = "needs an NFS server: ci/rdma runs it in the lab"]
fn a_second_machine_is_refused() {
    let scene = Scene::on_nfs();
    let first = scene.guest(Host::A, "first");
    let second = |host, holder: &str| {
        let mut command = Command::new(scene.program(host));
        command.args(["run", "--serial", "none"]).args(scene.disk.of_the_guest());
        run_command(&mut command).refused(1, &format!("is in use by {holder}; stop that first"));
    };
    second(Host::B, ELSEWHERE);
    second(Host::A, &format!("process {} (whimbrel)", first.pid()));
    scene.assert_writes(&first);
}

#[test]
#[ignore = "needs an NFS server: ci/rdma runs it in the lab"]
fn either_side_is_killed() {
    // Each side as it prepares, switches over and commits; `disks` has all the rest.
    kills("kill -9 with a disk on NFS", 6, Scene::on_nfs);
}

#[test]
#[ignore = "needs an NFS server: ci/rdma runs it in the lab"]
fn a_guest_that_is_older_than_its_disk_never_runs() {
    older_than_its_disk(Scene::on_nfs, |_| ELSEWHERE.into());
}
