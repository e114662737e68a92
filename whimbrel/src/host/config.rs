//! What the operator of a host has decided, from a file.
//!
//! ```toml
//! listen = "10.1.0.2:4444"
//! tls = "/etc/whimbrel/tls"
//! allow = ["*.hosts.example"]
//!
//! [admission]
//! max-memory = "64G"      # of one guest
//! total-memory = "200G"   # of all of them
//! max-guests = 100
//! max-arrivals = 4        # at once
//! names = ["web*"]
//!
//! [networks.blue]
//! bridge = "br0"
//!
//! [storage.fast]
//! path = "/shared/fast"
//! ```

use crate::security::{Encryption, TlsFiles};
use crate::toml_file::{Error, TomlFile};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use transport_tcp::tls::Pattern;
use vmm::limits::NamePattern;
use vmm::names;

/// Where guests are taken in unless the file says otherwise.
pub const PORT: u16 = 4444;

/// A destination with its port: the usual one, unless `to` names one.
pub fn with_port(to: &str) -> String {
    let bare = to.parse::<Ipv6Addr>().is_ok();
    let host = if bare { format!("[{to}]") } else { to.to_string() };
    let has_port =
        !bare && to.rsplit_once(':').is_some_and(|(host, _)| !host.starts_with('[') || host.ends_with(']'));
    if has_port { host } else { format!("{host}:{PORT}") }
}

/// A host's configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct HostConfig {
    /// The file, for processes that read it themselves.
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Where guests are taken in; the loopback address if nothing is said.
    pub listen: Option<SocketAddr>,
    /// The folder of the certificates by which hosts know each other.
    pub tls: Option<PathBuf>,
    /// Whether guests are taken in without certificates, also from other hosts.
    pub insecure: bool,
    /// Which peers may send guests; all that have a certificate if there is no pattern.
    #[serde(deserialize_with = "texts")]
    pub allow: Vec<Pattern>,
    /// What has to be encrypted.
    pub encryption: Encryption,
    /// Which guests are taken in.
    pub admission: Admission,
    /// Bits of guests' memory that all migrations from this host together send in a second at most.
    #[serde(deserialize_with = "bits")]
    pub bandwidth: Option<u64>,
    /// The networks that guests' interfaces name.
    #[serde(deserialize_with = "named")]
    pub networks: BTreeMap<String, Network>,
    /// The storages that guests' disks name.
    #[serde(deserialize_with = "named")]
    pub storage: BTreeMap<String, Storage>,
    /// Where `GET /metrics` is answered to whoever asks; nowhere but on the service's own socket if nothing
    /// is said. An address of the loopback interface, unless this host is `insecure`.
    pub metrics: Option<SocketAddr>,
    /// Where the page of this host is served, to be looked at and no more; nowhere but on the service's own
    /// socket if nothing is said. An address of the loopback interface.
    pub page: Option<SocketAddr>,
    /// Where this host's API is served to whoever shows a certificate; nowhere but on the service's own
    /// socket if nothing is said.
    pub api: Option<Api>,
    /// The folder of the machines that `whimbrel start` knows.
    pub machines: Option<PathBuf>,
    /// The folder of what outlives a reboot of the host: its history.
    pub state: Option<PathBuf>,
}

/// A host's API over mutual TLS, by the host's certificates.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Api {
    /// Where.
    pub listen: SocketAddr,
    /// Who may look; all that have a certificate if there is no pattern.
    #[serde(default, deserialize_with = "texts")]
    pub allow: Vec<Pattern>,
    /// Who may change something as well; nobody if there is no pattern.
    #[serde(default, deserialize_with = "texts")]
    pub operators: Vec<Pattern>,
}

/// Which guests are taken in.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Admission {
    /// Bytes of memory of one guest at most.
    #[serde(deserialize_with = "size")]
    pub max_memory: Option<u64>,
    /// Bytes of memory of all guests together at most.
    #[serde(deserialize_with = "size")]
    pub total_memory: Option<u64>,
    /// vCPUs of one guest at most.
    pub max_vcpus: Option<u32>,
    /// How many guests the host has at most.
    pub max_guests: Option<usize>,
    /// How many are taken in at once at most.
    pub max_arrivals: Option<usize>,
    /// What they may be called; anything if there is no pattern.
    #[serde(deserialize_with = "texts")]
    pub names: Vec<NamePattern>,
}

/// What a network is on this host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Network {
    /// The bridge to which the taps of its interfaces belong.
    pub bridge: String,
}

/// What a storage is on this host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Storage {
    /// The folder of its images.
    pub path: PathBuf,
}

impl HostConfig {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let read = TomlFile::read(path, "the host's configuration")?;
        let config: HostConfig = toml::from_str(&read.text).map_err(|error| read.wrong(&error))?;
        let file = std::path::absolute(path).unwrap_or_else(|_| path.into());
        Ok(HostConfig { file: Some(file), ..config })
    }

    /// The certificates, if there are any.
    pub fn certificates(&self) -> Option<TlsFiles> {
        self.tls.clone().map(|folder| TlsFiles { folder: Some(folder), ..TlsFiles::default() })
    }
}

/// Values that are written as text.
fn texts<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
    D: Deserializer<'de>,
{
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
}

/// Values by names that guests can name.
fn named<'de, T, D>(deserializer: D) -> Result<BTreeMap<String, T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    let all = BTreeMap::<String, T>::deserialize(deserializer)?;
    all.keys().try_for_each(|name| names::check(name)).map_err(serde::de::Error::custom)?;
    Ok(all)
}

/// A number of bytes, or a text such as `64G`.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    amount(deserializer, parse_size::Config::new().with_binary(), "a size such as 512M or 4G")
}

/// A number of bits a second, or a text such as `10G`.
fn bits<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let bits = amount(deserializer, parse_size::Config::new().with_decimal(), "bits a second such as 10G")?;
    match bits {
        Some(0) => Err(serde::de::Error::custom("nothing would ever leave; leave the line out for no cap")),
        bits => Ok(bits),
    }
}

fn amount<'de, D: Deserializer<'de>>(
    deserializer: D,
    config: parse_size::Config,
    example: &str,
) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => Ok(Some(bytes)),
        Size::Text(text) => {
            let size = config.parse_size(&text).map_err(|error| {
                serde::de::Error::custom(format_args!("{text:?}: {error}; write {example}"))
            })?;
            Ok(Some(size))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &str) -> Result<HostConfig, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.toml");
        std::fs::write(&path, content).unwrap();
        HostConfig::read(&path)
    }

    #[test]
    fn a_file_says_what_a_host_is() {
        let config = read(
            "listen = '10.1.0.2:4444'\ntls = '/etc/whimbrel/tls'\nallow = ['*.hosts.example']\nencryption = 'required'\n\
             [admission]\nmax-memory = '4G'\nmax-arrivals = 2\nnames = ['web*']\n\
             [networks.blue]\nbridge = 'br0'\n[storage.fast]\npath = '/shared/fast'\n",
        )
        .unwrap();
        assert_eq!(config.listen, Some("10.1.0.2:4444".parse().unwrap()));
        assert_eq!(config.admission.max_memory, Some(4 << 30));
        assert_eq!((config.admission.max_arrivals, config.admission.max_guests), (Some(2), None));
        assert_eq!((config.allow.len(), config.admission.names.len()), (1, 1));
        assert_eq!(config.networks["blue"].bridge, "br0");
        assert_eq!(config.storage["fast"].path, Path::new("/shared/fast"));
        assert_eq!(config.encryption, Encryption::Required);
        assert!(config.certificates().is_some());
        assert!(read("").unwrap().certificates().is_none());
    }

    #[test]
    fn a_destination_has_a_port() {
        for (to, expected) in [
            ("hostb", "hostb:4444"),
            ("hostb:7", "hostb:7"),
            ("10.1.0.2", "10.1.0.2:4444"),
            ("10.1.0.2:7", "10.1.0.2:7"),
            ("fe80::1", "[fe80::1]:4444"),
            ("[fe80::1]", "[fe80::1]:4444"),
            ("[fe80::1]:7", "[fe80::1]:7"),
        ] {
            assert_eq!(with_port(to), expected);
        }
    }

    #[test]
    fn what_is_wrong_is_told_by_file_and_line() {
        for (content, expected) in [
            ("insecure = false\ncolour = 1\n", "host.toml:2: unknown field `colour`"),
            ("\nlisten = 'here'\n", "host.toml:2: "),
            ("[admission]\nmax-memory = 'much'\n", "host.toml:2: \"much\": "),
            ("[networks.blue]\nswitch = 'br0'\n", "host.toml:2: unknown field `switch`"),
            ("allow = ['a*b*']\n", "host.toml:1: "),
            ("[api]\nallow = []\n", "missing field `listen`"),
            ("[api]\nlisten = '127.0.0.1:1'\noperators = ['a b']\n", "host.toml:3: "),
            ("[networks.'a b']\nbridge = 'br0'\n", "\"a b\" is not a name of a network"),
        ] {
            let told = read(content).unwrap_err().to_string();
            assert!(told.contains(expected), "{content:?}: {told}");
        }
        let missing = HostConfig::read(Path::new("/nonexistent/host.toml")).unwrap_err().to_string();
        assert!(missing.contains("/nonexistent/host.toml"), "{missing}");
    }
}
