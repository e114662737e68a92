//! Certificates for peers that encrypt: one folder with the files that QEMU and Cloud Hypervisor both look
//! for, good for both sides of a migration over loopback.

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Makes an authority and a host's certificate, which both sides show.
///
/// # Errors
/// When they cannot be made or written.
pub fn make(folder: &Path) -> anyhow::Result<()> {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key = KeyPair::generate()?;
    let ca = authority.self_signed(&authority_key)?;
    let mut host = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])?;
    // QEMU asks for the second as well.
    host.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    host.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let certificate = host.signed_by(&key, &Issuer::new(authority, authority_key))?;
    fs::write(folder.join("ca-cert.pem"), ca.pem()).context("cannot write certificates")?;
    for side in ["server", "client"] {
        fs::write(folder.join(format!("{side}-cert.pem")), certificate.pem())?;
        let path = folder.join(format!("{side}-key.pem"));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(key.serialize_pem().as_bytes())?;
    }
    Ok(())
}
