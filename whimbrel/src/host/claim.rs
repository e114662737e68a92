//! How a process that has a socket comes to have a machine's name on a host.
//!
//! A process serves on a socket of its own at first. Its machine's name is a link to that socket: making one
//! fails if the name is taken. A socket that nobody serves any more is no obstacle, and whoever removes one
//! holds a lock on the folder, so that nobody removes another's that has just taken its place.

use super::run_dir::{NoFileName, RunDir};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long the lock is waited for. Nobody holds it for longer than a few system calls take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is tried.
const PAUSE: Duration = Duration::from_millis(2);

/// Why a name cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no name for a socket.
    #[error(transparent)]
    Name(#[from] NoFileName),
    /// A live process has it.
    #[error("a machine called {0} is on this host already; choose another name")]
    InUse(String),
    /// The link cannot be made.
    #[error("cannot call a machine {name} in {}: {source}", folder.display())]
    Link {
        /// The name.
        name: String,
        /// The folder of the machines' sockets.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The names of a host's machines.
#[derive(Debug)]
pub struct Names {
    run: RunDir,
    folder: File,
}

impl Names {
    /// Makes the run directory, if it is not there, and opens it. A process that gives up the right to open
    /// files does this before.
    ///
    /// # Errors
    /// Those of making and opening folders.
    pub fn open(run: &RunDir) -> io::Result<Self> {
        run.make()?;
        Ok(Names { run: run.clone(), folder: File::open(run.machines_folder())? })
    }

    /// The folder whose names these are.
    pub fn run_dir(&self) -> &RunDir {
        &self.run
    }

    /// Makes the socket at `from`, which is served, that of the machine of this name. Returns its new path;
    /// the old one is gone. A socket of that name which nobody serves any more is replaced.
    ///
    /// # Errors
    /// [`Error`].
    pub fn claim(&self, from: &Path, name: &str) -> Result<PathBuf, Error> {
        RunDir::check(name)?;
        let to = self.run.machine_socket(name);
        let failed = |source| Error::Link { name: name.into(), folder: self.run.machines_folder(), source };
        let _held = self.hold().map_err(failed)?;
        if !remove_stale(&to).map_err(failed)? {
            return Err(Error::InUse(name.into()));
        }
        std::fs::hard_link(from, &to).map_err(failed)?;
        std::fs::remove_file(from).map_err(failed)?;
        Ok(to)
    }

    /// Undoes a claim: the socket at `path` is that of a machine without a name again, at `nameless`.
    ///
    /// # Errors
    /// Those of locking the folder, and of making and removing a link.
    pub fn give_back(&self, path: &Path, nameless: &Path) -> io::Result<()> {
        let _held = self.hold()?;
        std::fs::hard_link(path, nameless)?;
        std::fs::remove_file(path)
    }

    /// Removes the sockets among these that nobody serves.
    ///
    /// # Errors
    /// Those of locking the folder and of removing a file.
    pub fn clear(&self, sockets: &[PathBuf]) -> io::Result<()> {
        let _held = self.hold()?;
        sockets.iter().try_for_each(|socket| remove_stale(socket).map(drop))
    }

    /// Keeps others from removing sockets.
    fn hold(&self) -> io::Result<Held<'_>> {
        if lock_within(&self.folder, PATIENCE)? {
            return Ok(Held(&self.folder));
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "another process keeps the folder locked"))
    }
}

/// Locks a file, or waits so long until nobody else does. Whether it is locked then.
pub(super) fn lock_within(file: &File, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Ok(false),
            Err(TryLockError::WouldBlock) => thread::sleep(PAUSE),
        }
    }
}

/// The lock, until it is dropped.
struct Held<'a>(&'a File);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Closing the folder does it as well.
        let _ = self.0.unlock();
    }
}

/// Removes a socket that nobody serves. Whether the path is free then.
fn remove_stale(path: &Path) -> io::Result<bool> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(true),
        },
        // Somebody is there, or nobody can tell.
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn names(folder: &tempfile::TempDir) -> Names {
        Names::open(&RunDir::new(Some(folder.path()))).unwrap()
    }

    #[test]
    fn a_name_has_one_process() {
        let folder = tempfile::tempdir().unwrap();
        let names = names(&folder);
        let [first, second] = [1, 2].map(|pid| names.run.nameless_socket(pid));
        let serving = UnixListener::bind(&first).unwrap();
        let _other = UnixListener::bind(&second).unwrap();
        let path = names.claim(&first, "web1").unwrap();
        assert!(UnixStream::connect(&path).is_ok() && !first.exists());
        assert!(matches!(names.claim(&second, "web1"), Err(Error::InUse(name)) if name == "web1"));
        assert!(matches!(names.claim(&second, "../web1"), Err(Error::Name(_))));
        // One that is served is not removed.
        names.clear(&[path.clone(), second.clone()]).unwrap();
        assert!(path.exists() && second.exists());
        // One that is given back can be claimed by others.
        names.give_back(&path, &first).unwrap();
        names.claim(&second, "web1").unwrap();
        names.give_back(&path, &second).unwrap();
        names.claim(&first, "web1").unwrap();
        // Its process has died and left the socket behind.
        drop(serving);
        names.claim(&second, "web1").unwrap();
        assert_eq!(names.run.machines().unwrap(), ["web1"]);
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn of_many_that_want_a_name_one_gets_it() {
        for _ in 0..200 {
            let folder = tempfile::tempdir().unwrap();
            let run = names(&folder).run;
            // Nobody serves the socket that is there.
            drop(UnixListener::bind(run.machine_socket("web1")).unwrap());
            let sockets: Vec<_> =
                (0..8).map(|pid| UnixListener::bind(run.nameless_socket(pid)).unwrap()).collect();
            let together = std::sync::Barrier::new(8);
            let got = thread::scope(|scope| {
                let claim = |pid| {
                    let (run, together) = (&run, &together);
                    scope.spawn(move || {
                        // Each has the folder open by itself, as processes have.
                        let names = Names::open(run).unwrap();
                        together.wait();
                        names.claim(&run.nameless_socket(pid), "web1").is_ok()
                    })
                };
                let claims: Vec<_> = (0..8).map(claim).collect();
                claims.into_iter().filter_map(|claim| claim.join().ok()).filter(|got| *got).count()
            });
            assert_eq!(got, 1);
            assert!(UnixStream::connect(run.machine_socket("web1")).is_ok());
            drop(sockets);
        }
    }
}
