//! Hosts that let a process pin next to nothing.

use migration::report::Verdict;
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::lab;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop, migrate, receiver_on, request};

#[test]
#[ignore = "needs RDMA devices and ulimit -l of 8 MiB: ci/rdma runs it in the lab"]
fn too_little_lockable_memory_means_tcp_or_nothing() {
    let guest = Guest { fill: 16 << 20, memory: 64 << 20, ..Guest::SMALL };
    let folder = tempfile::tempdir().unwrap();
    let source = guest.start(folder.path(), "source");
    let (mut destination, address) = receiver_on(folder.path(), "destination", (lab::peer(), 0).into());
    let rdma = MigrationRequest { transport: TransportChoice::Rdma, ..request(address) };
    let report = migrate(&source, &rdma);
    assert_eq!(report.verdict, Verdict::Stayed);
    let why = report.failure.unwrap().message;
    assert!(why.contains("ulimit -l"), "{why}");
    say::figures("8 MiB lockable, --transport rdma", why);
    assert_runs(&source);
    destination.expect("refused").unwrap();
    let report = hop(&source, &mut destination, address);
    assert_eq!(report.transport, "tcp");
    assert!(report.declined[0].why.message.contains("ulimit -l"), "{:?}", report.declined);
    settle(&destination, &guest);
}
