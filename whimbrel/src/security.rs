//! How a process protects the connections that it makes and takes.

use migration::transport::{LaneEncryption, LaneStats};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use transport_tcp::tls::{Files, FilesError, Pattern, Renewed};
use transport_tcp::{Connector, Error, Peer, Protection};
use utoipa::ToSchema;

/// Where certificates are: in a folder, by the names that `whimbrel pki` gives them, or one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Folder with `ca.pem`, `cert.pem`, `key.pem`, and perhaps `crl.pem`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub folder: Option<PathBuf>,
    /// Instead of the folder's `ca.pem`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub ca: Option<PathBuf>,
    /// Instead of its `cert.pem`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub cert: Option<PathBuf>,
    /// Instead of its `key.pem`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub key: Option<PathBuf>,
    /// Instead of its `crl.pem`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub crl: Option<PathBuf>,
    /// Whether the kernel encrypts what it can.
    #[serde(default)]
    pub ktls: Ktls,
}

/// Whether TLS in the kernel (kTLS) is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Ktls {
    /// Where the kernel has it.
    #[default]
    Auto,
    /// Nowhere.
    Off,
}

impl TlsFiles {
    /// Whether none is named.
    pub fn is_empty(&self) -> bool {
        TlsFiles { ktls: Ktls::default(), ..self.clone() } == TlsFiles::default()
    }

    /// Whether without a folder something is missing.
    pub fn is_whole(&self) -> bool {
        self.folder.is_some() || (self.ca.is_some() && self.cert.is_some() && self.key.is_some())
    }

    /// The folders that hold them. A file that is renewed is another one of the same name.
    pub fn folders(&self) -> Vec<PathBuf> {
        let files = [&self.ca, &self.cert, &self.key, &self.crl];
        let parents = files.into_iter().flatten().filter_map(|file| Some(file.parent()?.to_path_buf()));
        self.folder.iter().cloned().chain(parents).collect()
    }

    /// What reads them, and again when they have been renewed. Of peers these are admitted.
    pub(crate) fn renewed(&self, admitted: Vec<Pattern>) -> Result<Renewed, Error> {
        if !self.is_whole() {
            let why = "name a folder of certificates, or each of CA, certificate and key".into();
            return Err(FilesError::Setup { ca: self.files().ca, why }.into());
        }
        let files = self.clone();
        Ok(Renewed::by(move || files.files(), admitted))
    }

    /// The files as they are there now.
    fn files(&self) -> Files {
        let in_folder = Files::in_folder(self.folder.as_deref().unwrap_or("".as_ref()));
        let or = |named: &Option<PathBuf>, other| named.clone().unwrap_or(other);
        let crl = match &self.folder {
            Some(_) => self.crl.clone().or(in_folder.crl),
            None => self.crl.clone(),
        };
        Files {
            ca: or(&self.ca, in_folder.ca),
            certificate: or(&self.cert, in_folder.certificate),
            key: or(&self.key, in_folder.key),
            crl,
        }
    }
}

/// How a process protects its connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Security {
    /// Not at all, and therefore only within this host.
    #[default]
    Near,
    /// Not at all, with any host: the operator has said so.
    Insecure,
    /// By certificates.
    Tls(TlsFiles),
}

impl Security {
    /// By certificates, if there are any; `insecure` says that there need be none.
    pub fn new(files: Option<TlsFiles>, insecure: bool) -> Self {
        match files {
            Some(files) => Security::Tls(files),
            None if insecure => Security::Insecure,
            None => Security::Near,
        }
    }

    /// What makes connections. Certificates are read now.
    ///
    /// # Errors
    /// [`Error::Untrusted`] when the certificates are of no use.
    pub fn connector(&self, encryption: Encryption) -> Result<Connector, Error> {
        match self {
            Security::Near => Ok(Connector::near_only()),
            Security::Insecure => Ok(Connector::new(Protection::none())),
            Security::Tls(files) => {
                Ok(Connector::new(adapted(files.renewed(Vec::new())?.protection()?, files, encryption)))
            }
        }
    }

    /// What protects the connections that a receiver takes, of which these are admitted. It is asked for
    /// each, and reads certificates again if they have been renewed.
    ///
    /// # Errors
    /// [`Error::Untrusted`] when the certificates are of no use now.
    pub fn protecting(
        &self,
        admitted: Vec<Pattern>,
        encryption: Encryption,
    ) -> Result<impl Fn() -> Result<Protection, Error> + Send + Sync + use<>, Error> {
        let renewed = match self {
            Security::Tls(files) => Some((files.renewed(admitted)?, files.clone())),
            _ => None,
        };
        let protecting = move || match &renewed {
            Some((renewed, files)) => Ok(adapted(renewed.protection()?, files, encryption)),
            None => Ok(Protection::none()),
        };
        protecting()?;
        Ok(protecting)
    }

    /// Whether a receiver may listen on this address.
    pub fn may_listen(&self, address: SocketAddr) -> bool {
        *self != Security::Near || is_near(address.ip())
    }
}

/// Protection by files as it is wanted.
fn adapted(protection: Protection, files: &TlsFiles, encryption: Encryption) -> Protection {
    let protection = if files.ktls == Ktls::Off { protection.in_user_space() } else { protection };
    if encryption == Encryption::Off { protection.with_clear_lanes() } else { protection }
}

/// Whether an address is this host's own, which no network reaches.
pub fn is_near(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Whether bytes that are not encrypted may be accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    /// What can be encrypted is: with certificates all but memory that travels over RDMA.
    #[default]
    Preferred,
    /// Nothing travels that is not.
    Required,
    /// Memory need not be, if both sides say so; who is at the other end is shown by certificates all the
    /// same.
    Off,
}

/// Who is at the other end, and what of a migration is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Secured {
    /// What its certificate calls it.
    pub peer: String,
    /// How the control link is encrypted, and memory unless the report says of its lanes that they are not.
    pub cipher: String,
}

impl From<&Peer> for Secured {
    fn from(peer: &Peer) -> Self {
        Secured { peer: peer.name.clone(), cipher: peer.cipher.clone() }
    }
}

impl Secured {
    /// For people, of a migration through these lanes.
    pub fn told(&self, lanes: &[LaneStats]) -> String {
        let clear = lanes.iter().any(|lane| lane.encryption == LaneEncryption::None);
        let memory = if clear { ", but memory is not encrypted" } else { "" };
        format!("{} by its certificate; {}{memory}", self.peer, self.cipher)
    }
}
