//! A guest that reboots every second or so: it does so wherever it is, also while it moves.

use migration::report::Verdict;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use whimbrel::api::model::MigrationRequest;
use whimbrel::node::Node;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::sides::{PATIENCE, receiver, request, wait_until};

#[allow(dead_code, unreachable_pub)] // the guests of another test program
#[path = "../../vmm/tests/common/guests.rs"]
mod guests;

#[path = "../../vmm/tests/common/elf.rs"]
mod elf;

fn start(folder: &Path, code: &[u8], more: &[&str]) -> Node {
    let kernel = folder.join("kernel");
    std::fs::write(&kernel, elf::pvh_elf(code)).unwrap();
    let words = ["run", "--memory", "64M", "--serial", "none"].into_iter().chain(more.iter().copied());
    let words = words.map(Into::into).chain(["--kernel".into(), kernel.clone()]);
    let mut node = Node::start(whimbrel(), folder, "side-0", words).unwrap();
    node.expect("running").unwrap();
    // It is not read again.
    std::fs::remove_file(kernel).unwrap();
    node
}

fn wait_event(node: &mut Node, wanted: &str) {
    loop {
        match node.next_event().unwrap()["event"].as_str() {
            Some(event) if event == wanted => return,
            Some("rebooted" | "arrived") => {}
            other => panic!("{other:?} instead of {wanted}: {}", node.stderr()),
        }
    }
}

#[test]
fn a_guest_reboots_wherever_it_is_and_while_it_moves() {
    let folder = tempfile::tempdir().unwrap();
    let mut node = start(folder.path(), guests::again(), &[]);
    wait_event(&mut node, "rebooted");
    for side in 1..4 {
        let (mut next, address) = receiver(folder.path(), &format!("side-{side}"));
        // At another moment of its life each time. All memory is compared before it is handed over.
        std::thread::sleep(Duration::from_millis(330 * side));
        let asked = MigrationRequest { compare_memory: true, ..request(address) };
        node.migrate(&asked).unwrap();
        let report = node.wait_migration(PATIENCE).unwrap().report.unwrap();
        assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
        wait_event(&mut next, "rebooted");
        wait_event(&mut next, "rebooted");
        node = next;
    }
}

#[test]
fn the_option_ends_the_process_instead() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.toml");
    std::fs::write(&config, "on-reboot = 'exit'\n").unwrap();
    let mut node = start(folder.path(), guests::again(), &["--config", config.to_str().unwrap()]);
    let ended = node.expect("ended").unwrap();
    assert_eq!(ended["how"]["outcome"], "reset");
    assert_eq!(node.wait_exit(PATIENCE).unwrap().code(), Some(0));
}

/// A disk whose file system has this kernel.
fn disk(folder: &Path, code: &[u8]) -> PathBuf {
    let (root, image) = (folder.join("root"), folder.join("disk"));
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::write(root.join("vmlinuz"), elf::pvh_elf(code)).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).args([&root, &image]).arg("16M").output();
    assert!(made.unwrap().status.success());
    image
}

/// The process that waits until a guest reboots from its disk.
fn boot_reader(node: &Node) -> u32 {
    let pid = node.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let mut children = children.split_whitespace();
    let reader = children.next().expect("a reader of disks").parse().unwrap();
    assert_eq!(children.next(), None);
    reader
}

#[test]
fn another_process_reads_the_disk_wherever_a_guest_reboots_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let image = disk(folder.path(), guests::again());
    let image = format!("{},cached", image.display());
    let words = ["run", "--memory", "64M", "--serial", "none", "--disk", &image];
    let mut source = Node::start(whimbrel(), folder.path(), "source", words).unwrap();
    source.expect("running").unwrap();
    wait_event(&mut source, "rebooted");
    let words = ["--disks", folder.path().to_str().unwrap()];
    let (mut target, address) = Node::receiver(whimbrel(), folder.path(), "target", words).unwrap();
    let readers = [&source, &target].map(boot_reader);
    for reader in readers {
        let status = std::fs::read_to_string(format!("/proc/{reader}/status")).unwrap();
        for line in ["Threads:\t1", "NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
            assert!(status.contains(line), "{line}: {status}");
        }
        let files = std::fs::read_dir(format!("/proc/{reader}/fd")).unwrap().count();
        assert_eq!(files, 1, "the socket by which it is asked");
    }
    source.migrate(&request(address)).unwrap();
    let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    wait_event(&mut target, "rebooted");
    wait_event(&mut target, "rebooted");
    // It ends with its machine.
    assert_eq!(source.wait_exit(PATIENCE).unwrap().code(), Some(0));
    let gone = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        status.map_or(true, |status| status.contains("State:\tZ") || !status.contains("whimbrel"))
    };
    wait_until("the end of the source's reader", || gone(readers[0]));
    // The machine does not do it by itself.
    // SAFETY: the call takes integers; the process is a child of a child that has not ended.
    unsafe { libc::kill(readers[1] as i32, libc::SIGKILL) };
    // One reboot may have been under way, and another be told already.
    let events = (0..3).map(|_| target.next_event().unwrap());
    let ended = events.into_iter().find(|event| event["event"] != "rebooted").expect("the guest's end");
    assert_eq!(ended["event"], "ended", "{ended}");
    assert!(ended["how"].to_string().contains("the process that reads it has gone"), "{ended}");
}
