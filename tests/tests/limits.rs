//! What a receiver takes, and what it does not.

use migration::Code;
use migration::report::Verdict;
use whimbrel::api::model::VmState;
use whimbrel::node::Node;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::sides::{Guest, assert_runs, hop, migrate, request};

#[test]
fn a_guest_that_exceeds_a_limit_stays_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let more = ["--rng", "--console", "none"];
    let guest = Guest { vcpus: 2, ..Guest::SMALL }.start_by(whimbrel(), &more, folder.path(), "db1");
    let limits: [(&[&str], &str); 5] = [
        (&["--max-memory", "31M"], "it has 32 MiB of memory, of which at most 31 MiB are allowed"),
        (&["--max-vcpus", "1"], "it has 2 vCPUs, of which at most 1 are allowed"),
        (&["--max-rngs", "0"], "it has 1 entropy devices, of which at most 0 are allowed"),
        (&["--max-consoles", "0"], "it has 1 consoles, of which at most 0 are allowed"),
        (&["--names", "web*", "--names", "db2"], "its name is db1, and only web*, db2 may come"),
    ];
    for (number, (options, what)) in limits.into_iter().enumerate() {
        let name = format!("refuses{number}");
        let (mut node, address) = Node::receiver(whimbrel(), folder.path(), &name, options).unwrap();
        let report = migrate(&guest, &request(address));
        let why = report.failure.unwrap();
        assert_eq!((report.verdict, why.code), (Verdict::Stayed, Code::LIMITS), "{why}");
        assert!(why.message.contains(what) && why.message.lines().count() == 1, "{why}");
        assert_runs(&guest);
        // It waits for another, and says so as before.
        assert_eq!(node.expect("refused").unwrap()["why"]["code"], "limits");
        assert_eq!(node.status().unwrap().state, VmState::Waiting);
    }
    let within = [
        ["--max-memory", "32M"],
        ["--max-vcpus", "2"],
        ["--max-disks", "0"],
        ["--max-nics", "0"],
        ["--max-rngs", "1"],
        ["--names", "d*1"],
    ];
    let (mut node, address) = Node::receiver(whimbrel(), folder.path(), "takes", within.concat()).unwrap();
    hop(&guest, &mut node, address);
    assert_runs(&node);
}
