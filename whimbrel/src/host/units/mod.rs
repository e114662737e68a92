//! A unit of its own for each machine, where systemd runs.
//!
//! A machine's process begins as a part of the host service, and becomes a scope (`whimbrel-NAME.scope`, in
//! `whimbrel.slice`) as soon as it is known which machine it will be: after it has been started from a file,
//! or when a guest that comes has been admitted and nothing of it has been built. So a unit is called as the
//! machine is, an operator limits a machine as any other unit (`systemctl set-property web1…`, or a file in
//! `whimbrel-web1.scope.d`), and restarting the service touches none. A process that waits for a guest stays
//! with the service, as it is of no use without it.
//!
//! systemd makes units for the superuser only, and the service is none. So it asks a [helper](serve) for
//! that, which can do nothing else and looks at who asks. Where there is no helper, processes stay where they
//! are; they have a process group of their own in any case.

mod helper;
mod name;

pub use helper::serve;

use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Names the helper's socket. The service's unit sets it.
pub const VARIABLE: &str = "WHIMBREL_UNITS";

/// The slice of all machines.
const SLICE: &str = "whimbrel.slice";

/// How long the helper may take. A guest that is to come waits for it.
const PATIENCE: Duration = Duration::from_secs(3);

/// Longest line that either side reads.
const MAX_LINE: u64 = 4096;

/// Why a process has no unit of its own.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The helper cannot be reached.
    #[error("{} does not answer: {source}; is whimbrel-units.socket active?", path.display())]
    Unreachable {
        /// Its socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It has refused.
    #[error("{0}")]
    Refused(String),
}

/// What is asked for.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    /// The process of a machine.
    pid: u32,
    /// The machine's name.
    name: String,
}

/// What the helper has done.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    /// The process is this unit.
    Unit(String),
    /// Why it is not.
    Refused(String),
}

/// Where units are asked for.
#[derive(Clone, Debug, Default)]
pub struct Units(Option<PathBuf>);

impl Units {
    /// The helper that the environment names, if it names one.
    pub fn from_environment() -> Self {
        Units(std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from))
    }

    /// Sees to it that the process of the machine of this name has a unit of its own, if units are to be had.
    /// What it has used before is counted where it was.
    ///
    /// # Errors
    /// [`Error`]; the process is where it was.
    pub fn enter(&self, pid: u32, name: &str) -> Result<(), Error> {
        let Some(path) = &self.0 else { return Ok(()) };
        if has_unit(pid) {
            return Ok(());
        }
        let unreachable = |source| Error::Unreachable { path: path.clone(), source };
        match ask(path, &Request { pid, name: name.into() }).map_err(unreachable)? {
            Answer::Unit(_) => Ok(()),
            Answer::Refused(why) => Err(Error::Refused(why)),
        }
    }
}

fn ask(path: &std::path::Path, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    say(&mut stream, request)?;
    hear(&stream)
}

fn say(stream: &mut UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn hear<T: serde::de::DeserializeOwned>(stream: &UnixStream) -> io::Result<T> {
    let mut line = String::new();
    BufReader::new(io::Read::take(stream, MAX_LINE)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Whether a process is in the slice of machines. It is in one cgroup of each hierarchy that there is.
fn has_unit(pid: u32) -> bool {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    cgroups.lines().any(|line| line.split('/').any(|part| part == SLICE))
}
