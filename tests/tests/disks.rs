//! Kills either side with `kill -9` at fifty random moments, as `kill` does, while the guest keeps a journal
//! on a disk that both sides may open. At most one process ever touches the disk, and only while it has the
//! disk's lock. What is on the disk is never lost, torn or stale. The guest runs at exactly one side, or it
//! has died with the machine that it ran on and can be started from the disk.
//!
//! The kernel shows that only one process touches the disk ([`Observer`]), not what the sides say of
//! themselves.

use migration::report::Verdict;
use std::fs;
use std::path::Path;
use std::process::Command;
use whimbrel::node::Node;
use whimbrel_tests::command::run_command;
use whimbrel_tests::observer::owners;
use whimbrel_tests::say;
use whimbrel_tests::scene::{Host, Scene, kills, older_than_its_disk};
use whimbrel_tests::sides::{PATIENCE, hop, migrate, request};

fn local() -> Scene {
    // Where programs are built there is a real file system, more likely than where temporary files are.
    Scene::local(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

#[test]
fn fifty_kills_with_a_disk() {
    let touched = kills("kill -9 with a disk", 50, local);
    say::figures(
        "50 disks",
        format_args!("{touched} processes had one, each while it had its lock and none after the next"),
    );
}

#[test]
fn a_guest_that_is_older_than_its_disk_never_runs() {
    // Which one, a confined process may not see.
    older_than_its_disk(local, |_| "a process that this one may not look at".into());
}

/// The same path and the same size, but another file.
#[test]
fn a_guest_does_not_move_to_another_file() {
    let scene = local();
    let source = scene.guest(Host::A, "source");
    let path = scene.disk.path();
    let copy = path.with_extension("copy");
    fs::copy(&path, &copy).unwrap();
    let original = path.with_extension("original");
    fs::rename(&path, &original).unwrap();
    fs::rename(&copy, &path).unwrap();
    let before = fs::read(&path).unwrap();
    let (mut careful, address) = scene.receiver(Host::B, "careful");
    let report = migrate(&source, &request(address));
    assert_eq!((report.verdict, report.rounds.len()), (Verdict::Stayed, 0));
    let why = report.failure.unwrap().message;
    assert!(why.contains("is not locked here") && why.contains("--trust-storage"), "{why}");
    careful.expect("refused").unwrap();
    scene.assert_writes(&source);
    assert!(fs::read(&path).unwrap() == before, "the other file was written to");

    // Back in its place it is the same file, and the same receiver takes the guest in.
    fs::rename(&original, &path).unwrap();
    hop(&source, &mut careful, address);
    scene.assert_writes(&careful);

    fs::copy(&path, &copy).unwrap();
    fs::rename(&copy, &path).unwrap();
    let mut more = scene.disk.of_a_receiver();
    more.push("--trust-storage".into());
    let folder = tempfile::tempdir().unwrap();
    let (mut trusting, address) =
        Node::receiver(scene.program(Host::B), folder.path(), "trusting", more).unwrap();
    hop(&careful, &mut trusting, address);
    say::figures("another file", format_args!("refused before anything moved: {why}"));
}

/// That the means of proof would notice.
#[test]
fn a_second_writer_is_noticed() {
    let scene = local();
    let source = scene.guest(Host::A, "source");
    if scene.observer.is_some() {
        assert_eq!(scene.owners(), 1);
    }
    // One block, of zeros, once: by a program that asks for no lock.
    let target = format!("of={}", scene.disk.path().display());
    let options = ["if=/dev/zero", &target, "bs=4k", "count=1", "seek=5", "conv=notrunc", "oflag=direct"];
    assert_eq!(run_command(Command::new("dd").args(options)).code, Some(0));
    let found = source.wait_guest("the guest notices", PATIENCE, |guest| !guest.clean).unwrap();
    assert!(found.problems[0].contains("1 wrong blocks on the disk: block 5"), "{:?}", found.problems);
    if let Some(observer) = &scene.observer {
        let what = owners(&observer.seen()).unwrap_err();
        assert!(what.contains("without its lock"), "{what}");
    }
    say::figures("a second writer", &found.problems[0]);
}
