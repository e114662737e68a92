//! What the process of a virtual machine may still do: whoever breaks out of a guest, or misleads this process from
//! the network, finds little to go on with.
//!
//! Three system call filters lie over each other, and the strictest answer counts (`calls.rs` has the lists):
//!
//! | who | what | otherwise |
//! |---|---|---|
//! | all threads | none of what takes over hosts and processes | the kernel kills the process, and logs it |
//! | all threads | what this program and the libraries of an RDMA device use | `ENOSYS` |
//! | vCPUs and queues | what work on open files needs | `ENOSYS` |
//!
//! The middle one does not kill. What a library may call some day is not known beforehand: providers of RDMA devices
//! are loaded when a migration begins, and the C library is the host's. Guests must not die of a call that a newer one
//! tries first. Upon `ENOSYS` libraries do without, as they do on a kernel that has never heard of the call. That also
//! is the answer to calls by the numbers of the x32 ABI, which no list has; those of other architectures kill.
//!
//! The lists hold from the start, since a receiver, which peers may call before any guest is there, needs until then
//! what a migration needs later. So do privileges: threads that serve a guest have none (`privileges.rs`). All of it is
//! inherited by threads, and none can be taken back.
//!
//! Most of it costs next to nothing: the kernel works out when a filter is installed which calls it allows whatever
//! their arguments, and does not run it for those. Of those that a running guest makes only `ioctl` has a condition.

mod calls;
mod privileges;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};
use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

/// What happens upon a system call that is not on the lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It is refused, or ends the process.
    Enforce,
    /// The kernel logs it, and it is carried out.
    Log,
    /// There are no lists, and privileges are kept.
    Off,
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
    /// The flag that keeps new programs from having more privileges cannot be set.
    #[error("cannot set no_new_privs: {0}")]
    NoNewPrivileges(io::Error),
}

/// The filter for threads that serve a guest, once [`enter`] has made one.
static SERVING: OnceLock<BpfProgram> = OnceLock::new();

/// Confines this thread and all that it starts from now on. To be called before there are others.
///
/// # Errors
/// [`Error`].
pub fn enter(mode: Mode) -> Result<(), Error> {
    if mode == Mode::Off {
        return Ok(());
    }
    // SAFETY: the call takes integers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(Error::NoNewPrivileges(io::Error::last_os_error()));
    }
    privileges::keep(privileges::KEPT)?;
    let or = |action| if mode == Mode::Log { SeccompAction::Log } else { action };
    let lacking = or(SeccompAction::Errno(libc::ENOSYS.unsigned_abs()));
    let serving = filter(calls::serving()?, lacking.clone(), SeccompAction::Allow)?;
    let fatal = filter(calls::fatal()?, SeccompAction::Allow, or(SeccompAction::KillProcess))?;
    seccompiler::apply_filter(&fatal)?;
    seccompiler::apply_filter(&filter(calls::all()?, lacking, SeccompAction::Allow)?)?;
    let _ = SERVING.set(serving);
    Ok(())
}

/// Confines the current thread to serving a guest; does nothing in a process that has not been confined. Ends the
/// process where that fails: no guest is served by a thread that is not.
pub(crate) fn serve() {
    let Some(filter) = SERVING.get() else { return };
    let confined =
        privileges::keep(&[]).map_err(Error::from).and_then(|()| Ok(seccompiler::apply_filter(filter)?));
    if let Err(why) = confined {
        eprintln!("whimbrel: a thread cannot be confined: {why}");
        std::process::abort();
    }
}

/// Whether this kernel can kill a process upon a call that a filter names.
///
/// # Errors
/// What it said.
pub fn available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
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
