//! What the process of a virtual machine may still do. Somebody who breaks out of a guest, or misleads this
//! process from the network, finds few system calls and few privileges.
//!
//! Three system call filters apply at once, and the strictest answer counts (`calls.rs` has the lists):
//!
//! | threads | may make | any other call |
//! |---|---|---|
//! | all threads | no call that takes over hosts or processes | a message, and SIGSYS ends the process (`trap.rs`) |
//! | all threads | the calls of this program and of the libraries of RDMA devices | `ENOSYS` |
//! | vCPUs and queues | the calls that work on open files needs | `ENOSYS` |
//!
//! The second filter does not kill, because nobody knows beforehand which calls a library may make one day.
//! Providers of RDMA devices are loaded when a migration begins, and the C library is the host's. A guest
//! must not die because a newer library tries another call first. Libraries treat `ENOSYS` as they do on a
//! kernel that has never had the call, and use another way. Calls by the numbers of the x32 ABI, which are on
//! no list, get the same answer. Calls of other architectures kill.
//!
//! The lists hold from the start, because peers may call a receiver before any guest is there. So they must
//! allow from the start what a migration needs later. The same holds for privileges (`privileges.rs`), of
//! which threads that serve a guest have none, and for files that may still be opened (`files.rs`). What a
//! process needs beyond what every machine does, it says itself ([`Needs`]). Threads inherit all of this, and
//! nothing can be taken back.
//!
//! A process that reads a disk for its kernel has rules of its own, stricter than all of these (`reader.rs`).
//! What takes a privilege while a machine runs is done by a process of its own, which does nothing else
//! (`helper.rs`).
//!
//! Most of it costs next to nothing. When a filter is installed, the kernel finds out which calls it allows
//! whatever their arguments are, and does not run it for them. Of the calls that a running guest makes, only
//! `ioctl` has a condition.

pub(crate) mod beside;
mod calls;
mod files;
mod helper;
mod privileges;
pub(crate) mod reader;
mod trap;

pub use files::available as landlock;
pub use helper::Helper;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

/// What happens if a system call is not on the lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It is refused, or ends the process. Files that the process does not need cannot be opened.
    Enforce,
    /// The kernel logs it, and it is carried out. All files can be opened.
    Log,
    /// There are no lists, and privileges are kept.
    Off,
}

/// What a process needs once it is confined, beyond what every machine does. Whatever takes a privilege to be
/// opened should be open before.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Files that it reads, and folders below which it does.
    pub read: Vec<PathBuf>,
    /// Files that it reads and writes, and folders below which it does. They have to be there by then.
    pub write: Vec<PathBuf>,
    /// Folders in which it makes files.
    pub make: Vec<PathBuf>,
    /// Folders in which it makes and removes sockets.
    pub sockets: Vec<PathBuf>,
    /// Whether it opens taps.
    pub taps: bool,
    /// Whether it listens on a port below 1024.
    pub low_port: bool,
}

/// Why a process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no filters.
    #[error(
        "this kernel does not filter system calls ({0}); start with --seccomp off to run without filters"
    )]
    Filter(#[from] seccompiler::Error),
    /// A list is no filter.
    #[error("a list of system calls is wrong: {0}")]
    List(#[from] seccompiler::BackendError),
    /// Privileges cannot be given up.
    #[error("cannot give up privileges: {0}")]
    Privileges(#[from] caps::errors::CapsError),
    /// The files that can be opened cannot be limited, though the kernel has Landlock.
    #[error("cannot limit which files can be opened: {0}; start with --seccomp off to run without limits")]
    Files(#[from] landlock::RulesetError),
    /// The system has no room for another limit.
    #[error("cannot limit what this process may use: {0}")]
    Limit(io::Error),
    /// The handler that says which call ends the process cannot be installed.
    #[error("cannot handle SIGSYS: {0}")]
    Handler(io::Error),
    /// The flag that keeps new programs from having more privileges cannot be set.
    #[error("cannot set no_new_privs: {0}")]
    NoNewPrivileges(io::Error),
}

/// The filter for threads that serve a guest, once [`enter`] has made one.
static SERVING: OnceLock<BpfProgram> = OnceLock::new();

/// Confines this thread and all threads that it starts from now on. Call it before there are other threads.
///
/// # Errors
/// [`Error`].
pub fn enter(mode: Mode, needs: &Needs) -> Result<(), Error> {
    if mode == Mode::Off {
        return Ok(());
    }
    no_new_privileges()?;
    privileges::keep(&privileges::kept(needs))?;
    if mode == Mode::Enforce {
        files::restrict(needs)?;
        trap::install().map_err(Error::Handler)?;
    }
    let or = |action| if mode == Mode::Log { SeccompAction::Log } else { action };
    let lacking = or(SeccompAction::Errno(libc::ENOSYS.unsigned_abs()));
    let serving = filter(calls::serving()?, lacking.clone(), SeccompAction::Allow)?;
    let fatal = filter(calls::fatal()?, SeccompAction::Allow, or(SeccompAction::Trap))?;
    seccompiler::apply_filter(&fatal)?;
    seccompiler::apply_filter(&filter(calls::all()?, lacking, SeccompAction::Allow)?)?;
    let _ = SERVING.set(serving);
    Ok(())
}

fn no_new_privileges() -> Result<(), Error> {
    // SAFETY: the call takes integers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == 0 {
        Ok(())
    } else {
        Err(Error::NoNewPrivileges(io::Error::last_os_error()))
    }
}

/// Confines the current thread to serving a guest. Does nothing in a process that has not been confined. Ends
/// the process if this fails, because no unconfined thread may serve a guest.
pub(crate) fn serve() {
    let Some(filter) = SERVING.get() else { return };
    let confined =
        privileges::keep(&[]).map_err(Error::from).and_then(|()| Ok(seccompiler::apply_filter(filter)?));
    if let Err(why) = confined {
        eprintln!("whimbrel: a thread cannot be confined: {why}");
        std::process::abort();
    }
}

/// Whether this kernel can end a process for a call that a filter names.
///
/// # Errors
/// The kernel's answer.
pub fn available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS; // which is newer than the others
    // SAFETY: the operation reads one u32, which lives across the call.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &action) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn filter(
    calls: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(calls, otherwise, listed, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_lists_are_filters() {
        let lacking = || SeccompAction::Errno(38);
        let serving = calls::serving().unwrap();
        let all = calls::all().unwrap();
        let names = |calls: &BTreeMap<i64, Vec<SeccompRule>>| calls.keys().copied().collect::<BTreeSet<_>>();
        assert!(names(&serving).is_subset(&names(&all)), "what serves a guest is also part of the whole");
        let mut fatal = calls::fatal().unwrap();
        assert!(fatal.remove(&libc::SYS_ioctl).is_some_and(|rules| rules.len() == 2));
        assert!(names(&all).is_disjoint(&names(&fatal)), "no call is both needed and fatal");
        for calls in [all, serving, fatal] {
            filter(calls, lacking(), SeccompAction::Allow).unwrap();
        }
    }

    #[test]
    fn this_kernel_has_filters() {
        available().unwrap();
    }
}
