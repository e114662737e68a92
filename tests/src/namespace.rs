//! Network namespaces without names: they end with whatever is in them, however that ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

/// One of them.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A new one, in which nothing is but a loopback interface that is down.
    ///
    /// # Errors
    /// Without the right to make one.
    pub fn new() -> io::Result<Self> {
        let make = || {
            // SAFETY: changes the namespace of this thread only.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Namespace::at("/proc/thread-self/ns/net")
        };
        in_a_thread(make)
    }

    /// The one that a file leads to.
    ///
    /// # Errors
    /// When there is none.
    pub fn at(path: impl AsRef<Path>) -> io::Result<Self> {
        File::open(path).map(Namespace)
    }

    /// The one that a process is in.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        Namespace::at(format!("/proc/{pid}/ns/net"))
    }

    /// What leads to it from any process of this process's namespace of processes.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Moves this thread there.
    ///
    /// # Errors
    /// Without the right to.
    pub fn enter(&self) -> io::Result<()> {
        // One needs a right even to stay.
        if self.0.metadata()?.ino() == Namespace::at("/proc/thread-self/ns/net")?.0.metadata()?.ino() {
            return Ok(());
        }
        // SAFETY: changes the namespace of this thread only.
        match unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Does something in it: the threads, processes and sockets that are made meanwhile stay there.
    ///
    /// # Panics
    /// When it cannot be entered, and whenever `what` panics.
    pub fn within<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        in_a_thread(|| {
            self.enter().expect("the right to enter a namespace");
            what()
        })
    }
}

fn in_a_thread<T: Send>(what: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(what).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}
