//! What is wrong with a peer, or what a peer finds wrong with this side, in words that say what to do.

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error};

/// What is wrong with a peer that could not be trusted: the end of a sentence that begins with its name.
#[must_use]
pub fn fault(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(why) => format!("has a certificate that {}", certificate(why)),
        Error::AlertReceived(alert) => complaint(*alert),
        Error::NoCertificatesPresented => "has shown no certificate".into(),
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => {
            "does not speak TLS as it should".into()
        }
        Error::DecryptError => "has sent something that was changed on the way".into(),
        Error::NoApplicationProtocol => "speaks another protocol through TLS".into(),
        Error::PeerIncompatible(why) => format!("speaks TLS in another way ({why:?}); TLS 1.3 is needed"),
        other => format!("could not be trusted: {other}"),
    }
}

/// What is wrong with a peer's certificate, after "a certificate that".
fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::ExpiredContext { time, not_after } => {
            format!(
                "expired {} ago: renew it, or see whether both hosts' clocks are right",
                between(*not_after, *time)
            )
        }
        CertificateError::Expired => "has expired: renew it".into(),
        CertificateError::NotValidYetContext { time, not_before } => {
            format!(
                "is not valid yet, for another {}: are both hosts' clocks right?",
                between(*time, *not_before)
            )
        }
        CertificateError::NotValidYet => "is not valid yet: are both hosts' clocks right?".into(),
        CertificateError::Revoked => "has been revoked".into(),
        // Two authorities may go by the same name.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "comes from another CA than those that this side trusts".into()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented: Vec<_> = presented.iter().map(|name| bare(name)).collect();
            format!("is not for {}, but for {}", expected.to_str(), presented.join(", "))
        }
        CertificateError::NotValidForName => "is for another host".into(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for this purpose: it has to be for servers and clients (serverAuth and clientAuth)".into()
        }
        CertificateError::UnknownRevocationStatus => {
            "comes from a CA of which this side's CRL says nothing: add the CRL of that CA".into()
        }
        other => format!("is of no use: {other}"),
    }
}

/// What a peer said, after its name.
fn complaint(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::CertificateExpired => "it has expired or is not valid yet",
        AlertDescription::CertificateRevoked => "it has been revoked",
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it comes from another CA than those that are trusted there"
        }
        AlertDescription::BadCertificate => "it is not for the host that it was expected from",
        AlertDescription::UnsupportedCertificate => "it is not for servers and clients",
        AlertDescription::CertificateRequired => "there is none",
        AlertDescription::CertificateUnknown => "something is wrong with it",
        other => return format!("ended the handshake: {other:?}; its log says why"),
    };
    format!("refuses this side's certificate: {why}; its log says more")
}

/// A name as rustls shows it, `DnsName("a.example")`, without what is around it.
fn bare(shown: &str) -> String {
    let inner = shown.split_once('"').and_then(|(_, rest)| rest.rsplit_once('"'));
    let inner = inner.or_else(|| shown.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')));
    inner.map_or(shown, |(name, _)| name).into()
}

/// The time from `from` to `to`, roughly.
fn between(from: UnixTime, to: UnixTime) -> String {
    let seconds = to.as_secs().saturating_sub(from.as_secs());
    let (count, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_told_in_the_unit_that_fits() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let texts = [1, 60, 7199, 7200, 3 * 86_400].map(|seconds| between(at(1000), at(1000 + seconds)));
        assert_eq!(texts, ["1 second", "60 seconds", "119 minutes", "2 hours", "3 days"]);
        assert_eq!(bare("DnsName(\"a.example\")"), "a.example");
        assert_eq!(bare("IpAddress(10.0.0.1)"), "10.0.0.1");
    }
}
