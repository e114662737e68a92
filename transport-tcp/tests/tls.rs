//! Lanes through TLS keep the contract of a data plane as well.

#![cfg(feature = "tls")]

use migration::conformance::bed::{extent, ram};
use migration::conformance::{Bed, Fixture, cases};
use migration::transport::{
    DestinationTransport, LaneEncryption, PlaneError, Session, SourceTransport, Token,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use whimbrel_transport_tcp::tls::{Files, Renewed, in_kernel};
use whimbrel_transport_tcp::{Connector, Listener, Protection, TcpDestination};

struct Tls {
    listener: Listener,
    connector: Connector,
}

impl Fixture for Tls {
    fn source(&self, lanes: u16) -> Box<dyn SourceTransport> {
        Box::new(self.connector.lanes(self.listener.local_addr(), "host.example", lanes))
    }

    fn destination(&self) -> Box<dyn DestinationTransport> {
        Box::new(TcpDestination::new(&self.listener))
    }
}

/// Files of a host that trusts itself alone.
fn make_files(folder: &Path) {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&authority_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let host = CertificateParams::new(vec!["host.example".into()]).unwrap();
    let certificate = host.signed_by(&key, &Issuer::new(authority, authority_key)).unwrap();
    fs::write(folder.join("ca.pem"), ca.pem()).unwrap();
    fs::write(folder.join("cert.pem"), certificate.pem()).unwrap();
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join("key.pem"));
    file.unwrap().write_all(key.serialize_pem().as_bytes()).unwrap();
}

type Change = fn(Protection) -> Protection;

/// The source's end and the destination's, each protected in a way of its own.
fn tls(source: Change, destination: Change) -> Tls {
    let folder = tempfile::tempdir().unwrap();
    make_files(folder.path());
    let files = Files::in_folder(folder.path());
    // Both ends have read them when the folder goes.
    let protection = Renewed::new(files, Vec::new()).protection().unwrap();
    let connector = Connector::new(source(protection.clone()));
    let protecting = move || Ok(destination(protection.clone()));
    let listener = Listener::bind_protected(1, (Ipv4Addr::LOCALHOST, 0).into(), protecting).unwrap();
    Tls { listener, connector }
}

const IN_KERNEL: Change = |protection| {
    in_kernel().unwrap();
    protection
};
const IN_USER_SPACE: Change = Protection::in_user_space;

mod in_user_space {
    use super::*;
    migration::conformance_suite!(tls(IN_USER_SPACE, IN_USER_SPACE));
}

mod in_the_kernel {
    use super::*;
    migration::conformance_suite!(
        tls(IN_KERNEL, IN_KERNEL);
        #[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
    );
}

#[test]
#[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
fn a_kernel_at_one_end_understands_a_program_at_the_other() {
    for (source, destination) in [(IN_KERNEL, IN_USER_SPACE), (IN_USER_SPACE, IN_KERNEL)] {
        let fixture = tls(source, destination);
        cases::content_arrives_and_nothing_else_changes(&fixture);
        cases::rounds_of_random_extents_end_in_equal_memory(&fixture);
    }
}

mod with_ever_new_keys {
    use super::*;
    migration::conformance_suite!(tls(renewing, IN_USER_SPACE));
}

/// Each frame finds that the keys have done their part.
fn renewing(protection: Protection) -> Protection {
    protection.with_records_per_key(1)
}

#[test]
#[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
fn new_keys_are_for_the_kernel_too() {
    for destination in [IN_KERNEL, IN_USER_SPACE] {
        let fixture = tls(|protection| renewing(IN_KERNEL(protection)), destination);
        cases::the_last_write_to_a_page_wins(&fixture);
        cases::an_interrupt_ends_every_wait(&fixture);
    }
}

/// Writes a page by the first lane so many times.
fn write(bed: &mut Bed, times: usize) {
    (0..times).for_each(|_| bed.plane.lanes()[0].write(&[extent(0, 0, 1)]).unwrap());
}

#[test]
fn a_connection_ends_with_its_keys() {
    static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);
    let counted: Change = |protection| {
        CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        protection
    };
    let count = |source: Change| {
        let before = CONNECTIONS.load(Ordering::Relaxed);
        let fixture = tls(source, counted);
        let mut bed = Bed::new(&fixture, 1);
        write(&mut bed, 9);
        bed.barrier(0);
        CONNECTIONS.load(Ordering::Relaxed) - before
    };
    assert_eq!(count(|protection| protection), 1);
    assert_eq!(count(renewing), 9);
    // A frame of one page is its head, and at most two records more.
    assert_eq!(count(|protection| protection.with_records_per_key(7)), 3);
}

#[test]
fn an_interrupt_ends_a_change_of_keys() {
    static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);
    static OVER: AtomicBool = AtomicBool::new(false);
    // The second connection is accepted, and then nothing more is heard.
    let silent: Change = |protection| {
        if CONNECTIONS.fetch_add(1, Ordering::AcqRel) > 0 {
            while !OVER.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(1));
            }
        }
        protection
    };
    let fixture = tls(renewing, silent);
    let mut bed = Bed::new(&fixture, 1);
    let interrupter = bed.plane.interrupter();
    write(&mut bed, 1);
    thread::scope(|scope| {
        let writing = scope.spawn(|| bed.plane.lanes()[0].write(&[extent(0, 0, 1)]));
        while CONNECTIONS.load(Ordering::Acquire) < 2 && !writing.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        interrupter.interrupt();
        assert!(matches!(writing.join().unwrap(), Err(PlaneError::Interrupted)));
    });
    OVER.store(true, Ordering::Release);
}

#[test]
fn lanes_are_clear_if_both_ends_say_so() {
    const CLEAR: Change = Protection::with_clear_lanes;
    let both = tls(CLEAR, CLEAR);
    assert_eq!(said(&both), LaneEncryption::None);
    cases::content_arrives_and_nothing_else_changes(&both);
    cases::a_wrong_secret_is_refused(&both);
    assert_eq!(said(&tls(IN_USER_SPACE, CLEAR)), LaneEncryption::TlsInUserSpace);
    let refusing = tls(CLEAR, IN_USER_SPACE);
    let session = Session::new(Token([1; 16]), ram(), Duration::from_secs(10));
    let _offered = refusing.destination().offer(&session).unwrap();
    let why = refusing.source(1).connect(&session, &[]).err().unwrap().to_string();
    assert!(why.contains("takes encrypted connections only"), "{why}");
}

/// How a lane says that it is encrypted.
fn said(fixture: &Tls) -> LaneEncryption {
    let mut bed = Bed::new(fixture, 1);
    bed.plane.lanes()[0].stats().encryption
}

#[test]
fn a_lane_says_how_it_is_encrypted() {
    assert_eq!(said(&tls(IN_USER_SPACE, IN_USER_SPACE)), LaneEncryption::TlsInUserSpace);
    let if_it_can =
        if in_kernel().is_ok() { LaneEncryption::TlsInKernel } else { LaneEncryption::TlsInUserSpace };
    assert_eq!(said(&tls(|protection| protection, IN_USER_SPACE)), if_it_can);
}

/// Connections of this network that the kernel has encrypted and decrypted so far, by its own count.
fn sealed() -> [u64; 2] {
    let counts = fs::read_to_string("/proc/net/tls_stat").unwrap();
    ["TlsTxSw", "TlsRxSw"].map(|name| {
        let line = counts.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    })
}

#[test]
#[ignore = "needs TLS in the kernel: ci/rdma runs it in the lab"]
fn the_kernel_says_so_too() {
    in_kernel().unwrap();
    let before = sealed();
    assert_eq!(said(&tls(IN_KERNEL, IN_USER_SPACE)), LaneEncryption::TlsInKernel);
    assert_eq!(sealed(), before.map(|count| count + 1));
    assert_eq!(said(&tls(IN_USER_SPACE, IN_USER_SPACE)), LaneEncryption::TlsInUserSpace);
    assert_eq!(sealed(), before.map(|count| count + 1));
}
