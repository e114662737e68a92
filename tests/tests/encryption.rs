//! What is encrypted, by whom, and what the report says of it.

use migration::report::Report;
use migration::transport::LaneEncryption;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel::security::Encryption;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop_as, migrate, request};
use whimbrel_tests::strace::Followed;

const GUEST: Guest = Guest { memory: 96 << 20, vcpus: 1, working_set: 2 << 20, fill: 64 << 20 };

/// The folder of a host's certificate, which is good for both sides.
fn certified(folder: &Path) -> PathBuf {
    let authority = Authority::create(&folder.join("pki")).unwrap();
    authority.issue("host.example", &["127.0.0.1".into()], days_from_now(1)).unwrap()
}

/// Moves a guest over TCP between two programs with certificates and further options, the source's first.
fn moved(
    guest: &Guest,
    folder: &Path,
    programs: [&Path; 2],
    [here, there]: [&[&str]; 2],
    encryption: Encryption,
) -> (Report, [u32; 2]) {
    let tls = certified(folder);
    let tls = ["--tls", tls.to_str().unwrap()];
    let source = guest.start_by(programs[0], &[&tls, here].concat(), folder, "source");
    let listen = ([127, 0, 0, 1], 0).into();
    let (mut destination, address) =
        Node::receiver_on(programs[1], folder, "destination", listen, [&tls, there].concat()).unwrap();
    let request =
        MigrationRequest { transport: TransportChoice::Tcp, encryption, insecure: false, ..request(address) };
    let report = hop_as(&source, &mut destination, &request);
    assert_runs(&destination);
    (report, [source.pid(), destination.pid()])
}

/// How all lanes are encrypted.
fn lanes(report: &Report) -> LaneEncryption {
    let first = report.lanes[0].encryption;
    assert!(report.lanes.iter().all(|lane| lane.encryption == first), "{:?}", report.lanes);
    first
}

#[test]
fn the_report_says_how_each_lane_was_encrypted() {
    let moved = |options, encryption| {
        let folder = tempfile::tempdir().unwrap();
        let report = moved(&Guest::SMALL, folder.path(), [whimbrel(); 2], options, encryption).0;
        lanes(&report)
    };
    let off: &[&str] = &["--ktls", "off"];
    assert_eq!(moved([off, off], Encryption::Preferred), LaneEncryption::TlsInUserSpace);
    assert_eq!(
        moved([off, &["--encryption", "required"]], Encryption::Required),
        LaneEncryption::TlsInUserSpace
    );
    // The receiver permits it, and the source wants it.
    assert_eq!(moved([off, &["--encryption", "off"]], Encryption::Preferred), LaneEncryption::TlsInUserSpace);
    assert_eq!(moved([off, &["--encryption", "off"]], Encryption::Off), LaneEncryption::None);
}

#[test]
fn memory_is_not_left_in_the_clear_by_one_side_alone() {
    let folder = tempfile::tempdir().unwrap();
    let tls = certified(folder.path());
    let tls = ["--tls", tls.to_str().unwrap()];
    let source = Guest::SMALL.start_by(whimbrel(), &tls, folder.path(), "source");
    let (_destination, address) = Node::receiver(whimbrel(), folder.path(), "destination", tls).unwrap();
    let asked = MigrationRequest {
        transport: TransportChoice::Tcp,
        encryption: Encryption::Off,
        insecure: false,
        ..request(address)
    };
    let why = migrate(&source, &asked).failure.unwrap();
    assert!(why.message.contains("takes encrypted connections only"), "{why}");
    assert_runs(&source);
}

/// What the source's program had moved by each call while the guest moved, and how lanes were encrypted.
fn traffic(options: [&[&str]; 2]) -> (LaneEncryption, u64, BTreeMap<String, u64>) {
    let folder = tempfile::tempdir().unwrap();
    let followed = Followed::new(folder.path(), "followed");
    let programs = [followed.program.as_path(), whimbrel()];
    let (report, [source, _]) = moved(&GUEST, folder.path(), programs, options, Encryption::Required);
    (lanes(&report), report.sent(), followed.bytes(source))
}

#[test]
#[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
fn the_kernel_encrypts_what_is_sent_by_file() {
    let off: &[&str] = &["--ktls", "off"];
    for (options, encryption) in [
        ([&[][..], &[]], LaneEncryption::TlsInKernel),
        ([&[], off], LaneEncryption::TlsInKernel),
        ([off, &[]], LaneEncryption::TlsInUserSpace),
    ] {
        let (said, sent, calls) = traffic(options);
        say::figures(&format!("{} MiB of pages, {said}", sent >> 20), format_args!("{calls:?}"));
        assert_eq!(said, encryption);
        assert!(sent >= GUEST.fill);
        let by_file = calls.get("sendfile").copied().unwrap_or(0);
        let copied: u64 =
            ["write", "writev", "sendto", "sendmsg"].iter().filter_map(|call| calls.get(*call)).sum();
        if said == LaneEncryption::TlsInKernel {
            assert!(by_file > sent * 9 / 10 && copied < sent / 8, "{calls:?} of {sent}");
        } else {
            assert!(by_file < sent / 8 && copied > sent, "{calls:?} of {sent}");
        }
    }
}
