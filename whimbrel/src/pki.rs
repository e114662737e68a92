//! The certificates of a small fleet: an authority (CA) of its own, and what it has issued and revoked.
//!
//! ```text
//! ca.pem  ca.key  crl.pem  issued  revoked
//! hosts/NAME/     ca.pem  cert.pem  key.pem  crl.pem: what that host needs, and nothing else
//! ```
//! `issued` and `revoked` have a line for each certificate: its serial number, the host's name and, of those
//! that are revoked, since when. Keys can be read by their owner only.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// How long an authority's own certificate is good, and its list of what it has revoked.
const AUTHORITY_DAYS: u32 = 3650;

/// How long before it is made a certificate is good already: clocks differ.
const LEEWAY: Duration = Duration::from_secs(3600);

/// Why a certificate could not be made or revoked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is an authority already, whose certificates would be of no use any more.
    #[error("{} has an authority already; use another folder, or `whimbrel pki host` for a further host", folder.display())]
    Exists {
        /// Its folder.
        folder: PathBuf,
    },
    /// A name that is none.
    #[error("{name:?} cannot be the name of a host: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// No such host.
    #[error("{} has issued nothing for {name}", folder.display())]
    Unknown {
        /// Its folder.
        folder: PathBuf,
        /// The name.
        name: String,
    },
    /// A certificate could not be made.
    #[error("cannot make a certificate with {}: {source}", folder.display())]
    Make {
        /// The authority's folder.
        folder: PathBuf,
        /// What is wrong.
        source: rcgen::Error,
    },
}

/// An authority and its folder.
pub struct Authority {
    folder: PathBuf,
}

/// The time from an hour ago for so many days.
pub fn days_from_now(days: u32) -> Range<SystemTime> {
    let now = SystemTime::now();
    now - LEEWAY..now + DAY * days
}

impl Authority {
    /// Makes an authority in a folder, which is made as well.
    ///
    /// # Errors
    /// [`Error::Exists`] when it has one already.
    pub fn create(folder: &Path) -> Result<Self, Error> {
        let authority = Authority { folder: folder.into() };
        make_folder(folder)?;
        if authority.path("ca.key").exists() {
            return Err(Error::Exists { folder: folder.into() });
        }
        let made = |source| Error::Make { folder: folder.into(), source };
        let key = KeyPair::generate().map_err(made)?;
        let mut params = CertificateParams::default();
        // Two authorities that go by one name could not be told apart.
        let name = format!("Whimbrel CA {:016x}", fresh_number());
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let valid = days_from_now(AUTHORITY_DAYS);
        (params.not_before, params.not_after) = (valid.start.into(), valid.end.into());
        let certificate = params.self_signed(&key).map_err(made)?;
        write(&authority.path("ca.pem"), certificate.pem().as_bytes(), 0o644)?;
        write(&authority.path("ca.key"), key.serialize_pem().as_bytes(), 0o600)?;
        authority.write_revoked()?;
        Ok(authority)
    }

    /// The authority in a folder.
    pub fn open(folder: &Path) -> Self {
        Authority { folder: folder.into() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder of a host.
    pub fn host(&self, name: &str) -> PathBuf {
        self.folder.join("hosts").join(name)
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, Error> {
        let made = |source| Error::Make { folder: self.folder.clone(), source };
        let key = KeyPair::from_pem(&read(&self.path("ca.key"))?).map_err(made)?;
        Issuer::from_ca_cert_pem(&read(&self.path("ca.pem"))?, key).map_err(made)
    }

    /// Makes a new key and a certificate for `name` and the other names and addresses by which the host is
    /// reached; renews what there was. Returns the folder that the host needs.
    ///
    /// # Errors
    /// [`Error`].
    pub fn issue(&self, name: &str, others: &[String], valid: Range<SystemTime>) -> Result<PathBuf, Error> {
        let wrong = |why: &str| Error::Name { name: name.into(), why: why.into() };
        if name.is_empty() || name.starts_with('.') || name.contains(['/', ' ', '*']) {
            return Err(wrong("write it as it stands in `--to`, such as a.hosts.example"));
        }
        if name.parse::<std::net::IpAddr>().is_ok() {
            return Err(wrong("a host has a name; its addresses come behind it"));
        }
        let made = |source| Error::Make { folder: self.folder.clone(), source };
        let issuer = self.issuer()?;
        let names: Vec<String> = std::iter::once(name.to_owned()).chain(others.iter().cloned()).collect();
        let mut params = CertificateParams::new(names).map_err(made)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (valid.start.into(), valid.end.into());
        let serial = fresh_number();
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().map_err(made)?;
        let certificate = params.signed_by(&key, &issuer).map_err(made)?;
        append(&self.path("issued"), &format!("{serial:016x} {name}\n"))?;
        let host = self.host(name);
        make_folder(&host)?;
        write(&host.join("key.pem"), key.serialize_pem().as_bytes(), 0o600)?;
        write(&host.join("cert.pem"), certificate.pem().as_bytes(), 0o644)?;
        write(&host.join("ca.pem"), read(&self.path("ca.pem"))?.as_bytes(), 0o644)?;
        write(&host.join("crl.pem"), read(&self.path("crl.pem"))?.as_bytes(), 0o644)?;
        Ok(host)
    }

    /// Revokes all certificates that a host has. The new list is put into the folders of all hosts.
    ///
    /// # Errors
    /// [`Error::Unknown`] when there are none.
    pub fn revoke(&self, name: &str) -> Result<(), Error> {
        let known = read_if_any(&self.path("revoked"))?;
        let is_revoked = |serial: &str| known.lines().any(|line| line.starts_with(serial));
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let issued = read_if_any(&self.path("issued"))?;
        let of_host = issued.lines().filter_map(|line| line.split_once(' ')).filter(|(_, of)| *of == name);
        let mut lines = String::new();
        let mut any = false;
        for (serial, _) in of_host {
            any = true;
            if !is_revoked(serial) {
                lines += &format!("{serial} {name} {since}\n");
            }
        }
        if !any {
            return Err(Error::Unknown { folder: self.folder.clone(), name: name.into() });
        }
        append(&self.path("revoked"), &lines)?;
        self.write_revoked()
    }

    /// Writes the list of what is revoked, for all hosts.
    fn write_revoked(&self) -> Result<(), Error> {
        let mut revoked_certs = Vec::new();
        for line in read_if_any(&self.path("revoked"))?.lines() {
            let mut words = line.split(' ');
            let serial = words.next().and_then(|serial| u64::from_str_radix(serial, 16).ok());
            let since = words.nth(1).and_then(|since| since.parse().ok());
            let (Some(serial), Some(since)) = (serial, since) else {
                let source = io::Error::new(io::ErrorKind::InvalidData, format!("{line:?} is no such line"));
                return Err(Error::File { path: self.path("revoked"), source });
            };
            revoked_certs.push(RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: (UNIX_EPOCH + Duration::from_secs(since)).into(),
                reason_code: None,
                invalidity_date: None,
            });
        }
        let valid = days_from_now(AUTHORITY_DAYS);
        let number = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
        let list = CertificateRevocationListParams {
            this_update: valid.start.into(),
            next_update: valid.end.into(),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let made = |source| Error::Make { folder: self.folder.clone(), source };
        let list = list.signed_by(&self.issuer()?).and_then(|list| list.pem()).map_err(made)?;
        write(&self.path("crl.pem"), list.as_bytes(), 0o644)?;
        let hosts = self.path("hosts");
        let Ok(folders) = fs::read_dir(&hosts) else { return Ok(()) };
        for folder in folders {
            let folder = folder.map_err(|source| Error::File { path: hosts.clone(), source })?;
            write(&folder.path().join("crl.pem"), list.as_bytes(), 0o644)?;
        }
        Ok(())
    }
}

/// A number that no other certificate has: 63 random bits.
fn fresh_number() -> u64 {
    // The standard library seeds its hashes from the kernel's random numbers, once for each.
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(SystemTime::now()) >> 1 | 1
}

fn make_folder(folder: &Path) -> Result<(), Error> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|source| Error::File { path: folder.into(), source })
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::File { path: path.into(), source })
}

fn read_if_any(path: &Path) -> Result<String, Error> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        result => result.map_err(|source| Error::File { path: path.into(), source }),
    }
}

/// Puts a file in its place whole: whoever reads it has the old one or the new one.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    let failed = |source| Error::File { path: path.into(), source };
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh);
    file.and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all())).map_err(failed)?;
    fs::rename(&fresh, path).map_err(failed)
}

fn append(path: &Path, text: &str) -> Result<(), Error> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| Error::File { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_has_one_authority_and_keys_are_its_owner_s() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path()).unwrap();
        assert!(matches!(Authority::create(folder.path()), Err(Error::Exists { .. })));
        let host = authority.issue("a.example", &["10.0.0.1".into()], days_from_now(1)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&host.join("key.pem")), mode(&folder.path().join("ca.key"))), (0o600, 0o600));
        let first = fs::read(host.join("cert.pem")).unwrap();
        authority.issue("a.example", &[], days_from_now(1)).unwrap();
        assert_ne!(fs::read(host.join("cert.pem")).unwrap(), first, "renewed");
        for wrong in ["", "../x", "a b", "10.0.0.1", "*.example", ".x"] {
            assert!(
                matches!(authority.issue(wrong, &[], days_from_now(1)), Err(Error::Name { .. })),
                "{wrong}"
            );
        }
    }

    #[test]
    fn what_is_revoked_reaches_all_hosts() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path()).unwrap();
        for name in ["a.example", "b.example"] {
            authority.issue(name, &[], days_from_now(1)).unwrap();
        }
        let list = |name: &str| fs::read(authority.host(name).join("crl.pem")).unwrap();
        let before = list("b.example");
        assert!(matches!(authority.revoke("c.example"), Err(Error::Unknown { .. })));
        authority.revoke("a.example").unwrap();
        assert!(list("b.example") != before && list("a.example") == list("b.example"));
        let lines = || read(&folder.path().join("revoked")).unwrap().lines().count();
        authority.issue("a.example", &[], days_from_now(1)).unwrap();
        authority.revoke("a.example").unwrap();
        assert_eq!(lines(), 2, "each certificate once");
    }
}
