//! The process that reads a disk which a guest wrote: it reads that file, answers, and ends. And the one that
//! waits until there is a disk to read.

use super::calls::{self, Calls};
use super::{Error, Mode, files, filter, no_new_privileges, privileges};
use seccompiler::{BackendError, SeccompAction};
use std::fs;
use std::io;
use std::os::fd::RawFd;

/// Memory that it may have beyond what it starts with, in bytes. What it reads, it hands on in pieces; the
/// most that it keeps are the descriptors of a file system of 128 TiB.
const MEMORY: u64 = 256 << 20;
/// Processor time that it may use, in seconds: to read the largest files takes some ten.
const SECONDS: u64 = 300;

/// Confines this process, which has one thread, to reading from the file `input` and writing to `output`.
/// With [`Mode::Off`] it only has limits.
///
/// # Errors
/// [`Error`].
pub fn confine(mode: Mode, input: RawFd, output: RawFd) -> Result<(), Error> {
    let size = size();
    give_up(mode)?;
    narrow(mode, size, input, output)
}

/// Confines this process, which has one thread, to what comes by `socket`, and to further processes, which
/// are to [`narrow`] themselves.
///
/// # Errors
/// [`Error`].
pub fn stand_by(mode: Mode, socket: RawFd) -> Result<(), Error> {
    die_with_parent();
    close_others(&[socket])?;
    give_up(mode)?;
    filter_calls(mode, calls::standby)
}

/// Confines this process, which has one thread and has given up its rights, as [`confine`] does. `size` is
/// its [`size`] before.
///
/// # Errors
/// [`Error`].
pub fn narrow(mode: Mode, size: u64, input: RawFd, output: RawFd) -> Result<(), Error> {
    die_with_parent();
    close_others(&[input, output])?;
    limit(libc::RLIMIT_CORE, 0)?;
    limit(libc::RLIMIT_CPU, SECONDS)?;
    limit(libc::RLIMIT_AS, size + MEMORY)?;
    filter_calls(mode, || calls::reader(input, output))
}

/// Bytes of this process's address space.
pub fn size() -> u64 {
    let size = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = size.split(' ').next().and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    // SAFETY: the call takes an integer.
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.unsigned_abs()
}

fn die_with_parent() {
    // SAFETY: the call takes integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
}

/// Gives up privileges, and files that are not open yet.
fn give_up(mode: Mode) -> Result<(), Error> {
    if mode != Mode::Off {
        no_new_privileges()?;
        privileges::keep(&[])?;
    }
    if mode == Mode::Enforce {
        files::none()?;
    }
    Ok(())
}

fn filter_calls(mode: Mode, calls: impl FnOnce() -> Result<Calls, BackendError>) -> Result<(), Error> {
    let otherwise = match mode {
        Mode::Enforce => SeccompAction::KillProcess,
        Mode::Log => SeccompAction::Log,
        Mode::Off => return Ok(()),
    };
    Ok(seccompiler::apply_filter(&filter(calls()?, otherwise, SeccompAction::Allow)?)?)
}

/// Lowers a limit, to what it is already if that is less.
fn limit(what: libc::__rlimit_resource_t, to: u64) -> Result<(), Error> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one rlimit, which lives across it.
    if unsafe { libc::getrlimit(what, &mut limit) } != 0 {
        return Err(Error::Limit(io::Error::last_os_error()));
    }
    let to = to.min(limit.rlim_max);
    limit = libc::rlimit { rlim_cur: to, rlim_max: to };
    // SAFETY: the call reads one rlimit, which lives across it.
    if unsafe { libc::setrlimit(what, &limit) } != 0 {
        return Err(Error::Limit(io::Error::last_os_error()));
    }
    Ok(())
}

/// Closes all files but these. Standard input and output are among those that go.
pub(super) fn close_others(kept: &[RawFd]) -> Result<(), Error> {
    let mut kept: Vec<u32> = kept.iter().map(|file| file.unsigned_abs()).collect();
    kept.sort_unstable();
    let mut from = 0;
    for end in kept.into_iter().map(Some).chain([None]) {
        let to = end.map_or(Some(u32::MAX), |end| end.checked_sub(1));
        if let Some(to) = to.filter(|to| *to >= from) {
            // SAFETY: the call takes integers. Whatever owns one of these files does not come to use it any
            // more: this process only uses those that are kept.
            if unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) } != 0 {
                return Err(Error::Limit(io::Error::last_os_error()));
            }
        }
        from = end.unwrap_or(0).saturating_add(1);
    }
    Ok(())
}
