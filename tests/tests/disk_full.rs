//! A disk that its host has no room for: the guest waits for it, or is told, as the disk's options say.

use std::path::{Path, PathBuf};
use std::process::Command;
use whimbrel::api::model::VmState;
use whimbrel::node::Node;
use whimbrel_tests::command::run_command;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::scene::confirmed;
use whimbrel_tests::sides::{PATIENCE, assert_stands_still, request};
use whimbrel_tests::wire::skip::skipped;

/// A file system of 1 MiB, in a mount namespace of this thread and its processes.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Option<Self> {
        // SAFETY: changes the namespace of this thread only, which ends with the test.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            skipped("needs root, for a file system of its own");
            return None;
        }
        let small = Small(tempfile::tempdir().unwrap());
        mount(&["--make-rprivate", "/"]);
        mount(&["-t", "tmpfs", "-o", "size=1m", "small", small.0.path().to_str().unwrap()]);
        // Only what is written to takes room.
        std::fs::File::create(small.disk()).unwrap().set_len(4 << 20).unwrap();
        Some(small)
    }

    fn disk(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    fn grow(&self) {
        mount(&["-o", "remount,size=16m", self.0.path().to_str().unwrap()]);
    }

    /// The guest that writes to 2 MiB of the disk.
    fn guest(&self, folder: &Path, aio: &str, options: &str) -> Node {
        let disk = format!("{},cached{options}", self.disk().display());
        let words =
            ["run", "--memory", "32M", "--serial", "none", "--journal", "512", "--aio", aio, "--disk", &disk];
        let mut node = Node::start(whimbrel(), folder, "source", words).unwrap();
        node.expect("running").unwrap();
        node
    }
}

fn mount(words: &[&str]) {
    assert_eq!(run_command(Command::new("mount").args(words)).code, Some(0), "mount {words:?}");
}

/// In a thread of its own, whose namespace is nobody else's.
fn alone(test: impl FnOnce() + Send) {
    let ended = std::thread::scope(|scope| scope.spawn(test).join());
    if let Err(panic) = ended {
        std::panic::resume_unwind(panic);
    }
}

fn assert_waits(node: &Node) {
    let vm = node.status().unwrap();
    let trouble = vm.trouble.expect("a reason");
    assert_eq!(vm.state, VmState::Paused);
    assert!(trouble.contains("No space left on device"), "{trouble}");
    assert!(vm.guest.unwrap().clean, "the guest was told of an error");
}

fn waits_moves_and_goes_on(aio: &str) {
    let Some(small) = Small::mount() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut source = small.guest(folder.path(), aio, "");
    assert!(source.expect("disk-trouble").unwrap()["why"].as_str().unwrap().contains("No space left"));
    assert_waits(&source);
    // Let run on without room, it comes back here.
    source.resume(false).unwrap();
    source.expect("disk-trouble").unwrap();
    assert_waits(&source);
    assert_stands_still(&source);

    let words = ["--aio", aio, "--disks", small.0.path().to_str().unwrap()];
    let (mut target, address) = Node::receiver(whimbrel(), folder.path(), "target", words).unwrap();
    source.migrate(&request(address)).unwrap();
    let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert!(report.failure.is_none(), "{:?}", report.failure);
    // The guest may find no room before the end of the migration has been told.
    let mut told = [(); 2].map(|()| target.next_event().unwrap()["event"].to_string());
    told.sort_unstable();
    assert_eq!(told, ["\"arrived\"", "\"disk-trouble\""], "{}", target.stderr());
    assert_waits(&target);
    let before = confirmed(&target);

    small.grow();
    target.expect("disk-recovered").unwrap();
    let guest = target.wait_guest("it writes", PATIENCE, |_| confirmed(&target) > before + 600).unwrap();
    assert!(guest.clean, "{:?}", guest.problems);
    let vm = target.status().unwrap();
    assert_eq!((vm.state, vm.trouble), (VmState::Running, None));
    // An operator's word counts for more.
    target.quit().unwrap();
}

#[test]
fn a_guest_waits_for_room_moves_meanwhile_and_goes_on() {
    alone(|| waits_moves_and_goes_on("sync"));
}

#[test]
fn so_it_does_with_requests_that_are_carried_out_several_at_a_time() {
    alone(|| waits_moves_and_goes_on("io_uring"));
}

#[test]
fn the_guest_is_told_if_that_is_wanted() {
    alone(|| {
        let Some(small) = Small::mount() else { return };
        let folder = tempfile::tempdir().unwrap();
        let node = small.guest(folder.path(), "sync", ",werror=report");
        let told = node.wait_guest("the guest notices", PATIENCE, |guest| !guest.clean).unwrap();
        assert!(node.status().unwrap().trouble.is_none(), "{:?}", told.problems);
    });
}
