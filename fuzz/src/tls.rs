//! A host's files for TLS, always the same.

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use tempfile::TempDir;

/// Their names and contents.
pub const FILES: [(&str, &[u8]); 4] = [
    ("ca.pem", include_bytes!("../tls/ca.pem")),
    ("cert.pem", include_bytes!("../tls/cert.pem")),
    ("key.pem", include_bytes!("../tls/key.pem")),
    ("crl.pem", include_bytes!("../tls/crl.pem")),
];

/// Writes one of them; only its owner may read it.
pub fn put(folder: &Path, name: &str, content: &[u8]) {
    let path = folder.join(name);
    fs::write(&path, content).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a mode");
}

/// A folder with all of them.
pub fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    FILES.iter().for_each(|(name, content)| put(folder.path(), name, content));
    folder
}

/// The calling end of TLS, which has the host's own certificate.
pub fn caller() -> ClientConnection {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let certificates = |pem| CertificateDer::pem_slice_iter(pem).map(|one| one.expect("a certificate"));
        let mut roots = RootCertStore::empty();
        certificates(FILES[0].1).for_each(|authority| roots.add(authority).expect("an authority"));
        let key = PrivateKeyDer::from_pem_slice(FILES[2].1).expect("a key");
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_client_auth_cert(certificates(FILES[1].1).collect(), key)
            .expect("a certificate that fits the key");
        config.alpn_protocols = vec![b"whimbrel".into()];
        Arc::new(config)
    });
    ClientConnection::new(config.clone(), "fuzz.example".try_into().expect("a name")).expect("a caller")
}
