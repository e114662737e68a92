//! This program and the last released one: guests move between them both ways, in the clear and encrypted.
//!
//! Whimbrel speaks its version of the protocol and the one before, so that a fleet is updated host by host.
//! `ci/versions` builds the program of the last release and runs this.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use whimbrel::api::model::MigrationRequest;
use whimbrel::node::Node;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel::security::TlsFiles;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::sides::{Guest, assert_runs, hop_as, request};

/// Two virtual CPUs, and something of everything in memory.
const GUEST: Guest = Guest { memory: 128 << 20, vcpus: 2, working_set: 8 << 20, fill: 32 << 20 };

/// How often the guest changes to the other version.
const MOVES: usize = 4;

/// The program of the last release.
fn released() -> PathBuf {
    let path =
        std::env::var_os("WHIMBREL_RELEASED").expect("WHIMBREL_RELEASED names the program of a release");
    PathBuf::from(path)
}

/// Moves a guest back and forth between two programs, beginning at the first. In the end all that it has is
/// verified or, if it may not come into the test's own process for want of a certificate, that it finds
/// nothing wrong.
fn back_and_forth(programs: [&Path; 2], tls: Option<&Path>) {
    let folder = tempfile::tempdir().unwrap();
    let options: Vec<&str> = tls.iter().flat_map(|tls| ["--tls", tls.to_str().unwrap()]).collect();
    let request = |to: SocketAddr| match tls {
        None => request(to),
        Some(tls) => {
            let files = TlsFiles { folder: Some(tls.to_path_buf()), ..TlsFiles::default() };
            MigrationRequest { tls: Some(files), insecure: false, ..request(to) }
        }
    };
    let mut node = GUEST.start_by(programs[0], &options, folder.path(), "guest-0");
    for number in 1..=MOVES {
        let (program, name) = (programs[number % 2], format!("guest-{number}"));
        let (mut next, address) = Node::receiver(program, folder.path(), &name, &options).unwrap();
        let report = hop_as(&node, &mut next, &request(address));
        assert!(report.rounds.len() > 1, "the guest did not work while it moved");
        node.expect("moved").unwrap();
        node = next;
    }
    match tls {
        None => settle(&node, &GUEST),
        Some(_) => assert_runs(&node),
    };
}

#[test]
#[ignore = "needs the program of the last release: ci/versions"]
fn guests_move_between_this_version_and_the_last_one() {
    let released = released();
    back_and_forth([whimbrel(), &released], None);
    back_and_forth([&released, whimbrel()], None);
}

#[test]
#[ignore = "needs the program of the last release: ci/versions"]
fn guests_move_between_the_two_versions_encrypted() {
    let (folder, released) = (tempfile::tempdir().unwrap(), released());
    let authority = Authority::create(folder.path()).unwrap();
    authority.issue("host.example", &["127.0.0.1".into()], days_from_now(1)).unwrap();
    let host = authority.host("host.example");
    back_and_forth([whimbrel(), &released], Some(&host));
    back_and_forth([&released, whimbrel()], Some(&host));
}
