//! What a host's files are made into: how it protects a connection as either end.

use super::files::{Files, FilesError};
use super::https::Https;
use super::names::Pattern;
use super::{accepted, explain, names, stream};
use crate::channel::{At, Peer, Protect, Protected, SharedSocket};
use crate::stream::unanswered;
use crate::{Error, Untrusted};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, InconsistentKeys, RootCertStore, ServerConfig,
    SupportedCipherSuite,
};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// What is spoken through TLS, so that a certificate of this host that serves another purpose as well is not
/// made use of by a connection that was meant for that.
const PROTOCOL: &[u8] = b"whimbrel";

/// The shortest keys first: they cost the least, and nobody breaks them either.
const SUITES: [SupportedCipherSuite; 3] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// A host's certificate, and whom it trusts.
pub(super) struct Credentials {
    pub(super) client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    pub(super) https: Https,
    admitted: Vec<Pattern>,
}

impl Credentials {
    pub(super) fn read(files: &Files, admitted: &[Pattern]) -> Result<Self, FilesError> {
        let provider =
            Arc::new(CryptoProvider { cipher_suites: SUITES.to_vec(), ..ring::default_provider() });
        let setup =
            |why: &dyn std::fmt::Display| FilesError::Setup { ca: files.ca.clone(), why: why.to_string() };
        let mut roots = RootCertStore::empty();
        for authority in list::<CertificateDer<'_>>(&files.ca, "certificate")? {
            let added = roots.add(authority);
            added.map_err(|why| FilesError::Content { path: files.ca.clone(), why: why.to_string() })?;
        }
        let roots = Arc::new(roots);
        let lists = match &files.crl {
            Some(path) => list::<CertificateRevocationListDer<'_>>(path, "list of revoked certificates")?,
            None => Vec::new(),
        };
        let chain = list::<CertificateDer<'_>>(&files.certificate, "certificate")?;
        let key = key(&files.key)?;
        let unfit = |error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                FilesError::Mismatch { key: files.key.clone(), certificate: files.certificate.clone() }
            }
            other => FilesError::Content { path: files.certificate.clone(), why: other.to_string() },
        };

        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .with_crls(lists.clone())
            .only_check_end_entity_revocation()
            .build()
            .map_err(|why| setup(&why))?;
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|why| setup(&why))?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unfit)?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![PROTOCOL.into()];
        // For the kernel alone.
        client.enable_secret_extraction = true;

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .with_crls(lists)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|why| setup(&why))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|why| setup(&why))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(unfit)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![PROTOCOL.into()];
        server.enable_secret_extraction = true;
        let https = Https::like(&client, &server);
        let (client, server) = (Arc::new(client), Arc::new(server));
        Ok(Credentials { client, server, https, admitted: admitted.to_vec() })
    }
}

/// All of a kind in a file, of which there has to be one at least.
fn list<T: PemObject>(path: &Path, what: &str) -> Result<Vec<T>, FilesError> {
    let failed = |error| failed(path, what, error);
    let all = T::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if all.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(all) }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, FilesError> {
    let unread = |source| FilesError::Read { path: path.into(), source };
    if std::fs::metadata(path).map_err(unread)?.permissions().mode() & 0o007 != 0 {
        return Err(FilesError::Exposed { path: path.into() });
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| failed(path, "key", error))
}

fn failed(path: &Path, what: &str, error: pem::Error) -> FilesError {
    match error {
        pem::Error::Io(source) => FilesError::Read { path: path.into(), source },
        pem::Error::NoItemsFound => {
            FilesError::Content { path: path.into(), why: format!("there is no {what} in it, in PEM format") }
        }
        other => FilesError::Content { path: path.into(), why: other.to_string() },
    }
}

impl Protect for Credentials {
    fn connect(
        &self,
        socket: SharedSocket,
        to: &str,
        host: &str,
        place: At,
        deadline: Instant,
    ) -> Result<Box<dyn Protected>, Error> {
        let untrusted = |what: String| Error::Untrusted(format!("{to} {what}"));
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::Untrusted(format!("no certificate can be for {host:?}")))?;
        let begun = Instant::now();
        let connection = ClientConnection::new(Arc::clone(&self.client), name);
        let connection = connection.map_err(|error| untrusted(explain::fault(&error)))?;
        let opened = stream::open(connection, socket, place, deadline, peer_of);
        opened.map_err(|error| unanswered(to, error, deadline.saturating_duration_since(begun)))
    }

    fn accept(
        &self,
        socket: SharedSocket,
        place: At,
        deadline: Instant,
    ) -> Result<Box<dyn Protected>, Error> {
        let untrusted = |error: io::Error| match error.get_ref().and_then(|e| e.downcast_ref()) {
            Some(Untrusted(what)) => Error::Untrusted(format!("it {what}")),
            None => Error::NoPreamble(error),
        };
        let connection = UnbufferedServerConnection::new(Arc::clone(&self.server));
        let connection = connection.map_err(|error| Error::Untrusted(error.to_string()))?;
        accepted::open(connection, socket, place, deadline, peer_of).map_err(untrusted)
    }

    fn admits(&self, peer: &Peer) -> bool {
        self.admitted.is_empty() || self.admitted.iter().any(|pattern| pattern.admits(&peer.certificate))
    }
}

/// Who is at the other end of a connection whose handshake is over.
fn peer_of(
    certificates: Option<&[CertificateDer<'static>]>,
    suite: Option<SupportedCipherSuite>,
) -> Option<Peer> {
    let certificate = certificates?.first()?.to_vec();
    let cipher = match suite?.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => "AES-128-GCM",
        CipherSuite::TLS13_AES_256_GCM_SHA384 => "AES-256-GCM",
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "ChaCha20-Poly1305",
        _ => "another cipher",
    };
    Some(Peer { name: names::name_of(&certificate), certificate, cipher: format!("TLS 1.3, {cipher}") })
}
