//! How connections are protected.

use super::super::choice::{KTLS, one_of};
use clap::Args;
use std::path::PathBuf;
use whimbrel::security::{Ktls, Security, TlsFiles};

/// Certificates.
#[derive(Args, Clone, Debug, Default)]
#[group(id = "certificates", multiple = true)]
pub struct TlsArgs {
    /// Folder with the certificate to show: ca.pem, cert.pem, key.pem and perhaps crl.pem, as `whimbrel pki`
    /// makes them. They are read again for every migration
    #[arg(long, value_name = "FOLDER")]
    pub tls: Option<PathBuf>,
    /// Certificates of the CAs that vouch for other hosts, in PEM format
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// This host's certificate, and those between it and its CA
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The key of this host's certificate
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// What the CAs have revoked
    #[arg(long, value_name = "FILE")]
    pub tls_crl: Option<PathBuf>,
}

impl TlsArgs {
    /// The files that are named.
    pub fn files(&self, ktls: Ktls) -> Option<TlsFiles> {
        // Another process may read them, from another folder.
        let path =
            |path: &Option<PathBuf>| path.as_ref().map(|p| std::path::absolute(p).unwrap_or(p.clone()));
        let files = TlsFiles {
            folder: path(&self.tls),
            ca: path(&self.tls_ca),
            cert: path(&self.tls_cert),
            key: path(&self.tls_key),
            crl: path(&self.tls_crl),
            ktls,
        };
        (!files.is_empty()).then_some(files)
    }
}

/// Where to encrypt.
#[derive(Args, Clone, Debug, Default)]
pub struct KtlsArgs {
    /// Whether the kernel encrypts memory that travels by TLS
    #[arg(long, default_value = "auto", requires = "certificates", value_parser = one_of(KTLS))]
    pub ktls: Ktls,
}

/// How connections are protected.
#[derive(Args, Clone, Debug, Default)]
pub struct SecurityArgs {
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub ktls: KtlsArgs,
    /// Migrate without certificates to and from other hosts: whoever is on the network can read and change
    /// the guest, and send one
    #[arg(long, conflicts_with = "certificates")]
    pub insecure: bool,
}

impl SecurityArgs {
    /// The files that are named.
    pub fn files(&self) -> Option<TlsFiles> {
        self.tls.files(self.ktls.ktls)
    }

    /// What a process does that is told no more.
    pub fn security(&self) -> Security {
        Security::new(self.files(), self.insecure)
    }
}
