//! Lanes through TLS keep the contract of a data plane as well.

#![cfg(feature = "tls")]

use migration::conformance::Fixture;
use migration::transport::{DestinationTransport, SourceTransport};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use whimbrel_transport_tcp::tls::{Files, Renewed};
use whimbrel_transport_tcp::{Connector, Listener, TcpDestination};

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

fn tls() -> impl Fixture {
    let folder = tempfile::tempdir().unwrap();
    make_files(folder.path());
    let files = Files::in_folder(folder.path());
    // Both ends have read them when the folder goes.
    let protection = Renewed::new(files, Vec::new()).protection().unwrap();
    let connector = Connector::new(protection.clone());
    let protecting = move || Ok(protection.clone());
    let listener = Listener::bind_protected(1, (Ipv4Addr::LOCALHOST, 0).into(), protecting).unwrap();
    Tls { listener, connector }
}

migration::conformance_suite!(tls());
