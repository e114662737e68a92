//! A host's files for TLS, always the same.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
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
