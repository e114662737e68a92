//! The files of a host, and taking notice when they are renewed.

use super::credentials::Credentials;
use super::https::Https;
use super::names::Pattern;
use crate::{Error, Protection};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Where a host's certificates are: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Certificates of the authorities that vouch for peers.
    pub ca: PathBuf,
    /// This host's certificate, and those between it and its authority, if any.
    pub certificate: PathBuf,
    /// The key of this host's certificate.
    pub key: PathBuf,
    /// What the authorities have revoked. If there is a list, it has to be there for the authority of every
    /// peer.
    pub crl: Option<PathBuf>,
}

impl Files {
    /// `ca.pem`, `cert.pem` and `key.pem` in a folder, and `crl.pem` if it is there.
    pub fn in_folder(folder: &Path) -> Self {
        let crl = folder.join("crl.pem");
        Files {
            ca: folder.join("ca.pem"),
            certificate: folder.join("cert.pem"),
            key: folder.join("key.pem"),
            crl: crl.exists().then_some(crl),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Path> {
        [&self.ca, &self.certificate, &self.key].into_iter().chain(&self.crl).map(PathBuf::as_path)
    }
}

/// What to do about a file that cannot be read.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "; it has to be the user's of this process, which may have to be told of its folder when it starts"
        }
        _ => "",
    }
}

/// Why a host's files are of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// One cannot be read.
    #[error("cannot read {}: {source}{}", path.display(), hint(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// One does not have what it should.
    #[error("{}: {why}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Everybody on this host can read the key.
    #[error("{}: every user of this host can read this key; chmod 600 it, or make another", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// The key is another one's.
    #[error("{} is not the key of {}", key.display(), certificate.display())]
    Mismatch {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
    },
    /// TLS cannot work with them.
    #[error("TLS cannot be set up with {}: {why}", ca.display())]
    Setup {
        /// The authorities.
        ca: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl From<FilesError> for Error {
    fn from(error: FilesError) -> Self {
        Error::Untrusted(error.to_string())
    }
}

/// What tells whether a file is still the same.
type Stamp = (u64, u64, i64, i64, u64);

fn stamp(metadata: &Metadata) -> Stamp {
    (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.size())
}

/// A host's files as they are now. They are read again when one of them has changed.
pub struct Renewed {
    files: Box<dyn Fn() -> Files + Send + Sync>,
    admitted: Vec<Pattern>,
    read: Mutex<Option<(Vec<Stamp>, Arc<Credentials>)>>,
}

impl Renewed {
    /// These files. Of the peers that the authorities vouch for, those are admitted that one of the patterns
    /// stands for; without patterns all are.
    pub fn new(files: Files, admitted: Vec<Pattern>) -> Self {
        Renewed::by(move || files.clone(), admitted)
    }

    /// The same with files of which some may come and go, such as a list of what is revoked.
    pub fn by(files: impl Fn() -> Files + Send + Sync + 'static, admitted: Vec<Pattern>) -> Self {
        Renewed { files: Box::new(files), admitted, read: Mutex::new(None) }
    }

    /// Protection by these files.
    ///
    /// # Errors
    /// [`Error::Untrusted`], which says what is wrong with them.
    pub fn protection(&self) -> Result<Protection, Error> {
        Ok(Protection::by(self.credentials()?))
    }

    /// What connections of HTTP are protected with by these files. Peers are not compared with the patterns.
    ///
    /// # Errors
    /// [`Error::Untrusted`], which says what is wrong with them.
    pub fn https(&self) -> Result<Https, Error> {
        Ok(self.credentials()?.https.clone())
    }

    fn credentials(&self) -> Result<Arc<Credentials>, Error> {
        let files = (self.files)();
        let stamp_of = |path: &Path| {
            let read = std::fs::metadata(path);
            read.map(|m| stamp(&m)).map_err(|source| FilesError::Read { path: path.into(), source })
        };
        // Before they are read: a change meanwhile is noticed the next time.
        let stamps = files.all().map(stamp_of).collect::<Result<Vec<_>, _>>()?;
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, credentials)) = &*read
            && *known == stamps
        {
            return Ok(Arc::clone(credentials));
        }
        let credentials = Arc::new(Credentials::read(&files, &self.admitted)?);
        *read = Some((stamps, Arc::clone(&credentials)));
        Ok(credentials)
    }
}
