//! Which machine is meant.

use super::security::TlsArgs;
use clap::Args;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;
use whimbrel::api::client::Client;
use whimbrel::api::reach::Reach;
use whimbrel::api::{self};
use whimbrel::host::run_dir::{NotHere, RunDir};
use whimbrel::security::Ktls;

/// The machines of this host.
#[derive(Args, Clone, Debug)]
pub struct HostArgs {
    /// Folder of the host's sockets. Without it, the one that WHIMBREL_RUN_DIR names, or /run/whimbrel
    #[arg(long, value_name = "FOLDER")]
    pub run_dir: Option<PathBuf>,
}

impl HostArgs {
    /// The folder.
    pub fn run_dir(&self) -> RunDir {
        RunDir::new(self.run_dir.as_deref())
    }
}

/// A host: this one, or one that is reached over a network.
#[derive(Args, Clone, Debug)]
pub struct AnyHost {
    #[command(flatten)]
    pub host: HostArgs,
    /// Another host, by the address where it serves its API (`[api]` in its configuration), such as
    /// https://hostb; the port is 8443 unless one is named
    #[arg(long, value_name = "URL", requires = "certificates", conflicts_with = "run_dir")]
    pub at: Option<String>,
    #[command(flatten)]
    pub tls: TlsArgs,
}

impl AnyHost {
    /// A client of the host's service.
    pub fn client(&self) -> Result<Client, api::Error> {
        Client::of(match self.remote() {
            Some(reach) => reach?,
            None => Reach::Socket(self.host.run_dir().host_socket()),
        })
    }

    /// The other host, if it is one.
    fn remote(&self) -> Option<Result<Reach, api::Error>> {
        let url = self.at.as_deref()?;
        Some(Reach::host(url, &self.tls.files(Ktls::default()).unwrap_or_default()))
    }
}

#[derive(Args, Clone, Debug)]
pub struct Target {
    /// The machine's name, as `whimbrel list` shows it
    #[arg(required_unless_present = "api")]
    pub name: Option<String>,
    /// Unix socket of the machine's API, in the place of its name
    #[arg(long, conflicts_with_all = ["name", "run_dir"])]
    pub api: Option<PathBuf>,
    #[command(flatten)]
    pub host: HostArgs,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

impl Target {
    /// The socket of the machine's API.
    pub fn socket(&self) -> Result<PathBuf, NotHere> {
        match (&self.api, &self.name) {
            (Some(path), _) => Ok(path.clone()),
            (None, name) => self.host.run_dir().find(name.as_deref().unwrap_or_default()),
        }
    }
}

/// As it is written on the command line.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.api, &self.name) {
            (Some(path), _) => write!(f, "--api {}", path.display()),
            (None, name) => f.write_str(name.as_deref().unwrap_or_default()),
        }?;
        match &self.host.run_dir {
            Some(folder) => write!(f, " --run-dir {}", folder.display()),
            None => Ok(()),
        }
    }
}

#[derive(Args, Debug)]
pub struct ResumeArgs {
    #[command(flatten)]
    pub target: Target,
    /// Resume a held guest; only if it certainly does not run at the destination
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
pub struct ListArgs {
    #[command(flatten)]
    pub host: AnyHost,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct EventsArgs {
    #[command(flatten)]
    pub host: AnyHost,
    /// Begin with what is now, and go on as events happen, also when the host's service is replaced. Without
    /// it, those are shown that the service and the host's history know
    #[arg(long, short = 'f')]
    pub follow: bool,
    /// Answer as JSON, one event a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct HistoryArgs {
    /// Only what this machine did
    pub name: Option<String>,
    #[command(flatten)]
    pub host: AnyHost,
    /// Folder in which the history is. Default: /var/lib/whimbrel for /run/whimbrel, and `state` in any other
    /// run directory
    #[arg(long, value_name = "FOLDER", conflicts_with = "at")]
    pub state_dir: Option<PathBuf>,
    /// How many entries at most: the last ones. Another host (--at) tells 1000 at most
    #[arg(long, value_name = "N")]
    pub last: Option<usize>,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct StopArgs {
    #[command(flatten)]
    pub target: Target,
    /// How long the guest may take to shut down before its process is ended
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub patience: Duration,
    /// End the process at once, as the power going off
    #[arg(long)]
    pub force: bool,
}
