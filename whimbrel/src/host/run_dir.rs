//! The folder by which a host's machines are found.
//!
//! Each machine serves its API on a socket in it that is called as the machine is. That is all there is to
//! know about a host at present: whoever starts anew asks these sockets, and has forgotten nothing.
//!
//! ```text
//!   host.sock            the host service's API
//!   gate.sock            where processes that take guests in wait for connections
//!   host.lock            is locked by the host service
//!   processes.log        what the processes say that the host service has started; with its latest copies,
//!                        processes.log.1 and .2
//!   drained              is there while the host takes nobody in
//!   machines/NAME.sock   the API of the machine NAME
//!   machines/.PID.sock   the API of a process that has no guest yet
//! ```

use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// Names the folder if no option does.
pub const VARIABLE: &str = "WHIMBREL_RUN_DIR";

/// Where it is if nothing else is said.
const DEFAULT: &str = "/run/whimbrel";

/// Where what outlives a reboot of the host is kept if that folder is used.
const DEFAULT_STATE: &str = "/var/lib/whimbrel";

/// How the socket of a machine ends.
const SOCKET: &str = ".sock";

/// Why a machine can have no socket in a run directory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a machine of a host cannot be called {0:?}: its name is that of a file, so it is not empty, does not begin with a \
     dot and has no slash"
)]
pub struct NoFileName(pub String);

/// There is no machine of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no machine called {name} is in {}; {}", folder.display(), present(machines))]
pub struct NotHere {
    /// What was looked for.
    pub name: String,
    /// Where.
    pub folder: PathBuf,
    /// Who is there.
    pub machines: Vec<String>,
}

fn present(machines: &[String]) -> String {
    match machines {
        [] => "there is none. --run-dir or WHIMBREL_RUN_DIR names another folder".into(),
        _ => format!("there are: {}", machines.join(", ")),
    }
}

/// The folder of a host's sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The folder that is named, or else the usual one.
    pub fn new(named: Option<&Path>) -> Self {
        let usual = || std::env::var_os(VARIABLE).map_or_else(|| DEFAULT.into(), PathBuf::from);
        RunDir(named.map_or_else(usual, Path::to_path_buf))
    }

    /// Makes it, with what is in it, for this user alone, unless it is there.
    ///
    /// # Errors
    /// Those of making folders.
    pub fn make(&self) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(self.machines_folder())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The folder of what is kept beyond the machines' lives, and in the usual place beyond the host's: the
    /// history.
    pub fn state_folder(&self) -> PathBuf {
        if self.0 == Path::new(DEFAULT) { DEFAULT_STATE.into() } else { self.0.join("state") }
    }

    /// The socket of the host service's API.
    pub fn host_socket(&self) -> PathBuf {
        self.0.join("host.sock")
    }

    /// The socket where processes that take guests in wait for connections.
    pub fn gate_socket(&self) -> PathBuf {
        self.0.join("gate.sock")
    }

    /// The file that the host service locks.
    pub fn lock_file(&self) -> PathBuf {
        self.0.join("host.lock")
    }

    /// The file to which the processes write that the host service starts.
    pub fn log_file(&self) -> PathBuf {
        self.0.join("processes.log")
    }

    fn drained_file(&self) -> PathBuf {
        self.0.join("drained")
    }

    /// Whether the host takes nobody in.
    pub fn is_drained(&self) -> bool {
        self.drained_file().exists()
    }

    /// Says whether the host takes nobody in from now on.
    ///
    /// # Errors
    /// Those of making and removing a file.
    pub fn drain(&self, drained: bool) -> io::Result<()> {
        if drained {
            return std::fs::write(self.drained_file(), "");
        }
        match std::fs::remove_file(self.drained_file()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The folder of the machines' sockets.
    pub fn machines_folder(&self) -> PathBuf {
        self.0.join("machines")
    }

    /// The socket of the machine of this name. A name that did not come from this host is looked at by
    /// [`check`](Self::check) first: it may lead elsewhere.
    pub fn machine_socket(&self, name: &str) -> PathBuf {
        self.machines_folder().join(format!("{name}{SOCKET}"))
    }

    /// Whether the machine of this name can have a socket here: its name is a file's.
    ///
    /// # Errors
    /// [`NoFileName`].
    pub fn check(name: &str) -> Result<(), NoFileName> {
        let good = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']);
        if good { Ok(()) } else { Err(NoFileName(name.into())) }
    }

    /// The socket of the machine of this name, which is there. Whether a process still serves it is another
    /// question.
    ///
    /// # Errors
    /// [`NotHere`], which says who is.
    pub fn find(&self, name: &str) -> Result<PathBuf, NotHere> {
        let machines = self.machines().unwrap_or_default();
        if machines.iter().any(|machine| machine == name) {
            return Ok(self.machine_socket(name));
        }
        Err(NotHere { name: name.into(), folder: self.0.clone(), machines })
    }

    /// The socket of a process that has no guest yet.
    pub fn nameless_socket(&self, pid: u32) -> PathBuf {
        self.machines_folder().join(format!(".{pid}{SOCKET}"))
    }

    /// The names of the machines that have a socket, in order. Whether a process still serves it is another
    /// question. None if there is no such folder.
    ///
    /// # Errors
    /// Those of reading a folder.
    pub fn machines(&self) -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(self.machines_folder()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            // One that is gone meanwhile is none.
            if !entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                continue;
            }
            let Ok(file) = entry.file_name().into_string() else { continue };
            match file.strip_suffix(SOCKET) {
                Some(name) if !name.starts_with('.') && !name.is_empty() => names.push(name.into()),
                _ => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn machines_are_found_by_their_sockets() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(Some(&folder.path().join("run")));
        assert_eq!(run.machines().unwrap(), [""; 0]);
        run.make().unwrap();
        run.make().unwrap();
        let _sockets = ["web2", "web1"].map(|name| UnixListener::bind(run.machine_socket(name)).unwrap());
        let _nameless = UnixListener::bind(run.nameless_socket(7)).unwrap();
        std::fs::write(run.machine_socket("file"), "").unwrap();
        assert_eq!(run.machines().unwrap(), ["web1", "web2"]);
        assert_eq!(run.state_folder(), run.path().join("state"));
        assert_eq!(
            RunDir::new(Some(Path::new("/run/whimbrel"))).state_folder(),
            Path::new("/var/lib/whimbrel")
        );
        assert_eq!(run.find("web1"), Ok(run.machine_socket("web1")));
        let unknown = run.find("db1").unwrap_err().to_string();
        assert!(unknown.contains("no machine called db1") && unknown.contains("web1, web2"), "{unknown}");
    }

    #[test]
    fn a_name_leads_nowhere_else() {
        for name in ["web1", "Web 1", "a.b", "é"] {
            assert_eq!(RunDir::check(name), Ok(()));
        }
        for name in ["", ".7", "../a", "a/b", "."] {
            assert!(RunDir::check(name).is_err(), "{name}");
        }
    }
}
