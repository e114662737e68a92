//! Memory that differs between the sides is found, named and kept.

use migration::memory::{PAGE_SIZE, part_len};
use migration::report::Verdict;
use migration::{Code, report::Report};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, assert_runs, is_empty, request, wait_until};

/// Bytes of memory that the destination keeps together.
const CHUNK: u64 = 512 * PAGE_SIZE;

/// A `whimbrel` that keeps what differs in `folder`.
fn keeping(saved: &Path, folder: &Path, name: &str, arguments: &[&str]) -> Node {
    let mut variable = OsString::from("WHIMBREL_SAVE_DIFFERING=");
    variable.push(saved);
    let before = [variable, whimbrel().into()];
    let arguments = before.into_iter().chain(arguments.iter().map(OsString::from));
    Node::start(Path::new("env"), folder, name, arguments).unwrap()
}

/// The file behind a part of the memory of a process's guest, once there is one.
fn memory_of(node: &Node, part: u64) -> Option<File> {
    let name = format!("/memfd:guest-ram-0.{part} (deleted)");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().flatten();
    let mut descriptors = descriptors.map(|entry| entry.path());
    let of_it = descriptors.find(|path| std::fs::read_link(path).is_ok_and(|to| to == Path::new(&name)))?;
    Some(OpenOptions::new().write(true).open(of_it).unwrap())
}

/// A page that nobody ever sends, because the guest has never touched it, changes at the destination.
#[test]
fn a_page_that_differs_is_found_named_and_kept() {
    let (folder, saved) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let small = Guest::SMALL;
    let (memory, working_set) = (small.memory.to_string(), small.working_set.to_string());
    let run =
        ["run", "--memory", &memory, "--working-set", &working_set, "--serial", "none", "--seccomp", "on"];
    let mut guest = keeping(saved.path(), folder.path(), "guest", &run);
    guest.expect("running").unwrap();
    guest.wait_guest("the guest's start", PATIENCE, |guest| guest.state == "running").unwrap();
    let receive = ["receive", "--listen", "127.0.0.1:0", "--serial", "none", "--seccomp", "on"];
    let mut next = keeping(saved.path(), folder.path(), "next", &receive);
    let address = next.expect("listening").unwrap()["address"].as_str().unwrap().parse().unwrap();

    let proxy = Proxy::start(address, Rules { data_delay: Duration::from_millis(20), ..Rules::default() });
    let mut request = request(proxy.address());
    request.compare_memory = true;
    guest.migrate(&request).unwrap();
    let part_len = part_len(small.memory);
    // The guest has its program at the start of memory and its working set at the end.
    let (part, offset) = (small.memory / part_len / 2, 3 * PAGE_SIZE);
    let mut file = None;
    wait_until("there is memory at the destination", || {
        file = memory_of(&next, part);
        file.is_some()
    });
    file.unwrap().write_all_at(b"not the guest's", offset).unwrap();

    let report: Report = guest.wait_migration(PATIENCE).unwrap().report.unwrap();
    let why = report.failure.unwrap();
    assert_eq!((report.verdict, why.code), (Verdict::Stayed, Code::DIGEST), "{why}");
    let differs = part * part_len + offset;
    assert!(why.message.ends_with(&format!("these pages differ: {differs:#x}")), "{why}");
    next.expect("refused").unwrap();
    assert!(is_empty(&next));
    assert_runs(&guest);

    let read = |side: &str, address: u64| std::fs::read(saved.path().join(format!("{side}-{address:#x}")));
    let (first, page) = (differs / CHUNK * CHUNK, PAGE_SIZE as usize);
    assert_eq!(read("source", differs).unwrap(), vec![0; page], "what the guest has there");
    let there = read("destination", first).unwrap();
    let mut expected = vec![0; CHUNK as usize];
    expected[(differs - first) as usize..][..15].copy_from_slice(b"not the guest's");
    assert!(there == expected, "what the destination had around it");
    settle(&guest, &small);
    say::figures("a page that differs", format_args!("{differs:#x}, found, named and kept"));
}
