//! Whom a certificate is for.

use rustls::pki_types::{CertificateDer, ServerName};
use std::fmt;
use std::str::FromStr;
use webpki::EndEntityCert;

/// A peer that is admitted: a name or an address that its certificate is for, or `*.` and the end of a name,
/// which stands for any name with one more label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

/// Why a text is no [`Pattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no peer: write a name such as a.hosts.example, an address, or *.hosts.example")]
pub struct PatternError(String);

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let name = text.strip_prefix("*.").unwrap_or(text);
        match ServerName::try_from(name) {
            Ok(ServerName::IpAddress(_)) if name != text => Err(PatternError(text.into())),
            Ok(_) => Ok(Pattern(text.to_ascii_lowercase())),
            Err(_) => Err(PatternError(text.into())),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Pattern {
    /// Whether it stands for the holder of this certificate, which has been verified.
    #[must_use]
    pub fn admits(&self, certificate: &[u8]) -> bool {
        let der = CertificateDer::from(certificate);
        let Ok(certificate) = EndEntityCert::try_from(&der) else { return false };
        match self.0.strip_prefix('*') {
            None => ServerName::try_from(self.0.as_str())
                .is_ok_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_ok()),
            Some(end) => certificate.valid_dns_names().any(|name| {
                let name = name.to_ascii_lowercase();
                name.strip_suffix(end).is_some_and(|label| !label.is_empty() && !label.contains(['.', '*']))
            }),
        }
    }
}

/// What the holder of a certificate is called in logs and reports: the first name that it is for.
#[must_use]
pub fn name_of(certificate: &[u8]) -> String {
    let der = CertificateDer::from(certificate);
    let parsed = EndEntityCert::try_from(&der);
    let name = parsed.ok().and_then(|certificate| certificate.valid_dns_names().next().map(String::from));
    name.unwrap_or_else(|| "a host without a name".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    fn certificate(names: &[&str]) -> Vec<u8> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let key = KeyPair::generate().unwrap();
        CertificateParams::new(names).unwrap().self_signed(&key).unwrap().der().to_vec()
    }

    fn admits(pattern: &str, certificate: &[u8]) -> bool {
        pattern.parse::<Pattern>().unwrap().admits(certificate)
    }

    #[test]
    fn patterns_stand_for_names_and_addresses() {
        let host = certificate(&["a.hosts.example", "alias", "10.0.0.7"]);
        for pattern in ["a.hosts.example", "A.Hosts.Example", "alias", "10.0.0.7", "*.hosts.example"] {
            assert!(admits(pattern, &host), "{pattern}");
        }
        for pattern in ["b.hosts.example", "hosts.example", "*.example", "10.0.0.8", "*.a.hosts.example"] {
            assert!(!admits(pattern, &host), "{pattern}");
        }
        assert!(!admits("*.hosts.example", &certificate(&["x.y.hosts.example", "hosts.example"])));
        // A certificate for any name of a domain is not one for a host of it.
        assert!(!admits("*.hosts.example", &certificate(&["*.hosts.example"])));
        assert_eq!(
            (name_of(&host), name_of(&certificate(&["10.0.0.7"]))),
            ("a.hosts.example".into(), "a host without a name".into())
        );
        for wrong in ["", "*", "*.", "a b", "*.10.0.0.1", "a.*.example", "*a.example"] {
            assert!(wrong.parse::<Pattern>().is_err(), "{wrong}");
        }
    }
}
