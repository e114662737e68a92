//! Disks on an NFS server, with each host as a client of its own: what `disks` shows of a local disk holds
//! there too. In the lab.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use whimbrel::node::Node;
use whimbrel_tests::command::{run, run_command};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::nfs::Nfs;
use whimbrel_tests::say;
use whimbrel_tests::scene::{Host, Scene, confirmed, kills, older_than_its_disk};
use whimbrel_tests::sides::{Guest, PATIENCE, hop, wait_until};

/// How long something that must not happen is waited for.
const WHILE: Duration = Duration::from_secs(1);

/// What a message calls the holder of a disk that the other host has.
const ELSEWHERE: &str = "a process of another host";

#[test]
#[ignore = "needs an NFS server: ci/nfs runs it in the lab"]
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
#[ignore = "needs an NFS server: ci/nfs runs it in the lab"]
fn a_second_machine_is_refused() {
    let scene = Scene::on_nfs();
    let first = scene.guest(Host::A, "first");
    refused(&scene, Host::B, &format!("is in use by {ELSEWHERE}; stop that first"));
    refused(&scene, Host::A, &format!("is in use by process {} (whimbrel); stop that first", first.pid()));
    scene.assert_writes(&first);
}

/// A second machine with the same disk.
fn refused(scene: &Scene, host: Host, why: &str) {
    let mut command = Command::new(scene.program(host));
    run_command(command.args(["run", "--serial", "none"]).args(scene.disk.of_the_guest())).refused(1, why);
}

/// Waits until the guest waits for the server; how many entries it has written.
fn wait_stuck(node: &Node) -> u64 {
    let mut known = 0;
    wait_until("the guest's wait for a write", || {
        let before = std::mem::replace(&mut known, confirmed(node));
        thread::sleep(WHILE);
        known == before
    });
    known
}

/// The server still carries out what a killed process has asked for. The lock must not go before that is
/// done.
#[test]
#[ignore = "needs an NFS server: ci/nfs runs it in the lab"]
fn a_killed_machine_keeps_its_lock_until_its_last_write_is_done() {
    let scene = Scene::on_nfs();
    let mut first = scene.guest(Host::A, "first");
    let frozen = Nfs::get().freeze();
    let known = wait_stuck(&first);
    first.kill().unwrap();
    let begin = Instant::now();
    while begin.elapsed() < WHILE {
        refused(&scene, Host::B, &format!("is in use by {ELSEWHERE}"));
    }
    drop(frozen);
    // Of all clients' locks the server knows.
    let place = format!(":{} ", fs::metadata(scene.disk.path()).unwrap().ino());
    wait_until("the end of the last write", || !fs::read_to_string("/proc/locks").unwrap().contains(&place));
    scene.finish_anew(known, None);
}

/// By system calls that would not be so.
#[test]
#[ignore = "needs an NFS server: ci/nfs runs it in the lab"]
fn writing_takes_io_uring() {
    let scene = Scene::on_nfs();
    let mut command = Command::new(scene.program(Host::A));
    command.args(["run", "--serial", "none", "--aio", "sync"]).args(scene.disk.of_the_guest());
    run_command(&mut command).refused(1, "is on NFS, where writing takes io_uring");
}

#[test]
#[ignore = "needs an NFS server: ci/nfs runs it in the lab"]
fn either_side_is_killed() {
    // Each side as it prepares, switches over and commits; `disks` has all the rest.
    kills("kill -9 with a disk on NFS", 6, Scene::on_nfs);
}

#[test]
#[ignore = "needs an NFS server: ci/nfs runs it in the lab"]
fn a_guest_that_is_older_than_its_disk_never_runs() {
    older_than_its_disk(Scene::on_nfs, |_| ELSEWHERE.into());
}

/// Once the lease has run out, the server gives the lock to the next client that asks. What the host still
/// had to write when it was cut off comes too late.
#[test]
#[ignore = "needs an NFS server: ci/nfs runs it in the lab"]
fn a_host_that_is_cut_off_loses_its_disk() {
    let scene = Scene::on_nfs();
    let first = scene.guest(Host::A, "first");
    let cut = Nfs::get().cut();
    let known = wait_stuck(&first);
    refused(&scene, Host::B, &format!("is in use by {ELSEWHERE}"));
    Nfs::get().wait_lease();
    let second = scene.guest(Host::B, "second");
    drop(cut);
    let lost = first.wait_guest("the loss", PATIENCE, |guest| !guest.clean).unwrap();
    assert!(lost.problems[0].contains("requests to the disk failed"), "{:?}", lost.problems);
    // The word that an entry is written may have been on its way.
    assert!(lost.journal <= known + 1, "{} entries of {known}", lost.journal);
    scene.finish_at(&second);
    // Nobody has the lock now. The first one's guest is older than its disk, and must not have it again.
    let entries = scene.disk.entries().unwrap();
    let api = first.api_path().to_str().unwrap();
    for change in ["pause", "resume"] {
        assert_eq!(run([change, "--api", api]).code, Some(0));
    }
    thread::sleep(WHILE);
    assert_eq!(scene.disk.entries(), Ok(entries));
}
