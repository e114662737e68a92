//! `whimbrel pki`: certificates for a small fleet.

use super::args::{PkiArgs, PkiCommand};
use super::{Exit, say};
use whimbrel::pki::{Authority, days_from_now};

pub fn pki(args: PkiArgs) -> anyhow::Result<Exit> {
    match args.command {
        PkiCommand::Init { folder } => {
            Authority::create(&folder)?;
            say(format!(
                "{} has an authority now. Keep ca.key to yourself; `whimbrel pki host` makes certificates",
                folder.display()
            ))?;
        }
        PkiCommand::Host { folder, name, others, days } => {
            let made = Authority::open(&folder).issue(&name, &others, days_from_now(days))?;
            say(format!("copy {} to {name}, and give it to run and receive as --tls there", made.display()))?;
        }
        PkiCommand::Revoke { folder, name } => {
            Authority::open(&folder).revoke(&name)?;
            say(format!(
                "{name} is revoked. Copy {} to every host, as the crl.pem beside its certificate",
                folder.join("crl.pem").display()
            ))?;
        }
    }
    Ok(Exit::Done)
}
