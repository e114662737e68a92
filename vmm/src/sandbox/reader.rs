//! The process that reads a disk which a guest wrote: it reads that file, answers, and ends.

use super::{Error, Mode, calls, files, filter, no_new_privileges, privileges};
use seccompiler::SeccompAction;
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
    // SAFETY: the call takes integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    let before = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = before.split(' ').next().and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    close_others(input, output)?;
    if mode != Mode::Off {
        no_new_privileges()?;
        privileges::keep(&[])?;
    }
    if mode == Mode::Enforce {
        files::none()?;
    }
    limit(libc::RLIMIT_CORE, 0)?;
    limit(libc::RLIMIT_CPU, SECONDS)?;
    // SAFETY: the call takes an integer.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.unsigned_abs();
    limit(libc::RLIMIT_AS, pages * page + MEMORY)?;
    let otherwise = match mode {
        Mode::Enforce => SeccompAction::KillProcess,
        Mode::Log => SeccompAction::Log,
        Mode::Off => return Ok(()),
    };
    let filter = filter(calls::reader(input, output)?, otherwise, SeccompAction::Allow)?;
    Ok(seccompiler::apply_filter(&filter)?)
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

/// Closes all files but these two. Standard input and output are among those that go.
fn close_others(input: RawFd, output: RawFd) -> Result<(), Error> {
    let (first, second) = (input.min(output).unsigned_abs(), input.max(output).unsigned_abs());
    let ranges =
        [(0, first.checked_sub(1)), (first + 1, second.checked_sub(1)), (second + 1, Some(u32::MAX))];
    for (from, to) in ranges {
        let Some(to) = to.filter(|to| *to >= from) else { continue };
        // SAFETY: the call takes integers. Whatever owns one of these files does not come to use it any more:
        // this process only reads the one and writes to the other.
        if unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) } != 0 {
            return Err(Error::Limit(io::Error::last_os_error()));
        }
    }
    Ok(())
}
