//! A guest that reboots every second or so: it does so wherever it is, also while it moves.

use migration::report::Verdict;
use std::path::Path;
use std::time::Duration;
use whimbrel::api::model::MigrationRequest;
use whimbrel::node::Node;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::sides::{PATIENCE, receiver, request};

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
