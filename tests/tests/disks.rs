//! Kills either side with `kill -9` at fifty random moments, as `kill` does, while the guest keeps a journal
//! on a disk that both sides may open. At most one process ever touches the disk, and only while it has the
//! disk's lock. What is on the disk is never lost, torn or stale. The guest runs at exactly one side, or it
//! has died with the machine that it ran on and can be started from the disk.
//!
//! The kernel shows that only one process touches the disk ([`Observer`]), not what the sides say of
//! themselves.

use std::path::Path;
use std::process::Command;
use whimbrel_tests::command::run_command;
use whimbrel_tests::observer::owners;
use whimbrel_tests::say;
use whimbrel_tests::scene::{Host, Scene, kills, older_than_its_disk};
use whimbrel_tests::sides::PATIENCE;

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
    older_than_its_disk(local, |holder| format!("process {}", holder.pid()));
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
